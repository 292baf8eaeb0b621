"""The reason of an exception in what a program printed, where it does not stand in the exception's
own line."""

from __future__ import annotations

import re
from collections.abc import Sequence

# Of an exception that says no more than this, the reason stands in the next lines.
HEADING = re.compile(r"$|.*validation errors? for \w+$")
# With this pydantic ends a reason.
DETAILS = re.compile(r" \[type=\w+.*")
REASON_LINES = 6


def reasons_below(message: str, lines: Sequence[str]) -> list[str]:
    """The lines that follow an exception's message and belong to it: none if the message says what
    is wrong, else the next line that says something; of pydantic's (name of a field, what is wrong
    with it) all of them."""
    if not HEADING.match(message):
        return []
    told = [line.strip() for line in lines[:REASON_LINES] if line.strip()]
    end = next((number for number, line in enumerate(told) if DETAILS.search(line)), 0)
    return [DETAILS.sub("", line) for line in told[: end + 1]]
