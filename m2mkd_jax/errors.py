"""The one exception that means "the user's input is wrong"."""


class UserError(Exception):
    """Wrong input: its message is one line that says what is wrong, where, and what to do.

    `main` prints the message on stderr and exits with code 2.
    """
