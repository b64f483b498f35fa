"""The exception for mistakes of the user, reported in one line."""


class BadInput(ValueError):
    """The request cannot be carried out as given. The message is one line that says what to change.

    The command line prints it and exits with code 2; nothing has been written when it is raised.
    """
