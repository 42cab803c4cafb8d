"""Low-rank fine-tuning of large language models on a frozen base sharded by Megatron tensor parallelism."""

__version__ = "0.2.0"
