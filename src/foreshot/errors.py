"""The one exception that a user is meant to read."""


class ForeshotError(Exception):
    """Bad input: one sentence that names the file or key, what was expected and what was found.

    The command line prints it and ends with exit code 2.
    """
