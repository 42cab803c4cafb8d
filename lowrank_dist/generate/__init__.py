"""Text generation with a sharded model, and metrics of the generated texts."""
