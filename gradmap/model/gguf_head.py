"""Whether a GGUF file's head is a matrix of its own, or the embeddings stored a second time.

Some converters write `output.weight` for models whose head is the embeddings, quantised apart from
them (Qwen2.5).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# GGML types that round a block of values to levels of even distance: bits of a level, values of a
# block.
EVEN_LEVELS = {
    "Q2_K": (2, 16),
    "Q3_K": (3, 16),
    "Q4_0": (4, 32),
    "Q4_1": (4, 32),
    "Q4_K": (4, 32),
    "Q5_0": (5, 32),
    "Q5_1": (5, 32),
    "Q5_K": (5, 32),
    "Q6_K": (6, 16),
    "Q8_0": (8, 32),
}
# Half the distance to the next number, relative: what rounding to these changes at most.
FLOATS = {"F64": 2.0**-53, "F32": 2.0**-24, "BF16": 2.0**-8, "F16": 2.0**-11}


@dataclass(frozen=True)
class Stored:
    """A dequantised matrix (V, d) and the GGML type that it was stored in."""

    values: Tensor
    type_name: str


@dataclass(frozen=True)
class HeadVerdict:
    """How far the head is from the embeddings, and what rounding both explains; None if that is not
    known.

    Both are Frobenius norms, relative to that of the embeddings.
    """

    head_type: str
    embedding_type: str
    distance: float
    explained: float | None

    @property
    def tied(self) -> bool:
        """Whether they are one matrix, as far as the file can tell."""
        return self.explained is not None and self.distance <= self.explained

    def describe(self) -> str:
        stored = f"output.weight ({self.head_type}) and token_embd.weight ({self.embedding_type})"
        if self.explained is None:
            bound = "what their rounding explains is not known"
        else:
            bound = f"their rounding explains up to {self.explained:.2g}"
        conclusion = (
            "they are one matrix, and are tied"
            if self.tied
            else "the head stays a matrix of its own"
        )
        return (
            f"{stored} differ by {self.distance:.2g} (relative Frobenius norm), where {bound}: "
            f"{conclusion}."
        )


def judge_head(head: Stored, embeddings: Stored) -> HeadVerdict:
    """Compares them by value: a GGUF file has no setting that says whether they are tied.

    If both are one matrix R, then |H - E| <= |H - R| + |E - R|, the two rounding errors. A head
    that was trained apart is much farther away; one that is nearer than rounding can show loses
    nothing when it is tied.
    """
    norm = float(embeddings.values.norm())
    distance = 0.0 if norm == 0 else float((head.values - embeddings.values).norm()) / norm
    errors = (rounding_error(head), rounding_error(embeddings))
    known = [error for error in errors if error is not None]
    explained = sum(known) / norm if len(known) == len(errors) and norm > 0 else None
    return HeadVerdict(head.type_name, embeddings.type_name, distance, explained)


def rounding_error(stored: Stored) -> float | None:
    """What rounding to the type changed a matrix by at most (Frobenius norm); None for a type with
    uneven levels.

    2^b levels of a block lie between -a and a, where a is its largest value, so that they are at
    most 2 a / (2^b - 1) apart, and a value is at most half of that from its level. Most are nearer
    (the root mean square of even errors is 0.58 of the largest), which leaves room for the few
    values that some types clip.
    """
    values = stored.values
    if stored.type_name in FLOATS:
        return FLOATS[stored.type_name] * float(values.norm())
    if (
        stored.type_name not in EVEN_LEVELS
        or values.numel() % EVEN_LEVELS[stored.type_name][1] != 0
    ):
        return None
    bits, block = EVEN_LEVELS[stored.type_name]
    largest = values.reshape(-1, block).abs().amax(1)
    furthest = largest / (2**bits - 1)
    return float(block**0.5 * torch.linalg.vector_norm(furthest))


def finer_of(head: Stored, embeddings: Stored) -> Stored:
    """The one of them that rounding changed less, where that is known; else the embeddings."""
    errors = (rounding_error(head), rounding_error(embeddings))
    if errors[0] is None or errors[1] is None:
        return embeddings
    return head if errors[0] < errors[1] else embeddings
