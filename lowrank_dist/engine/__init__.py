"""The training loop, what it evaluates, saves and reports; the only room that knows DeepSpeed."""
