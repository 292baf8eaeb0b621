"""Nothing is reported as exported before a fresh process has loaded it and its logits were
compared."""

from __future__ import annotations

import math
import os
import re
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from export.comparison import Bounds, LogitComparison
from export.formats.format import Runner
from export.reference import Reference
from export.tolerance import SWAP_FACTOR
from gradmap.common.children import ending_children, run_captured
from gradmap.common.errors import UserError
from gradmap.common.failures import require_not_killed
from gradmap.common.machine import available_bytes
from gradmap.common.raised import reasons_below
from gradmap.model.layerwise import sample_divergences, sample_losses

# How Python ends a traceback: the exception's name, with its modules, at the beginning of a line.
RAISED = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Interrupt|Exit)(:|$)")
# What a runtime takes besides the weights (vLLM with its cache the most), and the weights as it
# holds them at most, over what they take as stored: eight bits widened to 32.
LARGEST_RUNTIME_BYTES = 4e9
WIDENED = 4


@dataclass(frozen=True)
class Outcome:
    """What a runtime computed (see export.runners): logits (B, T, V) and, through the cache, (B,
    V); or where it hides them, log-probabilities of some tokens (B, T', k), and of the text's own
    from the second on (B, T'). greedy_ids: (G,)."""

    runtime: str
    greedy_ids: Tensor
    logits: Tensor | None = None
    cached_logits: Tensor | None = None
    logprob_ids: Tensor | None = None
    logprobs: Tensor | None = None
    text_logprobs: Tensor | None = None


def run_artifact_in_each(
    runners: Sequence[Runner], directory: Path, reference: Reference, weight_bytes: int
) -> list[Outcome]:
    """`run_artifact` in each runner: at once if memory has room for all, since most of
    their time goes into imports."""
    needed = len(runners) * (LARGEST_RUNTIME_BYTES + WIDENED * weight_bytes)
    together = len(runners) if needed <= available_bytes() else 1
    with ThreadPoolExecutor(together) as pool, ending_children():
        return list(pool.map(lambda runner: run_artifact(runner, directory, reference), runners))


def run_artifact(runner: Runner, directory: Path, reference: Reference) -> Outcome:
    """Runs an artifact in a fresh process. Raises UserError with its last line if it fails."""
    tensors = {
        "input_ids": reference.input_ids.contiguous(),
        "greedy_tokens": torch.tensor(len(reference.greedy_ids)),
    }
    with tempfile.TemporaryDirectory() as temporary:
        probe, out = Path(temporary, "probe.safetensors"), Path(temporary, "outcome.safetensors")
        save_file(tensors, probe)
        command = runner.command(str(directory.resolve()), str(probe), str(out))
        run_child(command, f"The exported model does not run ({runner.name})")
        with safe_open(out, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not iterable
            return Outcome(file.metadata()["runtime"], **found)


def run_child(command: list[str], problem: str) -> None:
    """Runs a program in a fresh process, offline; raises UserError(problem: what it said last) if
    it fails.

    OutOfMemoryError if it was killed, as the system does where memory runs out.
    """
    finished = run_captured(command, os.environ | {"HF_HUB_OFFLINE": "1"})
    require_not_killed(finished.returncode, f"{problem}: it")
    if finished.returncode != 0:
        raise UserError(f"{problem}: {_find_reason(finished.stderr)}")


def _find_reason(stderr: str) -> str:
    lines = [line.rstrip() for line in stderr.splitlines() if line.strip()] or ["no message"]
    # the last line of a traceback, which a message of several lines may follow
    raised = [number for number, line in enumerate(lines) if RAISED.match(line)]
    errors = [number for number, line in enumerate(lines) if "Error: " in line]
    last = (raised or errors or [len(lines) - 1])[-1]
    message = lines[last].strip()
    return ": ".join([message, *reasons_below(message, lines[last + 1 :])])


def compare(reference: Reference, outcome: Outcome, bounds: Bounds) -> LogitComparison:
    """Measures the distance of an outcome from the reference; `require_faithful` judges it."""
    difference, best = _differences(reference, outcome)
    compared = best.shape[1]
    identical, margin = _compare_greedy(reference, outcome.greedy_ids)
    return LogitComparison(
        runtime=outcome.runtime,
        relative_difference=_typical(difference, stray_share=0.0) / reference.scale,
        typical_difference=_typical(difference, bounds.stray_share) / reference.scale,
        cached_difference=_cached_difference(reference, outcome, bounds.stray_share),
        max_absolute_difference=difference.abs().max().item(),
        argmax_agreement=(best == reference.best_ids[:, :compared]).double().mean().item(),
        positions=best.numel(),
        greedy_tokens=len(outcome.greedy_ids),
        greedy_identical=identical,
        greedy_margin=margin,
        worst=_describe_worst(difference),
        divergence=_divergence(reference, outcome),
        perplexity_ratio=_perplexity_ratio(reference, outcome),
        **asdict(bounds),
    )


def require_faithful(comparison: LogitComparison) -> None:
    """Raises UserError that says what differs, if the comparison is outside its bounds."""
    problem = find_problem(comparison)
    if problem is not None:
        raise UserError(f"In {comparison.runtime}, {problem}; nothing was written.")


def find_problem(comparison: LogitComparison) -> str | None:
    """Says in words why an artifact is not faithful; None if it is."""
    lost = _find_loss(comparison)
    if lost is not None or comparison.tolerance is None:
        return lost
    return _find_difference(comparison, comparison.tolerance)


def _find_loss(comparison: LogitComparison) -> str | None:
    """Says what quantisation lost more of than it may."""
    where = f"(logits differ most at {comparison.worst}); quantise less or"
    floor, agreement = comparison.min_agreement, comparison.argmax_agreement
    if floor is not None and not agreement >= floor:  # not: a NaN must fail
        error = math.sqrt(agreement * (1 - agreement) / comparison.positions)
        return (
            f"the quantised model's most likely token is the reference's at {agreement:.1%} "
            f"(± {error:.1%}) of {comparison.positions} positions, where {floor:.1%} are asked for "
            f"{where} lower --min-agreement"
        )
    if _exceeds(comparison.divergence, comparison.max_divergence):
        return (
            f"the quantised model's next-token distributions diverge by "
            f"{comparison.divergence:.3f} nats per token from the reference's, where "
            f"{comparison.max_divergence:g} are allowed {where} raise --max-divergence"
        )
    if _exceeds(comparison.perplexity_ratio, comparison.max_perplexity_ratio):
        return (
            f"the quantised model's perplexity is {comparison.perplexity_ratio:.3f} times the "
            f"reference's, where {comparison.max_perplexity_ratio:g} times are allowed {where} "
            "raise --max-perplexity-ratio"
        )
    return None


def _exceeds(found: float | None, allowed: float | None) -> bool:
    """Whether both are known, and it does; a NaN does."""
    return found is not None and allowed is not None and not found <= allowed


def _find_difference(comparison: LogitComparison, tolerance: float) -> str | None:
    """Says what differs by more than rounding explains."""
    differences = {
        "": comparison.typical_difference,
        " through the KV cache": comparison.cached_difference,
    }
    for place, difference in differences.items():
        if difference is not None and not difference <= tolerance:  # not: a NaN must fail
            return _describe_difference(comparison, tolerance, place, difference)
    if comparison.greedy_margin is not None and comparison.greedy_margin > SWAP_FACTOR * tolerance:
        return (
            "the exported model generates another text from token "
            f"{comparison.greedy_identical + 1} on, where the reference's choice leads by "
            f"{comparison.greedy_margin:.2g} (relative), more than rounding explains"
        )
    return None


def _describe_difference(
    comparison: LogitComparison, tolerance: float, place: str, difference: float
) -> str:
    others = ""
    if comparison.stray_share:
        others = f", without the worst {comparison.stray_share:.0%} of positions"
    return (
        f"the exported model's logits{place} differ from the reference by {difference:.2g} "
        f"(relative{others}), where rounding explains {tolerance:.2g}; most at {comparison.worst}"
    )


def _differences(reference: Reference, outcome: Outcome) -> tuple[Tensor, Tensor]:
    """Differences at the compared tokens (B, T', k), and the outcome's most likely tokens (B,
    T')."""
    if outcome.logits is not None:
        difference = reference.at_known_tokens(outcome.logits) - reference.logits
        return difference, outcome.logits.argmax(-1)
    assert outcome.logprob_ids is not None and outcome.logprobs is not None
    assert reference.token_ids is None  # of a stored probe, no log-probabilities can be computed
    compared = outcome.logprobs.shape[1]
    expected = reference.logits[:, :compared].log_softmax(-1).gather(-1, outcome.logprob_ids)
    return outcome.logprobs - expected, outcome.logprob_ids[..., 0]


def _divergence(reference: Reference, outcome: Outcome) -> float | None:
    if outcome.logits is None or reference.token_ids is not None:
        return None
    return sample_divergences(outcome.logits, reference.logits).sum().item() / (
        reference.input_ids.numel()
    )


def _perplexity_ratio(reference: Reference, outcome: Outcome) -> float | None:
    """exp of the mean difference of the losses of the texts' tokens."""
    if reference.token_ids is not None:
        return None
    input_ids = reference.input_ids
    if outcome.logits is not None:
        lost = sample_losses(outcome.logits, input_ids).sum()
    elif outcome.text_logprobs is not None:
        lost = -outcome.text_logprobs.sum()
        input_ids = input_ids[:, : outcome.text_logprobs.shape[1] + 1]
    else:
        return None
    expected = sample_losses(reference.logits[:, : input_ids.shape[1]], input_ids).sum()
    return ((lost - expected) / input_ids[:, 1:].numel()).exp().item()


def _cached_difference(reference: Reference, outcome: Outcome, stray_share: float) -> float | None:
    """The typical difference of the last positions, relative; None if the runtime shows none."""
    if outcome.cached_logits is None:
        return None
    actual = reference.at_known_tokens(outcome.cached_logits[:, None])
    return _typical(actual - reference.logits[:, -1:], stray_share) / reference.scale


def _compare_greedy(reference: Reference, greedy_ids: Tensor) -> tuple[int, float | None]:
    same = greedy_ids == reference.greedy_ids[: len(greedy_ids)]
    identical = int(same.long().cumprod(0).sum())
    if identical == len(greedy_ids):
        return identical, None
    return identical, reference.greedy_margins[identical].item() / reference.scale


def _describe_worst(difference: Tensor) -> str:
    sample, position, _ = map(int, torch.unravel_index(difference.abs().argmax(), difference.shape))
    return f"sample {sample}, position {position}"


def _typical(difference: Tensor, stray_share: float) -> float:
    """Root mean square of differences (B, T, k) over all positions but the strays. NaN if any is
    not finite: what overflowed or is no number was not rounded."""
    squares = difference.double().square().mean(-1).flatten().sort().values
    if not squares.isfinite().all():
        return math.nan
    return float(squares[: len(squares) - _strays(len(squares), stray_share)].mean().sqrt())


def _strays(positions: int, share: float) -> int:
    """How many positions may differ by anything.

    At least one: the last positions of four samples, through the KV cache, are not spared either.
    Never all, so that something is compared; a broken cache would spoil every sample.
    """
    return 0 if share == 0 else min(max(1, int(share * positions)), positions - 1)
