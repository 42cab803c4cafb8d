"""Proves a run's numbers on the user's machines: its own steps beside those of transformers under plain autograd."""
