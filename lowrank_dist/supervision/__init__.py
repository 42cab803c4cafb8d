"""Keeps a failing job from hanging, hiding its cause or leaving processes behind. Only `rank` imports torch."""
