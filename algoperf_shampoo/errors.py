"""The one exception type for mistakes a user can mend."""


class UserError(Exception):
    """Bad input. The message is one line: where, which key, the bad value, what would be right.

    Scripts print it after ``error:`` and exit with code 2; nothing has been written by then.
    """
