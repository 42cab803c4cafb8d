"""Checkpoints of a run: the folder, the training state, export and inspection. No process group, no GPU."""
