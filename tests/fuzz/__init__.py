"""Mutated files against every reader of user-supplied files; `python -m tests.fuzz` prints a line for each."""
