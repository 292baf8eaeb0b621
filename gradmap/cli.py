"""The `gradmap` command. Its subcommands come from the entry-point group `gradmap.commands`."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points

import typer
from typer.exceptions import TyperException

from gradmap.common.console import say
from gradmap.common.errors import (
    EXIT_BUG,
    EXIT_INTERRUPTED,
    EXIT_TERMINATED,
    OutOfMemoryError,
    UserError,
)
from gradmap.common.failures import count_oom_kills, explain, explain_kills
from gradmap.common.options import finite_numbers
from gradmap.common.quoting import visible
from gradmap.common.signals import raising_signals


def build_app(arguments: Sequence[str] = ()) -> typer.Typer:
    """Assembles the subcommands that the installed packages register.

    arguments: of the command line. Where these name a subcommand, it alone is imported.
    """
    app = typer.Typer(
        no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, callback=_about
    )
    commands = {entry.name: entry for entry in entry_points(group="gradmap.commands")}
    asked = arguments[0] if arguments else ""
    for name in [asked] if asked in commands else sorted(commands):
        app.command(name)(finite_numbers(commands[name].load()))
    return app


def _about() -> None:
    """Prune layers of a causal language model, export, evaluate, serve and load-test the result."""


def run_app(app: Callable[..., object]) -> int:
    """Runs a typer app, in the main thread, and turns what went wrong into one sentence and an exit
    code."""
    with raising_signals() as received:
        try:
            code = _run(app)
        except KeyboardInterrupt:
            code = EXIT_INTERRUPTED
    if not received:
        return code
    ended = received[0] == signal.SIGTERM  # typer may have made another exit code of it
    say("Ended by SIGTERM." if ended else "Interrupted.")
    return EXIT_TERMINATED if ended else EXIT_INTERRUPTED


def _run(app: Callable[..., object]) -> int:
    kills_before = count_oom_kills()
    try:
        code = app(standalone_mode=False)
        return code if isinstance(code, int) else 0
    except TyperException as error:
        return _refuse(UserError(error.format_message()))
    except OutOfMemoryError as error:
        return _refuse(error)
    except UserError as error:
        return _refuse(explain_kills(error, kills_before) or error)
    except typer.Abort as error:
        # of any file: typer takes it for the end of what a user types
        if not isinstance(error.__context__, EOFError):
            return EXIT_INTERRUPTED
        traceback.print_exc()
        return EXIT_BUG
    except Exception as error:
        if (explained := explain(error) or explain_kills(error, kills_before)) is not None:
            return _refuse(explained)
        traceback.print_exc()
        return EXIT_BUG


def _refuse(error: UserError) -> int:
    # whichever of several processes it happens in
    print(f"Error: {visible(str(error))}", file=sys.stderr)
    return error.exit_code


def quiet_libraries() -> None:
    """Keeps the libraries' own progress bars and chatter out of ours."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")


def main() -> None:
    """Console script `gradmap`."""
    quiet_libraries()
    sys.exit(run_app(build_app(sys.argv[1:])))
