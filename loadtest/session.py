"""Runs the blocks of a load test: starts one server at a time, warms it up, and lets Locust drive it."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from gradmap.console import progress, say
from gradmap.errors import UserError
from gradmap.files import read_json
from gradmap.openai_api import authorization, served_model
from loadtest.records import RequestRecord, read_records, to_json_line
from loadtest.workload import random_requests, save_requests
from serving.server import Server, ServerSettings, free_port

# In a folder of its own: Locust puts the folder of its file first on sys.path.
LOCUSTFILE = Path(__file__).parent / "driver" / "locustfile.py"
ARMS = ("dense", "pruned")
WARM_UP_REQUESTS = 4
# No block may run longer than this, whatever the server does.
BLOCK_TIMEOUT_S = 900


@dataclass(frozen=True)
class LoadTestSettings:
    """dense, pruned: model directories, or URLs of running servers. Each concurrency is one load in every block.

    pairs: blocks per arm. interleaved: a fresh server for every block, dense and pruned in random order within each
    pair; otherwise all dense blocks come first, on one server each.
    """

    dense: str
    pruned: str
    pairs: int = 6
    interleaved: bool = True
    concurrency: tuple[int, ...] = (1, 8)
    requests_per_block: int = 8
    prompt_tokens: int = 128
    output_tokens: int = 64
    seed: int = 0
    vocabulary: int | None = None
    vllm_flags: tuple[str, ...] = ()

    @property
    def expected_records(self) -> int:
        return len(ARMS) * self.pairs * sum(self.requests_at(level) for level in self.concurrency)

    def requests_at(self, concurrency: int) -> int:
        """At least two full rounds of the concurrency, so that the load is sustained."""
        return max(self.requests_per_block, 2 * concurrency)


@dataclass(frozen=True)
class Block:
    """One stay at one arm: every concurrency once."""

    arm: str
    pair: int


@dataclass(frozen=True)
class Endpoint:
    url: str
    model: str


def schedule(settings: LoadTestSettings) -> list[Block]:
    """The order of the blocks; the random order within pairs follows the seed."""
    if not settings.interleaved:
        return [Block(arm, pair) for arm in ARMS for pair in range(settings.pairs)]
    generator = random.Random(settings.seed)
    blocks = []
    for pair in range(settings.pairs):
        blocks += [Block(arm, pair) for arm in generator.sample(ARMS, len(ARMS))]
    return blocks


def run_session(settings: LoadTestSettings, out: Path) -> list[RequestRecord]:
    """Runs all blocks and returns their records, which are in `out`/records.jsonl as soon as each block ends.

    Raises UserError on bad input, or if a server fails.
    """
    check_settings(settings)
    vocabulary = settings.vocabulary or _vocabulary_of(settings)
    out.mkdir(parents=True, exist_ok=True)
    records: list[RequestRecord] = []
    with (out / "records.jsonl").open("w") as file:
        for arm, blocks in _consecutive(schedule(settings), fresh=settings.interleaved):
            with _open_endpoint(settings, arm, out) as endpoint:
                _run_load(endpoint, settings, vocabulary, Block(arm, -1), 1, WARM_UP_REQUESTS, out)
                for block in blocks:
                    for level in settings.concurrency:
                        count = settings.requests_at(level)
                        new = _run_load(endpoint, settings, vocabulary, block, level, count, out)
                        file.writelines(map(to_json_line, new))
                        file.flush()
                        records += new
    return records


def check_settings(settings: LoadTestSettings) -> None:
    """Raises UserError if the settings cannot be run."""
    if settings.pairs < 1:
        raise UserError(f"--pairs is {settings.pairs}; at least 1 is needed.")
    if not settings.concurrency or min(settings.concurrency) < 1:
        raise UserError("--concurrency must be 1 or more.")
    if settings.output_tokens < 2:
        raise UserError("--output-tokens must be 2 or more; TPOT is undefined below.")
    for arm in ARMS:
        target = getattr(settings, arm)
        if _is_url(target):
            _require_host(target)
        elif not Path(target, "config.json").is_file():
            raise UserError(f"--{arm} {target} is neither a URL nor a model directory; export one first.")


def _require_host(url: str) -> None:
    if urlsplit(url).hostname is None:
        raise UserError(f"{url} is no URL of a server; write it as http://HOST:PORT.")


def _is_url(target: str) -> bool:
    return target.startswith(("http://", "https://"))


def _vocabulary_of(settings: LoadTestSettings) -> int:
    """Token ids that both models know: the smaller vocabulary of those arms that are directories."""
    directories = [Path(target) for target in (settings.dense, settings.pruned) if not _is_url(target)]
    if not directories:
        raise UserError("Both endpoints are URLs; say with --vocabulary how many token ids they know.")
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
    target = getattr(settings, arm)
    if _is_url(target):
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
    endpoint: Endpoint,
    settings: LoadTestSettings,
    vocabulary: int,
    block: Block,
    concurrency: int,
    count: int,
    out: Path,
) -> list[RequestRecord]:
    """Lets Locust send `count` requests at one concurrency; prompts depend on pair and concurrency, not on the arm."""
    prefix = f"{block.pair}-{concurrency}"
    requests = random_requests(prefix, count, vocabulary, settings.prompt_tokens, settings.output_tokens, settings.seed)
    requests_file, records_file = out / ".requests.json", out / ".records.jsonl"
    save_requests(requests_file, requests)
    records_file.write_text("")
    name = "warm-up" if block.pair < 0 else f"pair {block.pair + 1}, concurrency {concurrency}"
    with progress(f"{block.arm}: {name} (requests)", count) as advance:
        command = _locust_command(endpoint, block, concurrency, requests_file, records_file)
        _run_locust(command, records_file, advance, out / "locust.log")
    records = read_records(records_file)
    requests_file.unlink()
    records_file.unlink()
    return records


def _locust_command(
    endpoint: Endpoint, block: Block, concurrency: int, requests_file: Path, records_file: Path
) -> list[str]:
    return [
        *(sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--only-summary"),
        *("--users", str(concurrency), "--spawn-rate", str(concurrency), "--host", endpoint.url),
        *("--requests", str(requests_file), "--records", str(records_file), "--model", endpoint.model),
        *("--arm", block.arm, "--pair", str(block.pair)),
        # failed requests are in the records; Locust itself must not fail for them
        *("--run-time", f"{BLOCK_TIMEOUT_S}s", "--exit-code-on-error", "0"),
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
