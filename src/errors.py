"""The one exception for mistakes a person can mend: its message is the one line they read."""


class UserError(Exception):
    """Wrong input. The message says what is wrong, what was expected and how to mend it, in one line."""
