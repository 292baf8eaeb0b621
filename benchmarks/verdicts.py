"""How often the load test's verdict is wrong, and how often it finds a difference that is there: a
simulation.

    python -m benchmarks.verdicts [--trials 1000] [--pairs 6]

Each trial makes the raw records of a whole test: requests scatter within a block (5%), and blocks
scatter around the truth (a server that was started anew, a machine that is warmer), by as much as a
row says. What judges is the load test's own code, from records to verdict. Two equal models that
get PASS or FAIL at a required speed-up of 1 are false verdicts; their nominal rate is 5%. Power is
the share of PASS for a model that is 10% faster.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from gradmap.common.console import print_table, progress
from gradmap.common.files import write_json
from loadtest.conclusions import Facts, SpeedGate, build_report
from loadtest.loads import ClosedLoop
from loadtest.options import DENSE, PRUNED
from loadtest.records import BlockRecord, Measurements, RequestRecord
from loadtest.settings import LoadTestSettings

LOAD = ClosedLoop(1)
REQUESTS = 8
OUTPUT_TOKENS = 64
TPOT_S = 0.03
WITHIN_BLOCK = 0.05
# Standard deviations of a block around the truth; the real ones were 1 to 2% on an idle machine.
BLOCK_SCATTER = (0.01, 0.02, 0.04, 0.06, 0.08)


def simulate(speed_up: float, scatter: float, pairs: int, generator: random.Random) -> Measurements:
    """The records of one test of a model that is `speed_up` times as fast."""
    records, blocks = [], []
    for pair in range(pairs):
        for arm, truth_s in ((DENSE, TPOT_S), (PRUNED, TPOT_S / speed_up)):
            place = {"arm": arm, "pair": pair, "load": LOAD.name}
            blocks.append(BlockRecord(**place, client_cpu=0.0, server_tokens=None))
            of_block_s = truth_s * math.exp(generator.gauss(0, scatter))
            for number in range(REQUESTS):
                tpot_s = of_block_s * math.exp(generator.gauss(0, WITHIN_BLOCK))
                records.append(_record(arm, pair, f"{pair}-{number}", tpot_s))
    return Measurements(tuple(records), tuple(blocks))


def _record(arm: str, pair: int, name: str, tpot_s: float) -> RequestRecord:
    times_s = (0.1, 0.1 + tpot_s * (OUTPUT_TOKENS - 1))
    return RequestRecord(
        arm=arm,
        pair=pair,
        load=LOAD.name,
        request=name,
        prompt_tokens=128,
        requested_tokens=OUTPUT_TOKENS,
        completion_tokens=OUTPUT_TOKENS,
        sent_s=0.0,
        ended_s=times_s[-1],
        chunk_times_s=times_s,
        chunk_tokens=(1, OUTPUT_TOKENS),
    )


def count_verdicts(speed_up: float, scatter: float, pairs: int, trials: int) -> Counter[str]:
    """Verdicts of many tests at a required speed-up of 1."""
    settings = LoadTestSettings(
        DENSE,
        {PRUNED: PRUNED},
        loads=(LOAD,),
        pairs=pairs,
        interleaved=False,
        requests_per_load=REQUESTS,
    )
    generator = random.Random(f"{speed_up} {scatter} {pairs}")
    reports = (
        build_report(
            simulate(speed_up, scatter, pairs, generator), settings, SpeedGate(1.0), Facts({}, {})
        )
        for _ in range(trials)
    )
    return Counter(report["verdict"] for report in reports)


def main(
    trials: int = 1000,
    pairs: int = 6,
    gain: Annotated[float, typer.Option(help="The true speed-up that is to be found.")] = 1.1,
    out: Path = Path("out/benchmark/verdicts.json"),
) -> None:
    found: list[dict[str, Any]] = []
    with progress("Simulating", len(BLOCK_SCATTER)) as advance:
        for scatter in BLOCK_SCATTER:
            equal, faster = (count_verdicts(truth, scatter, pairs, trials) for truth in (1.0, gain))
            found.append({"scatter": scatter, "equal": dict(equal), "faster": dict(faster)})
            advance(1)
    write_json(out, {"trials": trials, "pairs": pairs, "gain": gain, "rows": found})
    rows = [
        (
            f"{100 * row['scatter']:.0f}%",
            _share(row["equal"].get("PASS", 0), trials),
            _share(row["equal"].get("FAIL", 0), trials),
            _share(row["faster"].get("PASS", 0), trials),
        )
        for row in found
    ]
    columns = ("scatter of blocks", "false PASS", "false FAIL", f"{gain:g}x found")
    print_table(f"{trials} tests of {pairs} pairs each (± 2 standard errors)", columns, rows)


def _share(count: int, trials: int) -> str:
    share = count / trials
    return f"{100 * share:.1f}% ± {200 * math.sqrt(share * (1 - share) / trials):.1f}"


if __name__ == "__main__":
    typer.run(main)
