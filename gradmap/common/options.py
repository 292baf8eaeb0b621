"""What all options of the command line have in common."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import Any

from gradmap.common.errors import UserError

Command = Callable[..., Any]


def finite_numbers(command: Command) -> Command:
    """The command, which refuses `nan` and `inf`: both are numbers to whoever parses them, and pass
    every bound."""

    @wraps(command)
    def run(**options: Any) -> Any:
        for name, value in options.items():
            values = value if isinstance(value, list | tuple) else [value]
            if any(isinstance(one, float) and not math.isfinite(one) for one in values):
                raise UserError(f"--{name.replace('_', '-')} is no finite number; give one.")
        return command(**options)

    return run
