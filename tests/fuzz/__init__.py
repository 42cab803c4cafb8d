"""Mutated files against every reader of what users hand us; `python -m tests.fuzz` prints a line for each."""
