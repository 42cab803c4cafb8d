"""The training loop and its monitors; the only room that knows DeepSpeed."""
