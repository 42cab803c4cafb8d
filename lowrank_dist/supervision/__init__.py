"""Keeps a failing job from hanging, hiding its cause or leaving processes. Only `rank` and `peers` import torch."""
