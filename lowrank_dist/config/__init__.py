"""The typed configuration of a run: schema.py assembles the sections, load.py reads YAML and the command line."""

from lowrank_dist.config.load import HELP, config_of, load_config, read_arguments
from lowrank_dist.config.schema import Config

__all__ = ["HELP", "Config", "config_of", "load_config", "read_arguments"]
