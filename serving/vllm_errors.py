"""Why vLLM ended, found in what it printed last."""

from __future__ import annotations

import re
from collections.abc import Sequence

from gradmap.common.raised import reasons_below

COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# In front of each line that vLLM logs: process, level, time and file; of one that it prints, the
# process at most.
PREFIX = re.compile(r"^(?:\(\w+ pid=\d+\) ?)?(?:(?:ERROR|WARNING) [^\]]*\] ?)?")
# An exception, what argparse says, or that the engine is gone.
ERROR = re.compile(
    r"[\w.]*?(?P<name>\b\w*(?:Error|Exception))(?:: *(?P<reason>.*))?$"
    r"|\S+ serve: error: (?P<usage>.+)"
    r"|.*(?P<gone>engine core exited unexpectedly)"
)
# Follows from another error, which stands above it.
CONSEQUENCES = (
    "Engine core initialization failed",
    "EngineDeadError",
    "WorkerProc initialization failed",
)


def plain(line: str) -> str:
    """The line without colours."""
    return COLOUR.sub("", line)


def find_error(lines: Sequence[str]) -> str | None:
    """The first error that is no consequence of another, in one line; None if there is none."""
    said = [PREFIX.sub("", plain(line), count=1) for line in lines]
    found = []
    for number, line in enumerate(said):
        match = ERROR.match(line)
        if match:
            found.append(_describe(match, said[number + 1 :]))
    causes = [text for text in found if not _is_consequence(text)]
    return next(iter(causes or found), None)


def _is_consequence(text: str) -> bool:
    return any(sign in text for sign in CONSEQUENCES)


def _describe(match: re.Match[str], after: Sequence[str]) -> str:
    if match["name"] is None:
        return match["usage"] or match["gone"]
    parts = [match["name"], match["reason"] or ""]
    if match["reason"] is not None:
        parts += reasons_below(match["reason"], after)
    return ": ".join(filter(None, parts))
