"""The one exception that users see."""


class UserError(ValueError):
    """Wrong usage or input. The message is one sentence: what is wrong and how to cure it. Exit code 2."""
