class UserError(ValueError):
    """What the user gave is wrong; the message says what, where, and the remedy."""
