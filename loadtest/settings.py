"""What a load test is asked to do, and whether that can be done."""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gradmap.common.errors import UserError
from loadtest.loads import ClosedLoop, Load, OpenLoop, closed_loops, list_loads
from loadtest.options import (
    DENSE,
    LEAST_OUTPUT_TOKENS,
    PAIRS_FOR_A_VERDICT,
    QUICK_PAIRS,
    LoadTestOptions,
)
from loadtest.prompts import Workload
from loadtest.slo import Slo, parse_slo
from loadtest.urls import base_url, is_url

# The dense model once more, in one block: what two equal models differ by.
DENSE_AGAIN = "dense-again"
RESERVED_ARMS = (DENSE, DENSE_AGAIN)
# Names of arms become names of files, columns and test cases.
ARM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")
# Of a load in a block: what is in memory at once, and one verdict needs far fewer.
MOST_REQUESTS = 1_000_000


@dataclass(frozen=True)
class LoadTestSettings:
    """dense: the baseline, candidates: what is compared with it; model directories, or URLs of
    running servers.

    loads: each once in every block. pairs: blocks per arm. interleaved: a fresh server for every
    block, all arms in random order within each pair; otherwise all blocks of an arm follow each
    other, on one server. requests_per_load: at least so many; open_loop_s: length of an open loop.
    find_rate: whether the highest rate that meets the SLOs is looked for, at the end. vocabulary,
    tokenizer: of the models, where all are URLs. processes: that send requests, at most. models:
    arm -> name of its model, of arms that are URLs; where none is given, the only one.
    """

    dense: str
    candidates: dict[str, str]
    loads: tuple[Load, ...] = (ClosedLoop(1), ClosedLoop(8))
    pairs: int = 6
    interleaved: bool = True
    requests_per_load: int = 8
    open_loop_s: float = 20.0
    workload: Workload = field(default_factory=Workload)
    slos: tuple[Slo, ...] = ()
    find_rate: bool = False
    vocabulary: int | None = None
    tokenizer: str | None = None
    vllm_flags: tuple[str, ...] = ()
    processes: int = 1
    models: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls, options: LoadTestOptions, dense: str, candidates: dict[str, str], **others: Any
    ) -> LoadTestSettings:
        """What the options come to for these arms. others: fields that no option is about."""
        asked = options
        pairs = QUICK_PAIRS if asked.quick else PAIRS_FOR_A_VERDICT
        return cls(
            dense,
            candidates,
            loads=list_loads(asked.concurrency, asked.rate, asked.arrivals),
            pairs=pairs if asked.pairs is None else asked.pairs,
            interleaved=not asked.quick,
            requests_per_load=asked.requests,
            open_loop_s=asked.open_loop_s,
            workload=Workload(
                asked.prompt_tokens,
                asked.output_tokens,
                asked.length_spread,
                asked.shared_prefix,
                asked.prompts,
                asked.seed,
            ),
            slos=tuple(parse_slo(text) for text in asked.slo),
            find_rate=asked.find_rate,
            vllm_flags=tuple(asked.vllm_flag),
            processes=asked.processes,
            **others,
        )

    @property
    def arms(self) -> dict[str, str]:
        return {DENSE: self.dense, **self.candidates}

    @property
    def expected_records(self) -> int:
        return len(schedule(self)) * sum(self.requests_at(load) for load in self.loads)

    def requests_at(self, load: Load) -> int:
        """Enough for the load to be sustained: two full rounds of the concurrency, or the length of
        an open loop."""
        return max(self.requests_per_load, math.ceil(load.enough_requests(self.open_loop_s)))

    def processes_at(self, load: Load) -> int:
        """Each gets a request at least, and as many users as every other: in a closed loop, the
        largest number that divides the level."""
        if isinstance(load, OpenLoop):
            return min(self.processes, self.requests_at(load))
        return max(count for count in range(1, self.processes + 1) if load.level % count == 0)


@dataclass(frozen=True)
class Block:
    """One stay at one arm: every load once."""

    arm: str
    pair: int


def schedule(settings: LoadTestSettings) -> list[Block]:
    """The order of the blocks; the random order within pairs follows the seed.

    A full session has one block of the dense model more, in the first pair.
    """
    arms = list(settings.arms)
    if not settings.interleaved:
        return [Block(arm, pair) for arm in arms for pair in range(settings.pairs)]
    generator = random.Random(settings.workload.seed)
    blocks = []
    for pair in range(settings.pairs):
        of_pair = [*arms, DENSE_AGAIN] if pair == 0 else arms
        blocks += [Block(arm, pair) for arm in generator.sample(of_pair, len(of_pair))]
    return blocks


def check_settings(settings: LoadTestSettings) -> None:
    """Raises UserError if the settings cannot be run."""
    if settings.pairs < 1:
        raise UserError(f"--pairs is {settings.pairs}; at least 1 is needed.")
    if not settings.interleaved and settings.pairs >= PAIRS_FOR_A_VERDICT:
        raise UserError(
            f"--quick is for fewer than {PAIRS_FOR_A_VERDICT} pairs; leave it out, or --pairs."
        )
    if not closed_loops(settings.loads):
        raise UserError("--concurrency is needed: the verdict is about a closed loop.")
    if settings.processes < 1:
        raise UserError(f"--processes is {settings.processes}; at least 1 is needed.")
    _check_loads(settings)
    _check_workload(settings.workload)
    if settings.vocabulary is not None and settings.vocabulary < 1:
        raise UserError(
            f"--vocabulary is {settings.vocabulary}; give the number of token ids, 1 or more."
        )
    if settings.find_rate and not settings.slos:
        raise UserError(
            "--find-rate looks for the highest rate that meets an SLO; give --slo, such as "
            "ttft_p95=200ms."
        )
    if not settings.candidates:
        raise UserError(
            "Give --pruned, or --candidate NAME=TARGET, to compare with the dense model."
        )
    _check_arms(settings)


def _check_arms(settings: LoadTestSettings) -> None:
    for name in settings.candidates:
        if name in RESERVED_ARMS or not ARM_NAME.fullmatch(name):
            raise UserError(
                f"--candidate {name!r} is no name for a model; use up to 40 letters, digits, dots, "
                f"dashes and underscores, and not {' or '.join(RESERVED_ARMS)}."
            )
    for arm, target in settings.arms.items():
        if is_url(target):
            base_url(target)
        elif not Path(target, "config.json").is_file():
            raise UserError(
                f"{arm}: {target} is neither a URL nor a model directory; export one first."
            )
    for arm in settings.models:
        if not is_url(settings.arms.get(arm, "")):
            raise UserError(
                f"A model's name is for an arm that is a URL, and {arm} is none; leave it out."
            )


def _check_loads(settings: LoadTestSettings) -> None:
    if not 0 < settings.open_loop_s < math.inf:
        raise UserError(
            f"--open-loop-s is {settings.open_loop_s}; give a finite number of seconds above 0."
        )
    for load in settings.loads:
        if not 0 < load.level < math.inf:
            raise UserError("--concurrency must be 1 or more, and --rate a finite number above 0.")
        enough = load.enough_requests(settings.open_loop_s)
        if max(enough, settings.requests_per_load) > MOST_REQUESTS:
            raise UserError(
                f"{load.label} would take more than {MOST_REQUESTS} requests a block; lower it, "
                "--requests or --open-loop-s."
            )


def _check_workload(workload: Workload) -> None:
    if workload.output_tokens < LEAST_OUTPUT_TOKENS:
        raise UserError("--output-tokens must be 2 or more; TPOT is undefined below.")
    if not 0 <= workload.length_spread < 1:
        raise UserError(
            f"--length-spread is {workload.length_spread}; give a share from 0 to below 1."
        )
    if workload.shared_prefix >= workload.prompt_tokens:
        raise UserError("--shared-prefix must be shorter than --prompt-tokens.")
    if workload.texts and (workload.shared_prefix or workload.length_spread):
        raise UserError(
            "--shared-prefix and --length-spread are for random prompts; leave them out, or "
            "--prompts."
        )
