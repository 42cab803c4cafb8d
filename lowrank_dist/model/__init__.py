"""The Megatron model and its layer spec, Hugging Face name tables, and the sharded streaming load."""
