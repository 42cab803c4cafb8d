"""The one error of this room. It is no UserError, because config/ imports nothing of ours."""


class ConfigError(ValueError):
    """All that is wrong with a config, a line each: where: section.key: what is wrong — the remedy."""
