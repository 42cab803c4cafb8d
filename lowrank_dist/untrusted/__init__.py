"""Bounded readers of untrusted files, JSON and regular expressions. A fault is a UserError, or a ValueError."""
