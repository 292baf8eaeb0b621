"""Runs the blocks of a load test: starts one server at a time, warms it up, and lets Locust drive it."""

from __future__ import annotations

import math
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

import httpx

from gradmap.checkpoint import load_tokenizer
from gradmap.console import progress, say
from gradmap.errors import UserError
from gradmap.files import read_json
from gradmap.openai_api import authorization, served_model
from loadtest.loads import CONCURRENCY, Load, find_highest_rate
from loadtest.metrics import summarise_load
from loadtest.prompts import LEAST_OUTPUT_TOKENS, Prompts, RandomPrompts, TextPrompts, Workload
from loadtest.records import BLOCKS_FILE, RECORDS_FILE, BlockRecord, RequestRecord, read_records, to_json_line
from loadtest.slo import Slo
from loadtest.workload import draw_requests, save_requests
from serving.server import Server, ServerSettings, free_port

# In a folder of its own: Locust puts the folder of its file first on sys.path.
LOCUSTFILE = Path(__file__).parent / "driver" / "locustfile.py"
DENSE, PRUNED = "dense", "pruned"
# The dense model once more, in one block: what two equal models differ by.
DENSE_AGAIN = "dense-again"
WARM_UP_REQUESTS = 4
WARM_UP_LOAD = Load(CONCURRENCY, 1)
# Numbers of what is no pair: below zero, so that records of pairs can be told apart.
WARM_UP_PAIR, SEARCH_PAIR = -1, -2
SEARCH_ARRIVALS = "poisson"
# No block may run longer than this, whatever the server does.
BLOCK_TIMEOUT_S = 900
# vLLM counts a token a moment after it has sent it.
COUNTER_WAIT_S = 3.0


@dataclass(frozen=True)
class LoadTestSettings:
    """dense: the baseline, candidates: what is compared with it; model directories, or URLs of running servers.

    loads: each once in every block. pairs: blocks per arm. interleaved: a fresh server for every block, all arms in
    random order within each pair; otherwise all blocks of an arm follow each other, on one server.
    requests_per_load: at least so many; open_loop_s: length of an open loop. find_rate: whether the highest rate that
    meets the SLOs is looked for, at the end. vocabulary, tokenizer: of the models, where all are URLs.
    """

    dense: str
    candidates: dict[str, str]
    loads: tuple[Load, ...] = (Load(CONCURRENCY, 1), Load(CONCURRENCY, 8))
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

    @property
    def arms(self) -> dict[str, str]:
        return {DENSE: self.dense, **self.candidates}

    @property
    def expected_records(self) -> int:
        return len(schedule(self)) * sum(self.requests_at(load) for load in self.loads)

    def requests_at(self, load: Load) -> int:
        """Enough for the load to be sustained: two full rounds of the concurrency, or the length of an open loop."""
        enough = load.level * self.open_loop_s if load.is_open else 2 * load.level
        return max(self.requests_per_load, math.ceil(enough))


@dataclass(frozen=True)
class Block:
    """One stay at one arm: every load once."""

    arm: str
    pair: int


@dataclass(frozen=True)
class Endpoint:
    url: str
    model: str


@dataclass
class Measured:
    """What a session has measured so far; also in `directory`, as soon as each load ends."""

    directory: Path
    records: list[RequestRecord] = field(default_factory=list)
    blocks: list[BlockRecord] = field(default_factory=list)

    def start(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for name in (RECORDS_FILE, BLOCKS_FILE):
            (self.directory / name).write_text("")

    def add(self, records: list[RequestRecord], block: BlockRecord) -> None:
        with (self.directory / RECORDS_FILE).open("a") as file:
            file.writelines(map(to_json_line, records))
        with (self.directory / BLOCKS_FILE).open("a") as file:
            file.write(to_json_line(block))
        self.records += records
        self.blocks.append(block)


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


def run_session(settings: LoadTestSettings, measured: Measured) -> None:
    """Runs all blocks. Raises UserError on bad input, or if a server fails; what was measured until then stays."""
    check_settings(settings)
    prompts = _open_prompts(settings)
    measured.start()
    for arm, blocks in _consecutive(schedule(settings), fresh=settings.interleaved):
        with _warm_endpoint(settings, prompts, arm, measured.directory) as endpoint:
            for block in blocks:
                for load in settings.loads:
                    measured.add(*_run_load(endpoint, settings, prompts, block, load, measured.directory))
    for arm in settings.arms if settings.find_rate else ():
        with _warm_endpoint(settings, prompts, arm, measured.directory) as endpoint:
            _search_rate(endpoint, settings, prompts, arm, measured)


def _search_rate(
    endpoint: Endpoint, settings: LoadTestSettings, prompts: Prompts, arm: str, measured: Measured
) -> None:
    """Measures open loops up to the highest rate that meets the SLOs. Which that is, the records tell."""

    def meets(rate: float) -> bool:
        load = Load(SEARCH_ARRIVALS, rate)
        records, block = _run_load(endpoint, settings, prompts, Block(arm, SEARCH_PAIR), load, measured.directory)
        measured.add(records, block)
        return bool(summarise_load(records, load.name, settings.slos).meets_slos)

    find_highest_rate(meets)


@contextmanager
def _warm_endpoint(settings: LoadTestSettings, prompts: Prompts, arm: str, out: Path) -> Iterator[Endpoint]:
    with _open_endpoint(settings, arm, out) as endpoint:
        warm_up = replace(settings, requests_per_load=WARM_UP_REQUESTS)
        _run_load(endpoint, warm_up, prompts, Block(arm, WARM_UP_PAIR), WARM_UP_LOAD, out)
        yield endpoint


def check_settings(settings: LoadTestSettings) -> None:
    """Raises UserError if the settings cannot be run."""
    if settings.pairs < 1:
        raise UserError(f"--pairs is {settings.pairs}; at least 1 is needed.")
    if not any(load.pattern == CONCURRENCY for load in settings.loads):
        raise UserError("--concurrency is needed: the verdict is about a closed loop.")
    if min(load.level for load in settings.loads) <= 0:
        raise UserError("--concurrency must be 1 or more, and --rate above 0.")
    _check_workload(settings.workload)
    if settings.find_rate and not settings.slos:
        raise UserError("--find-rate looks for the highest rate that meets an SLO; give --slo, such as ttft_p95=200ms.")
    if not settings.candidates:
        raise UserError("Give --pruned, or --candidate NAME=TARGET, to compare with the dense model.")
    for arm, target in settings.arms.items():
        if is_url(target):
            _require_host(target)
        elif not Path(target, "config.json").is_file():
            raise UserError(f"{arm}: {target} is neither a URL nor a model directory; export one first.")


def _check_workload(workload: Workload) -> None:
    if workload.output_tokens < LEAST_OUTPUT_TOKENS:
        raise UserError("--output-tokens must be 2 or more; TPOT is undefined below.")
    if not 0 <= workload.length_spread < 1:
        raise UserError(f"--length-spread is {workload.length_spread}; give a share from 0 to below 1.")
    if workload.shared_prefix >= workload.prompt_tokens:
        raise UserError("--shared-prefix must be shorter than --prompt-tokens.")
    if workload.texts and (workload.shared_prefix or workload.length_spread):
        raise UserError("--shared-prefix and --length-spread are for random prompts; leave them out, or --prompts.")


def _open_prompts(settings: LoadTestSettings) -> Prompts:
    """Raises UserError if the texts cannot be read, or if nothing tells the vocabulary or the tokenizer."""
    if settings.workload.texts is None:
        return RandomPrompts(settings.workload, settings.vocabulary or _vocabulary_of(settings))
    directories = [target for target in settings.arms.values() if not is_url(target)]
    source = settings.tokenizer or next(iter(directories), None)
    if source is None:
        raise UserError("All endpoints are URLs; say with --tokenizer which directory has their tokenizer.")
    return TextPrompts(settings.workload, load_tokenizer(Path(source)))


def _require_host(url: str) -> None:
    if urlsplit(url).hostname is None:
        raise UserError(f"{url} is no URL of a server; write it as http://HOST:PORT.")


def is_url(target: str) -> bool:
    return target.startswith(("http://", "https://"))


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
    server_settings = ServerSettings(Path(target), port=free_port(), vllm_flags=settings.vllm_flags)
    log = out / f"server-{arm}.log"
    say(f"Starting vLLM for the {arm} model (log: {log})")
    with Server(server_settings, log) as server:
        yield Endpoint(server_settings.url, server.wait_until_ready())


def _require_model(url: str) -> str:
    try:
        with httpx.Client(base_url=url, headers=authorization(), timeout=30.0) as client:
            return served_model(client)
    except (httpx.HTTPError, KeyError, ValueError) as error:
        raise UserError(f"{url} does not answer as an OpenAI-compatible server: {error}.") from None


def _run_load(
    endpoint: Endpoint, settings: LoadTestSettings, prompts: Prompts, block: Block, load: Load, out: Path
) -> tuple[list[RequestRecord], BlockRecord]:
    """Lets Locust send one load; prompts and arrivals depend on pair and load, not on the arm."""
    count = settings.requests_at(load)
    requests = draw_requests(prompts, f"{block.pair}-{load.name}", count, load, settings.workload.seed)
    stay = {WARM_UP_PAIR: "warm-up", SEARCH_PAIR: "search"}.get(block.pair, f"pair {block.pair + 1}")
    with TemporaryDirectory(dir=out, prefix=".load-") as directory:
        files = {kind: Path(directory, f"{kind}.json") for kind in ("requests", "records", "usage")}
        save_requests(files["requests"], requests)
        files["records"].write_text("")
        tokens_before = generated_tokens(endpoint.url)
        with progress(f"{block.arm}: {stay}, {load.label} (requests)", count) as advance:
            command = _locust_command(endpoint, block, load, files)
            _run_locust(command, files["records"], advance, out / "locust.log")
        records, usage = read_records(files["records"]), read_json(files["usage"])
    seen = sum(record.completion_tokens for record in records)
    server_tokens = None if tokens_before is None else _tokens_since(endpoint.url, tokens_before, seen)
    measured = {"client_cpu": usage["client_cpu"], "server_tokens": server_tokens}
    return records, BlockRecord(arm=block.arm, pair=block.pair, load=load.name, **measured)


def generated_tokens(url: str) -> int | None:
    """vLLM's count of generated tokens since it started; None if the server does not tell."""
    with suppress(httpx.HTTPError):
        text = httpx.get(f"{url}/metrics", headers=authorization(), timeout=10.0).text
        counts = re.findall(r"^vllm:generation_tokens_total(?:{[^}]*})? (\S+)$", text, flags=re.MULTILINE)
        return int(sum(map(float, counts))) if counts else None
    return None


def _tokens_since(url: str, before: int, expected: int) -> int | None:
    """By how much the count has risen; waits a little for it to reach what is expected."""
    deadline = time.monotonic() + COUNTER_WAIT_S
    while (now := generated_tokens(url)) is not None:
        if now - before >= expected or time.monotonic() > deadline:
            return now - before
        time.sleep(0.1)
    return None


def _locust_command(endpoint: Endpoint, block: Block, load: Load, files: Mapping[str, Path]) -> list[str]:
    users = 1 if load.is_open else int(load.level)
    return [
        *(sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--only-summary"),
        *("--users", str(users), "--spawn-rate", str(users), "--host", endpoint.url),
        *(argument for kind, path in files.items() for argument in (f"--{kind}", str(path))),
        *("--model", endpoint.model, "--arm", block.arm, "--pair", str(block.pair), "--load", load.name),
        # failed requests are in the records; Locust itself must not fail for them
        *("--run-time", f"{BLOCK_TIMEOUT_S}s", "--exit-code-on-error", "0"),
        "OpenLoopUser" if load.is_open else "ClosedLoopUser",
    ]


def _run_locust(command: list[str], records_file: Path, advance: Callable[[int], None], log: Path) -> None:
    seen = 0
    with log.open("ab") as log_file:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log_file, stderr=log_file)
        try:
            while process.poll() is None:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(1.0)
                lines = records_file.read_text().count("\n")
                advance(lines - seen)
                seen = lines
        finally:
            process.kill()
            process.wait()
    if process.returncode != 0:
        raise UserError(f"Locust ended with code {process.returncode}; its log is {log}.")
