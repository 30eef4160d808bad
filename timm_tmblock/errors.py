"""The error of bad input."""


class InputError(ValueError):
    """Input that cannot be used. The message is one sentence: what is wrong, and what to do.

    The command lines print it alone and exit with code 2.
    """
