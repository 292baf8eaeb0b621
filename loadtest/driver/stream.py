"""What a server streams: its events, what it says went wrong, and how many tokens came when. No
input or output.

Servers count tokens in three ways: in every event (`continuous_usage_stats`), by naming the tokens
of every event (`token_ids`, or `logprobs`), or only at the end. Of the last kind, the events tell
if each of them brought one token.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

# Of what a server says, so much is kept.
KEPT_CHARACTERS = 300
MOST_TOKENS = 1 << 32


class StreamError(ValueError):
    """What is wrong with a server's answer, in a sentence without its full stop."""


@dataclass(frozen=True)
class Chunk:
    """An event that may have brought tokens. tokens: how many, if that was said. text: whether it
    had some; last: whether it said that the answer ends."""

    arrived_s: float
    tokens: int | None
    text: bool
    last: bool


@dataclass
class Stream:
    """One answer while it arrives."""

    chunks: list[Chunk] = field(default_factory=list)
    counted: int | None = None

    def note(self, event: Any, now_s: float) -> None:
        """Raises StreamError if the event is an error, or counts in a way that cannot be."""
        if not isinstance(event, dict):
            raise StreamError(f"the server sent {shortened(json.dumps(event))} as an event")
        said = error_in(event)
        if said is not None:
            raise StreamError(f"the server said: {said}")
        counted_before = self.counted
        risen = self._risen(event.get("usage"))
        choice = _first_choice(event)
        if choice is not None:
            tokens = _named_tokens(choice) if risen is None else risen
            self.chunks.append(
                Chunk(now_s, tokens, bool(choice.get("text")), bool(choice.get("finish_reason")))
            )
        elif risen and counted_before is not None:  # otherwise it is the sum of what came before
            self.chunks.append(Chunk(now_s, risen, text=False, last=True))

    def arrivals(self) -> list[tuple[float, int]]:
        """Time and tokens so far of every chunk that brought some. Raises StreamError if nobody can
        know that."""
        told = self._told()
        if told is None:
            raise StreamError(
                f"{self.counted} tokens came in {len(self.chunks)} chunks, and the server does not "
                "say how many were in the first; it needs stream_options.continuous_usage_stats"
            )
        arrivals, so_far = [], 0
        for chunk, tokens in told:
            so_far += tokens
            if tokens:
                arrivals.append((chunk.arrived_s, so_far))
        if self.counted is not None and so_far != self.counted:
            raise StreamError(
                f"the chunks brought {so_far} tokens, and the server counted {self.counted}"
            )
        return arrivals

    def _told(self) -> list[tuple[Chunk, int]] | None:
        """Every chunk with its tokens; None if that is not known."""
        if all(chunk.tokens is not None for chunk in self.chunks):
            return [(chunk, chunk.tokens or 0) for chunk in self.chunks]
        # A token may decode to nothing; and the event that ends an answer may bring none.
        with_text = [chunk for chunk in self.chunks if chunk.text]
        open_ones = [chunk for chunk in self.chunks if chunk.text or not chunk.last]
        for bringing in (with_text, open_ones, self.chunks):
            if len(bringing) == self.counted:
                return [(chunk, 1) for chunk in bringing]
        if self.counted is None:
            raise StreamError(
                "the server does not count its tokens; it needs stream_options.include_usage"
            )
        return None

    def _risen(self, usage: Any) -> int | None:
        """By how much this event's count is above the last one; None if it has none."""
        count = usage.get("completion_tokens") if isinstance(usage, dict) else None
        if count is None:
            return None
        whole = whole_number(count)
        if whole is None:
            raise StreamError(
                f"the server counts {shortened(json.dumps(count))} tokens, which is no count"
            )
        before, self.counted = self.counted or 0, whole
        if whole < before:
            raise StreamError(f"the server counted {whole} tokens after {before}")
        return whole - before


def whole_number(value: Any) -> int | None:
    """A count as JSON may have it, 4 or 4.0; None if it is none."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not 0 <= value <= MOST_TOKENS
    ):
        return None
    return int(value) if value == int(value) else None


def _first_choice(event: dict[str, Any]) -> dict[str, Any] | None:
    choices = event.get("choices")
    return (
        choices[0]
        if isinstance(choices, list) and choices and isinstance(choices[0], dict)
        else None
    )


def _named_tokens(choice: dict[str, Any]) -> int | None:
    """How many tokens a chunk names, one by one; None if it names none."""
    logprobs = choice.get("logprobs")
    for named in (
        choice.get("token_ids"),
        logprobs.get("tokens") if isinstance(logprobs, dict) else None,
    ):
        if isinstance(named, list):
            return len(named)
    return None


def error_in(event: Any) -> str | None:
    """The message of an error as OpenAI, vLLM or FastAPI write it; None if there is none."""
    if not isinstance(event, dict):
        return None
    said = (
        event.get("error")
        or (event if event.get("object") == "error" else None)
        or event.get("detail")
    )
    if isinstance(said, dict):
        said = said.get("message") or said
    return None if not said else shortened(said if isinstance(said, str) else json.dumps(said))


def shortened(text: str) -> str:
    """The beginning of what a server said, on one line, without control characters and halves of
    characters."""
    seen = "".join(
        character if character.isprintable() else " " for character in text[: 2 * KEPT_CHARACTERS]
    )
    return " ".join(seen.split())[:KEPT_CHARACTERS]


def server_sent_events(read_line: Callable[[], bytes]) -> Iterator[str]:
    """The data of each event as it arrives (HTML standard, 9.2.6): an empty line ends one, and its
    lines of data are joined. read_line: b"" at the end."""
    data: list[str] = []
    while line := read_line():
        text = line.decode(errors="replace").rstrip("\r\n")
        name, _, value = text.partition(":")
        if name == "data":
            data.append(value.removeprefix(" "))
        elif not text and data:
            yield "\n".join(data)
            data = []
    if data:
        yield "\n".join(data)
