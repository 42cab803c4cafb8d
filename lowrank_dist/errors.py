class UserError(ValueError):
    """What the user gave is wrong; the message says what, where, and the remedy."""


class DiskError(UserError):
    """The disk refused (no space, no permission, …): what was to be written is not there, what was there still is."""


class ElsewhereError(UserError):
    """Another rank failed, and its own message says why."""
