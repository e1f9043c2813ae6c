"""Errors that a user can fix."""


class InputError(ValueError):
    """Input that cannot be used at all.

    The message names the file, the column, the row's key where there is one, and the remedy.
    """
