"""From the configuration to the method."""

from __future__ import annotations

from lowrank_dist.arch.architecture import Architecture
from lowrank_dist.config import Config
from lowrank_dist.errors import UserError
from lowrank_dist.methods.bottleneck.files import BottleneckConfig
from lowrank_dist.methods.bottleneck.method import Adapters
from lowrank_dist.methods.full.method import FullFineTuning
from lowrank_dist.methods.lora.method import Lora
from lowrank_dist.methods.method import Method
from lowrank_dist.methods.prefix.method import PrefixTuning
from lowrank_dist.methods.prompt.method import PromptTuning


def choose(config: Config, architecture: Architecture) -> Method:
    """What config.method names, for this model. UserError where it leaves no room for a sample, and as each raises."""
    base, seed = str(config.model.path), config.train.seed
    if config.method == "lora":
        return Lora(config, architecture)
    if config.method == "full":
        return FullFineTuning(architecture, config.model.path, seed)
    if config.method in ("adapter_h", "adapter_l"):
        sizes = BottleneckConfig(
            method=config.method,
            bottleneck=config.adapter.bottleneck,
            layers=architecture.layers,
            hidden=architecture.hidden,
            base=base,
        )
        return Adapters(sizes, config.adapter.placement, seed)
    method: Method
    if config.method == "prefix":
        method = PrefixTuning(config.prefix.length, config.prefix.width, architecture, base, seed)
    else:
        method = PromptTuning(config.prompt.length, config.prompt.init, architecture, base, seed)
    if config.data.max_length - method.virtual < 2:
        raise UserError(
            f"{config.method}.length={method.virtual} takes from data.max_length={config.data.max_length}: no room is "
            f"left for a sample of two tokens; give a length of at most {config.data.max_length - 2}, or a larger "
            "data.max_length"
        )
    return method
