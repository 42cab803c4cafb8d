"""Low-rank factors: where they go, how they start, and their unsharded form."""
