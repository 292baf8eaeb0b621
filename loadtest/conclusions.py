"""What follows from the measurements of a load test: summaries, speed-ups, verdicts. Pure
functions: measurements in, report out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gradmap.common.errors import UserError
from gradmap.common.verdict import Judgement, Verdict, worst
from loadtest.cells import Cells, group_cells
from loadtest.conversations import RecordCount
from loadtest.driving import SEARCH_PAIR
from loadtest.ideal import WeightBytes, ideal_speed_ups
from loadtest.loads import closed_loops, find_highest_rate, search_load
from loadtest.options import DENSE
from loadtest.records import Cell, Measurements, RequestRecord
from loadtest.resources import summarise_resources
from loadtest.schema import SCHEMA_VERSION, Ideal, LoadReport, Report, SpeedComparison
from loadtest.settings import DENSE_AGAIN, LoadTestSettings
from loadtest.soundness import find_faults
from loadtest.statistics import (
    VERDICT_METRIC,
    SpeedUp,
    compute_speed_ups,
    find_held_back,
    find_losses,
    headline,
    judge,
)
from loadtest.summaries import summarise_load


@dataclass(frozen=True)
class Facts:
    """What is known besides the records: of the machine, how large the arms' weights are, where
    that is known, and how much of the prompts' file is of use."""

    environment: dict[str, str]
    sizes: dict[str, WeightBytes]
    prompts: RecordCount | None = None


@dataclass(frozen=True)
class SpeedGate:
    """What the verdict asks for: a TPOT speed-up, and no loss against `earlier`, another
    report.json."""

    required_speed_up: float
    earlier: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Raises UserError if no speed-up could be compared with what is required."""
        if not 0 < self.required_speed_up < math.inf:
            raise UserError(
                f"--require-speedup is {self.required_speed_up}; give a finite number above 0."
            )

    def require_earlier(self, candidates: Iterable[str]) -> None:
        """Raises UserError unless the earlier report, if there is one, has an interval for every
        candidate."""
        if self.earlier is None:
            return
        for arm in candidates:
            if self.before(arm).get(VERDICT_METRIC.name, {}).get("low") is None:
                raise UserError(
                    f"The report of --against has no speed-up of {arm} with an interval (its "
                    f"verdict is {self.earlier['verdict']}), so that nothing can be lower; give "
                    "another."
                )

    def before(self, arm: str) -> dict[str, dict[str, Any]]:
        """The candidate's speed-ups in the earlier report; empty if there is none."""
        candidates = {} if self.earlier is None else self.earlier["candidates"]
        speed_ups: dict[str, dict[str, Any]] = candidates.get(arm, {}).get("speedup", {})
        return speed_ups


def build_report(
    measured: Measurements, settings: LoadTestSettings, gate: SpeedGate, facts: Facts
) -> dict[str, Any]:
    """Computes report.json, a Report, from what was measured. Nothing but faults is concluded if
    there are any."""
    everything = group_cells(measured)
    cells = everything.of_pairs()
    faults = find_faults(cells, settings)
    candidates = {}
    for arm in settings.candidates:
        if faults:  # what did not happen cannot be compared
            candidates[arm] = _invalid(faults)
        else:
            candidates[arm] = _compare(cells, arm, settings, gate, facts.sizes)
    first = next(iter(candidates.values()))
    report = Report(
        schema_version=SCHEMA_VERSION,
        verdict=str(worst(Verdict(compared.verdict) for compared in candidates.values())),
        reason=first.reason,
        required_speedup=gate.required_speed_up,
        speedup=first.speedup,
        candidates=candidates,
        highest_rate=_highest_rates(everything, settings),
        noise={} if faults else _noise(cells, settings),
        arms={arm: _summarise_arm(cells, arm, settings) for arm in settings.arms},
        weight_bytes=dict(facts.sizes),
        settings=settings,
        environment=facts.environment,
        prompts=facts.prompts,
    )
    return asdict(report)


def _compare(
    cells: Cells,
    arm: str,
    settings: LoadTestSettings,
    gate: SpeedGate,
    sizes: Mapping[str, WeightBytes],
) -> SpeedComparison:
    """What is concluded of a candidate; the measurements have no faults."""
    held_back = find_held_back(cells, arm, DENSE, closed_loops(settings.loads)[0])
    if held_back is not None:
        return _invalid([held_back])
    by_load = {}
    for load in settings.loads:
        by_load[load.name] = compute_speed_ups(cells, arm, DENSE, load)
    main = headline(by_load, settings.loads)
    judgement = judge(main[VERDICT_METRIC.name], gate.required_speed_up)
    lost = find_losses(main, gate.before(arm))
    if lost:
        judgement = Judgement(Verdict.FAIL, f"less than in the earlier test: {'; '.join(lost)}")
    return SpeedComparison(
        verdict=str(judgement.verdict),
        reason=judgement.reason,
        speedup=main,
        before=gate.before(arm),
        ideal=_against_ideal(main, ideal_speed_ups(sizes, arm, DENSE)),
        loads=by_load,
    )


def _against_ideal(
    speed_ups: Mapping[str, SpeedUp], ceilings: Mapping[str, float]
) -> dict[str, Ideal]:
    shares = {}
    for name, ceiling in ceilings.items():
        shares[name] = Ideal(ceiling, speed_ups[name].value / ceiling)
    return shares


def _invalid(faults: Sequence[str]) -> SpeedComparison:
    return SpeedComparison(str(Verdict.INVALID), "; ".join(faults), {}, {}, {}, {})


def _noise(cells: Cells, settings: LoadTestSettings) -> dict[str, dict[str, float]]:
    """Load -> metric -> what one more block of the dense model differs by from its first: 1 without
    any noise."""
    noise = {}
    for load in settings.loads:
        if cells.pairs(DENSE_AGAIN, load.name):
            speed_ups = compute_speed_ups(cells, DENSE_AGAIN, DENSE, load)
            noise[load.name] = {name: value.value for name, value in speed_ups.items()}
    return noise


def _highest_rates(cells: Cells, settings: LoadTestSettings) -> dict[str, float]:
    """Arm -> requests a second that met the SLOs; empty if that was not looked for."""
    if not any(cell.pair == SEARCH_PAIR for cell in cells.by_cell):
        return {}
    return {arm: _highest_rate(cells, arm, settings) for arm in settings.arms}


def _highest_rate(cells: Cells, arm: str, settings: LoadTestSettings) -> float:
    """The search once more, on what was measured when it was made: a rate that it did not come to
    did not meet them."""

    def met(rate: float) -> bool:
        load = search_load(rate).name
        records = cells.at(Cell(arm, SEARCH_PAIR, load)).requests
        return bool(summarise_load(records, load, settings.slos).meets_slos)

    return find_highest_rate(met)


def _summarise_arm(cells: Cells, arm: str, settings: LoadTestSettings) -> dict[str, LoadReport]:
    summaries = {}
    for load in settings.loads:
        blocks = cells.pairs(arm, load.name).values()
        records: list[RequestRecord] = []
        for block in blocks:
            records += block.requests
        summary = summarise_load(records, load.name, settings.slos)
        summaries[load.name] = LoadReport(**vars(summary), resources=summarise_resources(blocks))
    return summaries
