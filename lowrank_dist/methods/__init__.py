"""The ways to fine-tune: low-rank updates, and their rivals on the same model, sharding, data and loop."""

from typing import Literal

# As a run's config has them; registry.py says where each lives.
MethodName = Literal["lora", "full", "adapter_h", "adapter_l", "prefix", "prompt"]
