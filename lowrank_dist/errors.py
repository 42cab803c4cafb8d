"""The errors whose message is for the user, who sees it without a traceback. Imports nothing."""


class UserError(ValueError):
    """A mistake in what the user gave; the message says what, where, and the remedy."""


class ConfigError(UserError):
    """Everything that is wrong with a configuration, a line each: where: section.key: what is wrong — the remedy."""


class DiskError(UserError):
    """A refusal of the disk (no space, no permission, …): nothing new was written, and what was there still is."""


class ElsewhereError(UserError):
    """The failure of another rank, whose own message says why."""
