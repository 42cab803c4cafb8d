"""The seam between CPU and CUDA: one choice, made once."""
