"""The ways to fine-tune: low-rank updates, and their rivals on the same model, sharding, data and loop."""
