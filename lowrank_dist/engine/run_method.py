"""The method of a run, built from its config.

Imports no DeepSpeed: `doctor` and `data` build a method on machines where it may be broken.
"""

from __future__ import annotations

from lowrank_dist.arch.architecture import Architecture
from lowrank_dist.arch.config_json import read_architecture
from lowrank_dist.config import Config
from lowrank_dist.errors import UserError
from lowrank_dist.methods.method import Method, Setting
from lowrank_dist.methods.registry import method_package


def build_method(config: Config, architecture: Architecture) -> Method:
    """Return the method that config.method names, for this model.

    Raises UserError for a method other than LoRA on a model of images and text, and as `MethodBuilder.build` does.
    """
    package = method_package(config.method)
    if architecture.reads_images and not package.with_images:
        raise UserError(
            f"method: {config.method} is not supported for a {architecture.family}, a model of images and text; use "
            "lora, or give a model of text alone"
        )
    setting = Setting(config.method, config.model.path, config.train.seed, config.data.max_length, config.engine.lanes)
    return package.builder.build(config.own_section, setting, architecture)


def completed_method(config: Config) -> tuple[Method, Architecture]:
    """Return the method of a run that has not started, and its model's architecture.

    The section is completed from the adapter that training starts from. Raises UserError as the start of the run would.
    """
    path = config.model.path
    architecture = read_architecture(path)
    section = method_package(config.method).files.complete(config.own_section, path)
    return build_method(config.with_own_section(section), architecture), architecture
