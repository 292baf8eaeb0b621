"""What is sent: prompts as token ids, so that dense and pruned get exactly the same work."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from gradmap.files import read_json, write_json
from loadtest.loads import Load, arrival_times


@dataclass(frozen=True)
class Request:
    """One completion to ask for: `output_tokens` new tokens, neither more nor fewer, greedily.

    due_s: when, in seconds from the beginning of an open loop; None in a closed one.
    """

    id: str
    prompt: tuple[int, ...]
    output_tokens: int
    due_s: float | None = None


def random_requests(
    prefix: str, count: int, vocabulary: int, prompt_tokens: int, output_tokens: int, seed: int, load: Load
) -> list[Request]:
    """Draws prompts of random token ids. `prefix` names them and, with `seed`, decides the draw.

    Prompts share no prefix, so that the server's prefix cache stays out of the measurement.
    """
    generator = random.Random(f"{seed} {prefix}")
    due: Sequence[float | None] = arrival_times(load, count, f"{seed} {prefix}") if load.is_open else [None] * count
    return [
        Request(f"{prefix}-{index}", tuple(generator.choices(range(vocabulary), k=prompt_tokens)), output_tokens, due_s)
        for index, due_s in enumerate(due)
    ]


def save_requests(path: Path, requests: list[Request]) -> None:
    write_json(path, [asdict(request) for request in requests])


def load_requests(path: Path) -> list[Request]:
    return [Request(**{**row, "prompt": tuple(row["prompt"])}) for row in read_json(path)]
