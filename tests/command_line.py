"""Runs `gradmap` for tests: in this process, which spares the imports of torch and transformers, 10
s a command."""

import contextlib
import io
from dataclasses import dataclass
from functools import partial

from gradmap.cli import build_app, run_app


@dataclass(frozen=True)
class Finished:
    returncode: int
    stdout: str
    stderr: str


def gradmap(*arguments):
    """What a user gets: exit code and output. Tests of fresh, killed or several processes start
    their own."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        code = run_app(partial(build_app(), args=[str(argument) for argument in arguments]))
    return Finished(code, stdout.getvalue(), stderr.getvalue())
