"""Writes a run's summary as a comment on the pull or merge request, over its own of an earlier run.

    comment.py RECIPE SUMMARY

The token comes from GRADMAP_COMMENT_TOKEN: on GitHub that of the job, on GitLab that of any user.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import quote
from urllib.request import Request, urlopen

PER_PAGE = 100
GITHUB_USER = "github-actions[bot]"  # as whom a job's token writes


@dataclass(frozen=True)
class Forge:
    """How comments are read and written at a forge. comments: the URL of a request's comments;
    comment: the one below which each is found by its id.

    is_own: whether the token's user wrote a comment; anybody may start one like ours.
    """

    comments: str
    comment: str
    update: str
    authorization: dict[str, str]
    is_own: Callable[[Any], bool]

    def call(self, method: str, url: str, body: str | None = None) -> Any:
        return call(self.authorization, method, url, body)


def call(authorization: Mapping[str, str], method: str, url: str, body: str | None = None) -> Any:
    data = None if body is None else json.dumps({"body": body}).encode()
    headers = {"Content-Type": "application/json", **authorization}
    with urlopen(Request(url, data, headers, method=method), timeout=60) as answer:
        return json.load(answer)


def github(environment: Mapping[str, str]) -> Forge:
    issues = f"{environment['GITHUB_API_URL']}/repos/{environment['GITHUB_REPOSITORY']}/issues"
    return Forge(
        comments=f"{issues}/{environment['PULL_REQUEST']}/comments",
        comment=f"{issues}/comments",
        update="PATCH",
        authorization={"Authorization": f"Bearer {environment['GRADMAP_COMMENT_TOKEN']}"},
        # none: a deleted account
        is_own=lambda comment: (comment["user"] or {}).get("login") == GITHUB_USER,
    )


def gitlab(environment: Mapping[str, str]) -> Forge:
    api = environment["CI_API_V4_URL"]
    project, request = environment["CI_PROJECT_ID"], environment["CI_MERGE_REQUEST_IID"]
    notes = f"{api}/projects/{project}/merge_requests/{request}/notes"
    authorization = {"PRIVATE-TOKEN": environment["GRADMAP_COMMENT_TOKEN"]}
    user = call(authorization, "GET", f"{api}/user")["id"]
    return Forge(
        notes, notes, "PUT", authorization, is_own=lambda note: note["author"]["id"] == user
    )


def marker(recipe: str) -> str:
    """The first line of a recipe's comment, an HTML comment that no name can end."""
    return f"<!-- gradmap {quote(os.fsencode(recipe), safe='/ ')} -->"


def find_comment(forge: Forge, first_line: str) -> int | None:
    """The id of the comment of ours that starts with it."""
    for page in count(1):
        comments = forge.call("GET", f"{forge.comments}?per_page={PER_PAGE}&page={page}")
        for comment in comments:
            if comment["body"].startswith(first_line) and forge.is_own(comment):
                return int(comment["id"])
        if len(comments) < PER_PAGE:
            break
    return None


def write_comment(forge: Forge, recipe: str, summary: str) -> None:
    first_line = marker(recipe)
    body = f"{first_line}\n{summary}"
    earlier = find_comment(forge, first_line)
    if earlier is None:
        forge.call("POST", forge.comments, body)
    else:
        forge.call(forge.update, f"{forge.comment}/{earlier}", body)


if __name__ == "__main__":
    try:
        forge = (github if "GITHUB_ACTIONS" in os.environ else gitlab)(os.environ)
        write_comment(forge, sys.argv[1], Path(sys.argv[2]).read_text(encoding="utf-8"))
    except OSError as error:  # of urllib too
        sys.exit(f"The comment could not be written: {error}")
