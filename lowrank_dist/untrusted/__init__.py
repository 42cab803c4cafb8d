"""Readers of what anyone may have written: files, JSON, regular expressions. Bounded, and every fault a UserError."""
