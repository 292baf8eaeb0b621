r"""What the race between removals saves, and how often it ends with another layer than all samples
would choose.

    python -m benchmarks.racing --model DIR [--gguf-file NAME] --calibration SPEC \
        [--seed 42 --seed 43 --seed 44]

For each seed of the calibration the first rounds of `--selector repair` are measured without a
race: every layer on all samples. Then the race itself, `gradmap.methods.racing`, runs over what
was measured, with the samples in many random orders. What it found a layer to cost is known in the
next round, as in a real run. A round has the share of all measurements that the race made; how
often another layer won, and what that one costs more; and how often the best layer was not tried,
for it had cost too much.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from gradmap.cli import quiet_libraries
from gradmap.common.console import print_table, progress
from gradmap.common.environment import describe_environment
from gradmap.common.files import write_json
from gradmap.data.calibration import build_calibration
from gradmap.methods.racing import CLEARLY, MAY_FALL, Race, laps
from gradmap.methods.repair import RepairScorer
from gradmap.methods.selection import Subject
from gradmap.model.checkpoint import open_checkpoint
from gradmap.model.layered import LayeredModel
from gradmap.model.loading import load_model, load_tokenizer
from gradmap.model.precision import computing_in
from gradmap.model.sublayers import Pair

LAP = 4  # samples, as many as a CPU takes at once


@dataclass(frozen=True)
class Round:
    """What a round without a race measured. base: divergence before the removal, nats per token.
    measured: of each layer that may go, of every sample, (n,) float64. untried: these layers, those
    first that are tried first in a round without bounds."""

    base: float
    measured: Mapping[Pair, Tensor]
    untried: Sequence[Pair]

    @property
    def best(self) -> Pair:
        return min(self.measured, key=lambda layer: float(self.measured[layer].mean()))

    def with_samples(self, order: Tensor) -> Round:
        return Round(
            self.base,
            {layer: losses[order] for layer, losses in self.measured.items()},
            self.untried,
        )


@dataclass(frozen=True)
class Outcome:
    """How a race ended. share: of all measurements, that the race made. excess: how much more the
    layer costs with which it ended, nats per token; errors: the same in standard errors of such a
    difference. untried: the best layer was not measured."""

    share: float
    excess: float
    errors: float
    untried: bool


@torch.no_grad()
def measure_rounds(subject: Subject, rounds: int) -> list[Round]:
    """The first rounds of `--selector repair` where no layer is given up, each without the layers
    that were best before."""
    scorer = RepairScorer(subject)
    layers = len(subject.layers) - 1  # the first one stays
    found: list[Round] = []
    with progress("Measuring layers", sum(layers - gone for gone in range(rounds))) as advance:
        for _ in range(rounds):
            influences = scorer._influences()
            may_go = subject.candidates(scorer._removed)[1:]
            untried = sorted(may_go, key=influences.__getitem__)
            measured = {}
            for layer in untried:
                measured[layer] = scorer._try(layer, Race(len(scorer._measure_ids))).divergences
                advance(1)
            found.append(Round(float(scorer._divergences.mean()), measured, untried))
            scorer._adopt(found[-1].best)
    return found


def race_through(rounds: Sequence[Round], order: Tensor) -> list[Outcome]:
    """A race in each round, in which what was learnt in the round before is known. order (n,): the
    samples, those first that are measured first."""
    known: dict[Pair, float] = {}
    outcomes = []
    for measured in rounds:
        before = {layer: known.get(layer, -math.inf) for layer in measured.measured}
        known, outcome = _race(measured.with_samples(order), before)
        outcomes.append(outcome)
    return outcomes


def _race(found: Round, before: Mapping[Pair, float]) -> tuple[dict[Pair, float], Outcome]:
    samples = len(found.measured[found.best])
    race, counts = Race(samples), {}

    def measure(group: Sequence[Pair]) -> list[Tensor]:
        tried = [_until_lost(found.measured[layer], race) for layer in group]
        counts.update({layer: len(losses) for layer, losses in zip(group, tried, strict=True)})
        return tried

    costs = race.run(sorted(found.untried, key=before.__getitem__), before, found.base, measure)
    winner = min(costs, key=costs.__getitem__)
    differences = found.measured[winner] - found.measured[found.best]
    excess, error = float(differences.mean()), float(differences.std()) / math.sqrt(samples)
    share = sum(counts.values()) / (samples * len(found.measured))
    return costs, Outcome(share, excess, excess / error if error else 0.0, found.best not in counts)


def _until_lost(losses: Tensor, race: Race) -> Tensor:
    """The first of a layer's losses (n,): as many as are measured before it has lost."""
    measured = losses[:0]
    for samples in laps(len(losses), LAP):
        measured = losses[: samples.stop]
        if race.is_lost(measured):
            break
    return measured


def summarised(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Shares and means of one round in many races; excess and errors are means over those that
    ended with another layer."""
    wrong = [outcome for outcome in outcomes if outcome.excess > 0]
    return {
        "races": len(outcomes),
        "share_measured": _mean([outcome.share for outcome in outcomes]),
        "wrong": len(wrong) / len(outcomes),
        "best_not_tried": _mean([outcome.untried for outcome in outcomes]),
        "excess_nats": _mean([outcome.excess for outcome in wrong]),
        "excess_standard_errors": _mean([outcome.errors for outcome in wrong]),
    }


def _mean(values: Sequence[float]) -> float:
    """The mean; 0 of no values."""
    return sum(values) / len(values) if values else 0.0


def simulate(of_seeds: Sequence[Sequence[Round]], races: int) -> list[dict[str, float]]:
    """A row for each round, over all seeds and orders."""
    generator = torch.Generator().manual_seed(0)
    outcomes = []
    for rounds in of_seeds:
        samples = len(rounds[0].measured[rounds[0].best])
        outcomes += [
            race_through(rounds, torch.randperm(samples, generator=generator)) for _ in range(races)
        ]
    of_rounds = zip(*outcomes, strict=True)
    return [
        {"round": number, **summarised(of_round)}
        for number, of_round in enumerate(of_rounds, start=1)
    ]


def main(
    model: Annotated[str, typer.Option()],
    calibration: Annotated[str, typer.Option(help="Text source, see gradmap/data/text_specs.py.")],
    gguf_file: str | None = None,
    dtype: str = "autocast",
    samples: int = 128,
    tokens: int = 128,
    seed: Annotated[
        list[int] | None, typer.Option(help="Of the calibration; 42 if none is given.")
    ] = None,
    rounds: int = 3,
    races: Annotated[int, typer.Option(help="Random orders of the samples, for each seed.")] = 200,
    out: Path = Path("out/benchmark/racing.json"),
) -> None:
    quiet_libraries()
    checkpoint = open_checkpoint(model, gguf_file)
    layered = LayeredModel.of(load_model(checkpoint, dtype))
    tokenizer = load_tokenizer(checkpoint.directory)
    of_seeds = []
    for number in seed or [42]:
        drawn = build_calibration(tokenizer, calibration, samples, tokens, seed=number)
        with computing_in(dtype, layered.network):
            of_seeds.append(measure_rounds(Subject(layered, drawn), rounds))
    size = {
        "samples": samples,
        "tokens": tokens,
        "seeds": seed or [42],
        "clearly": CLEARLY,
        "may_fall": MAY_FALL,
    }
    rows = simulate(of_seeds, races)
    write_json(
        out,
        {
            "environment": describe_environment(),
            **size,
            "rows": rows,
            "measured": _listed(of_seeds),
        },
    )
    columns = (
        "round",
        "measured",
        "another layer won",
        "best not tried",
        "which cost more (nats)",
        "standard errors",
    )
    print_table(
        f"Races, {races} for each of {len(of_seeds)} seeds", columns, [_row(row) for row in rows]
    )


def _listed(of_seeds: Sequence[Sequence[Round]]) -> list[list[dict[str, Any]]]:
    """All that was measured, so that other constants can be tried on it."""
    return [list(map(_as_lists, rounds)) for rounds in of_seeds]


def _as_lists(found: Round) -> dict[str, Any]:
    divergences = {str(layer): losses.tolist() for layer, losses in found.measured.items()}
    return {"base": found.base, "divergences": divergences}


def _row(row: Mapping[str, float]) -> tuple[str, ...]:
    shares = (f"{100 * row[name]:.1f}%" for name in ("share_measured", "wrong", "best_not_tried"))
    return (
        f"{row['round']}",
        *shares,
        f"{row['excess_nats']:.4f}",
        f"{row['excess_standard_errors']:.2f}",
    )


if __name__ == "__main__":
    typer.run(main)
