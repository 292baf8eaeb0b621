"""What is sent: prompts as token ids, so that dense and pruned get exactly the same work."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from pathlib import Path

from gradmap.files import read_json, write_json


@dataclass(frozen=True)
class Request:
    """One completion to ask for: `output_tokens` new tokens, neither more nor fewer, greedily."""

    id: str
    prompt: tuple[int, ...]
    output_tokens: int


def random_requests(
    prefix: str, count: int, vocabulary: int, prompt_tokens: int, output_tokens: int, seed: int
) -> list[Request]:
    """Draws prompts of random token ids. `prefix` names them and, with `seed`, decides the draw.

    Prompts share no prefix, so that the server's prefix cache stays out of the measurement.
    """
    generator = random.Random(f"{seed} {prefix}")
    return [
        Request(f"{prefix}-{index}", tuple(generator.choices(range(vocabulary), k=prompt_tokens)), output_tokens)
        for index in range(count)
    ]


def save_requests(path: Path, requests: list[Request]) -> None:
    write_json(path, [asdict(request) for request in requests])


def load_requests(path: Path) -> list[Request]:
    return [Request(row["id"], tuple(row["prompt"]), row["output_tokens"]) for row in read_json(path)]
