"""Runs the blocks of a load test: starts one server at a time, warms it up, and lets Locust drive it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx

from gradmap.checkpoint import load_tokenizer
from gradmap.console import say, waiting
from gradmap.errors import UserError
from gradmap.openai_api import authorization, served_model
from gradmap.reading import read_json
from loadtest.board import Board
from loadtest.driving import SEARCH_PAIR, WARM_UP_PAIR, Bench, Endpoint, run_load
from loadtest.loads import CONCURRENCY, Load, find_highest_rate
from loadtest.metrics import summarise_load
from loadtest.prompts import Prompts, RandomPrompts, TextPrompts
from loadtest.records import Measurements, append_measurements, start_files
from loadtest.settings import DENSE_AGAIN, Block, LoadTestSettings, check_settings, is_url, schedule
from serving.log import Log
from serving.machine import suited_to_machine
from serving.server import Server, free_port
from serving.settings import ServerSettings

WARM_UP_REQUESTS = 4
WARM_UP_LOAD = Load(CONCURRENCY, 1)
SEARCH_ARRIVALS = "poisson"


@dataclass
class Session:
    """What was measured so far; also in `directory`, as soon as each load ends."""

    directory: Path
    measured: Measurements = field(default_factory=Measurements)

    def start(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        start_files(self.directory)

    def add(self, measured: Measurements) -> None:
        append_measurements(self.directory, measured)
        self.measured += measured


def run_session(settings: LoadTestSettings, session: Session) -> None:
    """Runs all blocks. Raises UserError on bad input, or if a server fails; what was measured until then stays."""
    check_settings(settings)
    with waiting("Reading the prompts"):
        prompts = _open_prompts(settings)
    session.start()
    stays = list(_consecutive(schedule(settings), fresh=settings.interleaved))
    loads = len(stays) + sum(len(blocks) for _, blocks in stays) * len(settings.loads)  # each stay has a warm-up
    board = Board(len(stays), loads)
    bench = Bench(settings, prompts, board, session.directory)
    with board.showing():
        for arm, blocks in stays:
            with _warm_endpoint(bench, arm) as endpoint:
                for block in blocks:
                    for load in settings.loads:
                        session.add(run_load(endpoint, bench, block, load))
        for arm in settings.arms if settings.find_rate else ():
            with _warm_endpoint(bench, arm) as endpoint:
                _search_rate(endpoint, bench, arm, session)


def _search_rate(endpoint: Endpoint, bench: Bench, arm: str, session: Session) -> None:
    """Measures open loops up to the highest rate that meets the SLOs. Which that is, the records tell."""

    def meets(rate: float) -> bool:
        load = Load(SEARCH_ARRIVALS, rate)
        measured = run_load(endpoint, bench, Block(arm, SEARCH_PAIR), load)
        session.add(measured)
        return bool(summarise_load(measured.requests, load.name, bench.settings.slos).meets_slos)

    find_highest_rate(meets)


@contextmanager
def _warm_endpoint(bench: Bench, arm: str) -> Iterator[Endpoint]:
    with _open_endpoint(bench.settings, arm, bench.out) as endpoint:
        bench.board.started()
        warm_up = replace(bench, settings=replace(bench.settings, requests_per_load=WARM_UP_REQUESTS))
        run_load(endpoint, warm_up, Block(arm, WARM_UP_PAIR), WARM_UP_LOAD)
        yield endpoint


def _open_prompts(settings: LoadTestSettings) -> Prompts:
    """Raises UserError if the texts cannot be read, or if nothing tells the vocabulary or the tokenizer."""
    if settings.workload.texts is None:
        return RandomPrompts(settings.workload, settings.vocabulary or _vocabulary_of(settings))
    directories = [target for target in settings.arms.values() if not is_url(target)]
    source = settings.tokenizer or next(iter(directories), None)
    if source is None:
        raise UserError("All endpoints are URLs; say with --tokenizer which directory has their tokenizer.")
    return TextPrompts(settings.workload, load_tokenizer(Path(source)))


def _vocabulary_of(settings: LoadTestSettings) -> int:
    """Token ids that all models know: the smallest vocabulary of those arms that are directories."""
    directories = [Path(target) for target in settings.arms.values() if not is_url(target)]
    if not directories:
        raise UserError("All endpoints are URLs; say with --vocabulary how many token ids they know.")
    return min(int(read_json(directory / "config.json")["vocab_size"]) for directory in directories)


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
def _open_endpoint(settings: LoadTestSettings, arm: str, out: Path) -> Iterator[Endpoint]:
    """Yields a ready endpoint; a server that was started for it is stopped afterwards."""
    target = settings.dense if arm == DENSE_AGAIN else settings.arms[arm]
    if is_url(target):
        url = target.rstrip("/")
        yield Endpoint(url, _require_model(url))
        return
    server_settings = suited_to_machine(ServerSettings(Path(target), port=free_port(), vllm_flags=settings.vllm_flags))
    log = out / f"server-{arm}.log"
    starting = f"Starting vLLM for the {arm} model"
    say(f"{starting} (log: {log})")
    with closing(Log(log)) as output, Server(server_settings, output) as server:
        with waiting(lambda: f"{starting}: {server.phase}"):
            model = server.wait_until_ready()
        yield Endpoint(server_settings.url, model)


def _require_model(url: str) -> str:
    try:
        client = httpx.Client(base_url=url, headers=authorization(), timeout=30.0)
        with waiting(f"Asking {url} for its model"), client:
            return served_model(client)
    except (httpx.HTTPError, KeyError, ValueError) as error:
        raise UserError(f"{url} does not answer as an OpenAI-compatible server: {error}.") from None
