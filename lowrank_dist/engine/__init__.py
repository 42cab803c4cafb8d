"""The training loop with evaluation, checkpoints and reports. No other package imports DeepSpeed."""
