"""The typed configuration of a run: schema.py says what there is, load.py reads it from YAML and the command line."""

from lowrank_dist.config.errors import ConfigError
from lowrank_dist.config.load import load_config
from lowrank_dist.config.schema import Config

__all__ = ["Config", "ConfigError", "load_config"]
