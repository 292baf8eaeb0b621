"""Runs the blocks of a load test: starts one server at a time, warms it up, and lets Locust drive
it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from gradmap.common.console import say, waiting
from gradmap.common.errors import UserError
from gradmap.common.reading import read_json_object
from gradmap.model.loading import load_tokenizer
from loadtest.board import Board
from loadtest.conversations import RecordCount
from loadtest.driver.stream import whole_number
from loadtest.driving import LOAD_PREFIX, SEARCH_PAIR, WARM_UP_PAIR, Bench, run_load
from loadtest.endpoints import Endpoint, find_endpoints, server_settings
from loadtest.loads import ClosedLoop, find_highest_rate, search_load
from loadtest.options import DENSE
from loadtest.prompts import Prompts, RandomPrompts, TextPrompts
from loadtest.records import Measurements, append_measurements, start_files
from loadtest.settings import DENSE_AGAIN, Block, LoadTestSettings, check_settings, schedule
from loadtest.summaries import summarise_load
from loadtest.urls import is_url
from serving.log import Log
from serving.server import Server

WARM_UP_REQUESTS = 4
WARM_UP_LOAD = ClosedLoop(1)


@dataclass
class Session:
    """What was measured so far; also in `directory`, as soon as each load ends.

    models: arm -> name, of URLs. prompts: of the file that they are out of, how many records it has
    (see Prompts).
    """

    directory: Path
    measured: Measurements = field(default_factory=Measurements)
    models: dict[str, str] = field(default_factory=dict)
    prompts: RecordCount | None = None

    def start(self, models: dict[str, str], prompts: RecordCount | None) -> None:
        self.models, self.prompts = models, prompts
        self.directory.mkdir(parents=True, exist_ok=True)
        for left in self.directory.glob(f"{LOAD_PREFIX}*"):  # by a test that was killed
            shutil.rmtree(left, ignore_errors=True)
        start_files(self.directory)

    def add(self, measured: Measurements) -> None:
        append_measurements(self.directory, measured)
        self.measured += measured


def run_session(settings: LoadTestSettings, session: Session) -> None:
    """Runs all blocks. Raises UserError on bad input, or if a server fails; what was measured until
    then stays.

    An earlier test in the session's directory stays until all that can be checked was.
    """
    check_settings(settings)
    with waiting("Reading the prompts"):
        prompts = _open_prompts(settings)
    endpoints = find_endpoints(settings)
    session.start({arm: endpoint.model for arm, endpoint in endpoints.items()}, prompts.records)
    blocks = schedule(settings)
    stays = list(_consecutive(blocks, fresh=settings.interleaved))
    warm_ups = len(stays)
    board = Board(len(stays), warm_ups + len(blocks) * len(settings.loads))
    bench = Bench(settings, prompts, board, session.directory)
    opened = partial(_warm_endpoint, bench, endpoints)
    with board.showing():
        for arm, of_stay in stays:
            with opened(arm) as endpoint:
                for block in of_stay:
                    for load in settings.loads:
                        session.add(run_load(endpoint, bench, block, load))
        for arm in settings.arms if settings.find_rate else ():
            with opened(arm) as endpoint:
                _search_rate(endpoint, bench, arm, session)


def _search_rate(endpoint: Endpoint, bench: Bench, arm: str, session: Session) -> None:
    """Measures open loops up to the highest rate that meets the SLOs. Which that is, the records
    tell."""

    def meets(rate: float) -> bool:
        load = search_load(rate)
        measured = run_load(endpoint, bench, Block(arm, SEARCH_PAIR), load)
        session.add(measured)
        return bool(summarise_load(measured.requests, load.name, bench.settings.slos).meets_slos)

    find_highest_rate(meets)


@contextmanager
def _warm_endpoint(bench: Bench, endpoints: Mapping[str, Endpoint], arm: str) -> Iterator[Endpoint]:
    """Raises UserError if not one request of the warm-up is answered: none would be."""
    with _open_endpoint(bench, endpoints, arm) as endpoint:
        bench.board.started()
        warm_up = replace(
            bench, settings=replace(bench.settings, requests_per_load=WARM_UP_REQUESTS)
        )
        records = run_load(endpoint, warm_up, Block(arm, WARM_UP_PAIR), WARM_UP_LOAD).requests
        errors = [record.error for record in records if record.error is not None]
        if len(errors) == len(records):
            first = errors[0] if errors else "none was sent"
            raise UserError(
                f"All {len(records)} requests of the warm-up of {arm} failed (the first: {first})."
            )
        yield endpoint


def _open_prompts(settings: LoadTestSettings) -> Prompts:
    """Raises UserError if the texts cannot be read, or if nothing tells the vocabulary or the
    tokenizer."""
    if settings.workload.texts is None:
        return RandomPrompts(settings.workload, settings.vocabulary or _vocabulary_of(settings))
    directories = [target for target in settings.arms.values() if not is_url(target)]
    source = settings.tokenizer or next(iter(directories), None)
    if source is None:
        raise UserError(
            "All endpoints are URLs; say with --tokenizer which directory has their tokenizer."
        )
    return TextPrompts(settings.workload, load_tokenizer(Path(source)))


def _vocabulary_of(settings: LoadTestSettings) -> int:
    """Token ids that all models know: the smallest vocabulary of those arms that are
    directories."""
    directories = [Path(target) for target in settings.arms.values() if not is_url(target)]
    if not directories:
        raise UserError(
            "All endpoints are URLs; say with --vocabulary how many token ids they know."
        )
    sizes = [
        whole_number(read_json_object(directory / "config.json").get("vocab_size"))
        for directory in directories
    ]
    if not all(sizes):
        raise UserError(
            "A config.json does not tell its model's vocab_size; say with --vocabulary how many "
            "ids there are."
        )
    return min(size for size in sizes if size)


def _consecutive(blocks: Sequence[Block], fresh: bool) -> Iterator[tuple[str, list[Block]]]:
    """Groups blocks that one server can serve: each by itself if every block wants a fresh one."""
    group: list[Block] = []
    for block in blocks:
        if group and (fresh or group[-1].arm != block.arm):
            yield group[-1].arm, group
            group = []
        group.append(block)
    yield group[-1].arm, group


@contextmanager
def _open_endpoint(bench: Bench, endpoints: Mapping[str, Endpoint], arm: str) -> Iterator[Endpoint]:
    """Yields a ready endpoint; a server that was started for it is stopped afterwards."""
    served = DENSE if arm == DENSE_AGAIN else arm
    if served in endpoints:
        yield endpoints[served]
        return
    settings = server_settings(bench.settings, bench.settings.arms[served])
    log = bench.out / f"server-{arm}.log"
    starting = f"Starting vLLM for the {arm} model"
    say(f"{starting} (log: {log})")
    with closing(Log(log)) as output, Server(settings, output) as server:
        with waiting(lambda: f"{starting}: {server.phase}"):
            model = server.wait_until_ready()
        with _answering_afterwards(server):
            yield Endpoint(settings.url, model)


@contextmanager
def _answering_afterwards(server: Server) -> Iterator[None]:
    """Raises ServerError if the server has ended, or is about to: that is why what was asked of it
    failed."""
    try:
        yield
    except UserError:
        server.wait_until_ready()
        raise
    server.wait_until_ready()
