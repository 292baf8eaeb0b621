"""The `gradmap` command. Its subcommands come from the entry-point group `gradmap.commands`."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from importlib.metadata import entry_points

import typer
from typer.exceptions import TyperException

from gradmap.console import say
from gradmap.errors import UserError
from gradmap.options import finite_numbers
from gradmap.quoting import visible

EXIT_USAGE = 2
EXIT_BUG = 70  # EX_SOFTWARE: never to be mistaken for a gate's verdict
EXIT_INTERRUPTED = 130


def build_app() -> typer.Typer:
    """Assembles the subcommands that the installed packages register."""
    app = typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        help="Prune layers of a causal language model, export, evaluate, serve and load-test the result.",
    )
    for entry_point in sorted(entry_points(group="gradmap.commands"), key=lambda point: point.name):
        app.command(entry_point.name)(finite_numbers(entry_point.load()))
    return app


def run_app(app: typer.Typer) -> int:
    """Runs a typer app and turns what went wrong into one sentence and an exit code."""
    try:
        code = app(standalone_mode=False)
        return code if isinstance(code, int) else 0
    except (UserError, TyperException) as error:
        message = error.format_message() if isinstance(error, TyperException) else error
        print(f"Error: {visible(str(message))}", file=sys.stderr)  # whichever of several processes it happens in
        return EXIT_USAGE
    except KeyboardInterrupt:  # not typer.Abort, which an EOFError of any file becomes
        say("Interrupted.")
        return EXIT_INTERRUPTED
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS):
            say(f"Error: {error.filename or 'the output'} cannot be written: {os.strerror(error.errno)}.")
            return EXIT_USAGE
        traceback.print_exc()
        return EXIT_BUG
    except Exception:
        traceback.print_exc()
        return EXIT_BUG


def quiet_libraries() -> None:
    """Keeps the libraries' own progress bars and chatter out of ours."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")


def main() -> None:
    """Console script `gradmap`."""
    quiet_libraries()
    sys.exit(run_app(build_app()))
