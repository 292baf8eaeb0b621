"""What is sent: prompts as token ids, so that dense and pruned get exactly the same work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from gradmap.common.files import write_json
from gradmap.common.reading import checked, read_json
from loadtest.arrivals import arrival_times
from loadtest.loads import Load, OpenLoop
from loadtest.prompts import Prompts


@dataclass(frozen=True)
class CompletionRequest:
    """One completion to ask for: `output_tokens` new tokens, neither more nor fewer, greedily.

    due_s: when, in seconds from the beginning of an open loop; None in a closed one. cache_salt:
    vLLM's prefix cache answers only from requests of the same salt; None for those without one.
    """

    id: str
    prompt: tuple[int, ...]
    output_tokens: int
    due_s: float | None = None
    cache_salt: str | None = None


def draw_requests(
    prompts: Prompts, name: str, count: int, load: Load, seed: int, cache_salt: str | None = None
) -> list[CompletionRequest]:
    """The requests of one load; with the same name the same ones, due at the same times."""
    due: Sequence[float | None] = [None] * count
    if isinstance(load, OpenLoop):
        due = arrival_times(load.pattern, load.level, count, f"{seed} {name}")
    requests: list[CompletionRequest] = []
    for prompt, due_s in zip(prompts.take(name, count), due, strict=True):
        number = f"{name}-{len(requests)}"
        requests.append(
            CompletionRequest(number, prompt.token_ids, prompt.output_tokens, due_s, cache_salt)
        )
    return requests


def save_requests(path: Path, requests: list[CompletionRequest]) -> None:
    write_json(path, [asdict(request) for request in requests])


def load_requests(path: Path) -> list[CompletionRequest]:
    """Raises UserError if they are none."""
    return checked(list[CompletionRequest], read_json(path), path)
