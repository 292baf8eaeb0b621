"""What is sent: prompts as token ids, so that dense and pruned get exactly the same work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from gradmap.common.files import write_json
from gradmap.common.reading import checked, read_json
from loadtest.loads import Load, arrival_times
from loadtest.prompts import Prompts


@dataclass(frozen=True)
class Request:
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
) -> list[Request]:
    """The requests of one load; with the same name the same ones, due at the same times."""
    due: Sequence[float | None] = (
        arrival_times(load, count, f"{seed} {name}") if load.is_open else [None] * count
    )
    return [
        Request(f"{name}-{index}", prompt.token_ids, prompt.output_tokens, due_s, cache_salt)
        for index, (prompt, due_s) in enumerate(zip(prompts.take(name, count), due, strict=True))
    ]


def save_requests(path: Path, requests: list[Request]) -> None:
    write_json(path, [asdict(request) for request in requests])


def load_requests(path: Path) -> list[Request]:
    """Raises UserError if they are none."""
    return checked(list[Request], read_json(path), path)
