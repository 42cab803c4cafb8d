"""The Megatron model built from an Architecture, and the sharded streaming load."""
