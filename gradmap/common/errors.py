"""The exceptions that users see, the exit codes of what is no verdict, and what is quoted of
others."""

EXIT_USAGE = 2
# EX_SOFTWARE: never to be mistaken for a gate's verdict.
EXIT_BUG = 70
# EX_TEMPFAIL: another attempt may find more.
EXIT_OUT_OF_MEMORY = 75
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


class UserError(ValueError):
    """Wrong usage or input. The message is one sentence: what is wrong and how to cure it."""

    exit_code = EXIT_USAGE


class StageError(UserError):
    """A command of ours, as a stage of another, failed as its exit code says, with which the other
    one ends too."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class OutOfMemoryError(UserError):
    """Memory ran out, which need not happen another time or on another machine."""

    exit_code = EXIT_OUT_OF_MEMORY


def first_line(error: Exception) -> str:
    """What a library's error says first, for a sentence of ours; its name if it says nothing."""
    # Its text is the key alone.
    if isinstance(error, KeyError):
        return f"the key {error} is missing"
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
