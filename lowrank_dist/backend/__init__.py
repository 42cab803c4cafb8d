"""The interface between CPU and CUDA: the device is chosen once, at the start."""
