"""Operators: each file holds the wrappers and, beside each, its definition in plain PyTorch."""
