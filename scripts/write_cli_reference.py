"""Writes the reference of the command line, as the commands themselves describe it: docs/cli.md."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer

from gradmap.cli import build_app

HEAD = """\
# Command line

Every command and option, as `--help` says it; `scripts/write_cli_reference.py` writes this page.
`gradmap-serve` is a program of its own, with the options of `gradmap serve`. How the commands
belong together is in the [tutorial](tutorial.md); in a recipe, options are keys, with underscores.

With `--json`, the last line of stdout is one JSON object; messages and progress go to stderr.
Exit codes:

| code | meaning |
|---:|---|
| 0 | done, or PASS |
| 1 | FAIL |
| 2 | wrong usage or input; one sentence says what to change |
| 3 | INCONCLUSIVE |
| 4 | INVALID |
| 70 | a bug |
| 75 | memory ran out |
| 130, 143 | interrupted; ended by SIGTERM: every process that was started ends too |
"""
TABLE = "| option | what it says | default, limits |\n|---|---|---|\n"


def make_reference() -> str:
    """The page's text."""
    commands: dict[str, Any] = typer.main.get_command(build_app()).commands  # type: ignore[attr-defined]
    return HEAD + "".join(_section(name, command) for name, command in commands.items())


def _section(name: str, command: Any) -> str:
    context = command.context_class(command, info_name=name)
    records = [parameter.get_help_record(context) for parameter in command.params]
    rows = [_row(*record) for record in records if record is not None]  # None: a hidden one
    return f"\n## gradmap {name}\n\n{command.help.strip()}\n\n{TABLE}{''.join(rows)}"


def _row(declaration: str, text: str) -> str:
    """A row of the table of options. text: the help, then in brackets the default and what the
    value may be."""
    help_text, _, extra = text.partition("  [")
    cells = (f"`{declaration}`", help_text, extra.removesuffix("]"))
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(make_reference())
