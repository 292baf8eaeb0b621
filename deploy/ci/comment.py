"""Writes a run's summary as a comment on the pull or merge request, over that of an earlier run: comment.py SUMMARY

The first line of the summary tells its comment from all others. The token comes from GRADMAP_COMMENT_TOKEN.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

PER_PAGE = 100


@dataclass(frozen=True)
class Forge:
    """comments: the URL of a request's comments; comment: the one below which each is found by its id."""

    comments: str
    comment: str
    update: str
    authorization: dict[str, str]

    def call(self, method: str, url: str, body: str | None = None) -> Any:
        data = None if body is None else json.dumps({"body": body}).encode()
        headers = {"Content-Type": "application/json", **self.authorization}
        with urlopen(Request(url, data, headers, method=method), timeout=60) as answer:
            return json.load(answer)


def github(environment: Mapping[str, str]) -> Forge:
    issues = f"{environment['GITHUB_API_URL']}/repos/{environment['GITHUB_REPOSITORY']}/issues"
    comments = f"{issues}/{environment['PULL_REQUEST']}/comments"
    token = environment["GRADMAP_COMMENT_TOKEN"]
    return Forge(comments, f"{issues}/comments", "PATCH", {"Authorization": f"Bearer {token}"})


def gitlab(environment: Mapping[str, str]) -> Forge:
    project = f"{environment['CI_API_V4_URL']}/projects/{environment['CI_PROJECT_ID']}"
    notes = f"{project}/merge_requests/{environment['CI_MERGE_REQUEST_IID']}/notes"
    return Forge(notes, notes, "PUT", {"PRIVATE-TOKEN": environment["GRADMAP_COMMENT_TOKEN"]})


def find_comment(forge: Forge, marker: str) -> int | None:
    """The id of the comment that starts with `marker`."""
    for page in count(1):
        comments = forge.call("GET", f"{forge.comments}?per_page={PER_PAGE}&page={page}")
        for comment in comments:
            if comment["body"].startswith(marker):
                return int(comment["id"])
        if len(comments) < PER_PAGE:
            break
    return None


def write_comment(forge: Forge, summary: str) -> None:
    earlier = find_comment(forge, marker=summary.partition("\n")[0])
    if earlier is None:
        forge.call("POST", forge.comments, summary)
    else:
        forge.call(forge.update, f"{forge.comment}/{earlier}", summary)


if __name__ == "__main__":
    try:
        write_comment((github if "GITHUB_ACTIONS" in os.environ else gitlab)(os.environ), Path(sys.argv[1]).read_text())
    except OSError as error:  # of urllib too
        sys.exit(f"The comment could not be written: {error}")
