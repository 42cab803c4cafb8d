"""Operators: each file holds the wrapper and, beside it, the plain PyTorch that defines it."""
