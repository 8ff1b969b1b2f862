"""The one exception that a user's own input may raise."""


class AptError(ValueError):
    """Something the user gave cannot be used.

    The message is one sentence: what is wrong, with the name and value, and what would do.
    """
