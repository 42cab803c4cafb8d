"""Decoding with a sharded model, and how good what it writes is."""
