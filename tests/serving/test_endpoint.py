"""What clients, probes and operators get from the real thing. One endpoint for all; the last tests
break it."""

import json
import math
import os
import shlex
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import psutil
import pytest
from langchain_openai import ChatOpenAI
from prometheus_client.parser import text_string_to_metric_families

from tests.command_line import gradmap
from tests.conftest import ROOT, SQUAD
from tests.serving.endpoint import serving, still_running

pytestmark = pytest.mark.alone

KEY = "a key that must not be seen"
# Counts as public, and is reached by nobody but this machine.
ADDRESS = "127.0.0.2"
MODEL = "SmolLM2-135M-Instruct.Q4_1-minus-8"
BALANCER_WAIT_S, DRAIN_S = 3, 30
# Nats per token, of a mean over 8 x 127 tokens: a logit of about 20, rounded to 8 bits in each of
# 22 layers, errs by 20 * 2**-9 * 22**0.5 = 0.18 for one token, and by 0.006 on average; six
# standard deviations are at most
BFLOAT16_LOSS = 0.036
# What allocators keep back after a burst; a leak of one prompt per request would be larger after
# 400 requests.
MEMORY_SLACK_BYTES = 64e6


@pytest.fixture(scope="module")
def endpoint(artifact, tmp_path_factory):
    directory = tmp_path_factory.mktemp("endpoint")
    (directory / "key").write_text(KEY + "\n")
    options = ["--api-key-file", str(directory / "key"), "--balancer-wait-s", str(BALANCER_WAIT_S)]
    with serving(
        artifact, directory, *options, "--drain-s", str(DRAIN_S), host=ADDRESS
    ) as endpoint:
        first = wait_for_the_admin_port(endpoint)
        endpoint.wait_until_ready()
        endpoint.while_starting = first
        yield endpoint


def wait_for_the_admin_port(endpoint):
    while True:
        try:
            return {probe: endpoint.state(probe)[0] for probe in ("livez", "readyz", "startupz")}
        except httpx.TransportError:
            assert endpoint.process.poll() is None, endpoint.messages.read_text()
            time.sleep(0.05)


@pytest.fixture
def client(endpoint):
    return openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key=KEY, max_retries=0)


def post(endpoint, **request):
    body = {"model": MODEL, "prompt": "Once upon a time", "ignore_eos": True, **request}
    headers = {"Authorization": f"Bearer {KEY}"}
    return httpx.post(f"{endpoint.url}/v1/completions", json=body, headers=headers, timeout=120)


def test_probes_tell_a_start_from_readiness(endpoint):
    assert endpoint.while_starting == {"livez": 200, "readyz": 503, "startupz": 503}
    code, states = endpoint.state("startupz")
    assert (code, states[MODEL]["state"]) == (200, "ready")
    phases = states[MODEL]["phases_s"]
    assert list(phases) == [
        "importing vLLM",
        "starting the engine",
        "loading weights",
        "warming up",
        "starting the API",
        "first completion",
        "ready",
    ]
    assert list(phases.values()) == sorted(phases.values())


def test_what_is_served_is_said(endpoint, artifact, client):
    plan = json.loads((artifact / "gradmap.json").read_text())["plan"]
    (info,) = httpx.get(f"{endpoint.admin}/info").json()
    card = client.models.list().data[0]
    assert card.id == info["name"] == MODEL
    for told in (info, card.gradmap):
        assert told["plan_sha256"] == plan["sha256"]
        assert told["removed_layers"] == plan["removal_order"]
        assert told["base_model"].endswith("SmolLM2-135M-Instruct.Q4_1.gguf")


def test_openai_clients_get_what_they_ask_for(client):
    messages = [{"role": "user", "content": "Hello"}]
    chat = client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=4, logprobs=True, top_logprobs=2
    )
    assert 1 <= chat.usage.completion_tokens <= 4
    assert all(
        len(token.top_logprobs) == 2 and token.logprob <= 0
        for token in chat.choices[0].logprobs.content
    )
    greedy = {
        "model": MODEL,
        "prompt": "A",
        "max_tokens": 5,
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }
    completion = client.completions.create(**greedy, logprobs=1)
    assert completion.usage.completion_tokens == len(completion.choices[0].logprobs.tokens) == 5
    pieces = [event.choices[0].text for event in client.completions.create(**greedy, stream=True)]
    assert "".join(pieces) == completion.choices[0].text
    assert len(pieces) > 1


def test_langchain_works(endpoint):
    model = ChatOpenAI(model=MODEL, base_url=f"{endpoint.url}/v1", api_key=KEY, max_tokens=4)
    assert model.invoke("Hello").usage_metadata["output_tokens"] <= 4


def test_the_printed_curl_command_works(endpoint):
    line = next(
        line for line in endpoint.messages.read_text().splitlines() if line.startswith("Try")
    )
    command = line[line.index("curl ") :]
    environment = os.environ | {"VLLM_API_KEY": KEY}
    finished = subprocess.run(
        command, shell=True, capture_output=True, text=True, env=environment, check=True
    )
    assert json.loads(finished.stdout)["usage"]["completion_tokens"] <= 16
    assert shlex.split(command)[0] == "curl"


def test_bad_requests_get_4xx_and_do_no_harm(endpoint, client):
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="another", prompt="A")
    with pytest.raises(openai.BadRequestError, match="512"):
        client.completions.create(model=MODEL, prompt=[5] * 600, max_tokens=4)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key="wrong").models.list()
    assert post(endpoint, max_tokens=2).status_code == 200


def test_a_public_address_has_no_unguarded_routes(endpoint):
    for path in ("/metrics", "/version", "/load", "/docs", "/openapi.json"):
        assert httpx.get(endpoint.url + path).status_code == 404, path
    for path in ("/tokenize", "/invocations", "/scale_elastic_ep"):
        assert httpx.post(endpoint.url + path, json={}).status_code == 404, path
    assert httpx.get(f"{endpoint.url}/health").status_code == 200


def metric_families(endpoint):
    text = httpx.get(f"{endpoint.admin}/metrics").text
    return {family.name: family for family in text_string_to_metric_families(text)}


def test_one_scrape_has_our_metrics_and_vllms(endpoint):
    families = metric_families(endpoint)
    assert families["gradmap_serve_ready"].samples[0].value == 1
    assert families["vllm:generation_tokens"].samples[0].labels["model_name"] == MODEL
    assert families["vllm:generation_tokens"].samples[0].value > 0


def test_another_cache_salt_keeps_a_prompt_out_of_the_prefix_cache(endpoint):
    """A load test relies on it where a server stays: its prompts may have been sent before."""
    hits = []
    for salt in ("one", "another", "one"):
        asked, found = prefix_cache(endpoint)
        assert (
            post(endpoint, prompt=list(range(100, 400)), max_tokens=2, cache_salt=salt).status_code
            == 200
        )
        while (now := prefix_cache(endpoint))[0] == asked:  # the counters follow a moment later
            time.sleep(0.05)
        hits.append(now[1] - found)
    assert hits[:2] == [0, 0]
    assert hits[2] > 0


def prefix_cache(endpoint):
    """How many tokens were looked for, and how many were found."""
    families = metric_families(endpoint)
    names = ("vllm:prefix_cache_queries", "vllm:prefix_cache_hits")
    return tuple(
        next(one.value for one in families[name].samples if one.name == f"{name}_total")
        for name in names
    )


def test_the_dashboard_asks_for_metrics_that_exist(endpoint):
    known = {
        sample.name
        for family in text_string_to_metric_families(httpx.get(f"{endpoint.admin}/metrics").text)
        for sample in family.samples
    }
    dashboard = json.loads((ROOT / "deploy" / "grafana" / "gradmap.json").read_text())
    asked = {
        word
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for word in target["expr"].replace("(", " ").replace("[", " ").replace("{", " ").split()
        if word.startswith(("vllm:", "gradmap_"))
    }
    assert len(asked) > 8
    assert asked <= known


def test_no_key_and_no_prompt_is_in_argv_or_logs(endpoint):
    post(endpoint, prompt="the secret of the prompt", max_tokens=2)
    texts = [endpoint.messages.read_text(), (endpoint.messages.parent / "vllm.log").read_text()]
    texts += [
        " ".join(process.cmdline())
        for process in [psutil.Process(endpoint.process.pid), *endpoint.family()]
    ]
    for text in texts:
        assert KEY not in text
        assert "the secret of the prompt" not in text


def perplexity(out, *arguments):
    finished = gradmap(
        "eval", "--perplexity", f"squad={SQUAD}", "--limit", "8", "--out", out, *arguments
    )
    assert finished.returncode == 0, finished.stderr
    return math.log(json.loads(out.read_text())["dense"]["perplexity"]["squad"]["value"])


def test_the_served_model_has_the_perplexity_of_the_artifact(
    endpoint, artifact, tmp_path, monkeypatch
):
    expected = perplexity(tmp_path / "stock.json", "--model", artifact, "--dtype", "bfloat16")
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    served = perplexity(tmp_path / "served.json", "--model", endpoint.url, "--tokenizer", artifact)
    assert served == pytest.approx(expected, abs=BFLOAT16_LOSS)


def test_more_clients_than_fit_are_turned_away_cleanly(endpoint):
    family = endpoint.family()
    held = []
    for _ in range(3):
        with ThreadPoolExecutor(200) as pool:
            codes = list(pool.map(lambda _: post(endpoint, max_tokens=8).status_code, range(200)))
        assert set(codes) <= {200, 429, 503}
        assert codes.count(200) >= 32  # the queue's length
        held.append(sum(process.memory_info().rss for process in family))
    assert endpoint.family() == family
    assert held[-1] < held[0] + MEMORY_SLACK_BYTES
    assert post(endpoint, max_tokens=2).status_code == 200


def test_a_dead_engine_ends_readiness_and_is_replaced(endpoint):
    before = endpoint.family()
    next(process for process in before if "EngineCore" in " ".join(process.cmdline())).kill()
    deadline = time.monotonic() + 10
    while endpoint.state("readyz")[0] == 200:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not still_running(before)
    assert endpoint.state("livez")[0] == 200
    endpoint.wait_until_ready()
    assert endpoint.state("readyz")[1][MODEL]["restarts"] == 1
    assert "Restart 1 of 3" in endpoint.messages.read_text()
    assert post(endpoint, max_tokens=2).status_code == 200


def test_what_was_accepted_is_finished_before_the_end(endpoint):
    family = endpoint.family()
    begun = threading.Barrier(9)

    def stream(_):
        body = {
            "model": MODEL,
            "prompt": "Once",
            "max_tokens": 64,
            "ignore_eos": True,
            "stream": True,
        }
        # a busy server sends several tokens in one line
        body["stream_options"] = {"include_usage": True}
        headers = {"Authorization": f"Bearer {KEY}"}
        with httpx.stream(
            "POST", f"{endpoint.url}/v1/completions", json=body, headers=headers, timeout=90
        ) as response:
            lines = [line for line in iter_lines_after(response, begun) if line]
        usage = json.loads(lines[-2].removeprefix("data: "))["usage"]
        return usage["completion_tokens"], lines[-1]

    with ThreadPoolExecutor(9) as pool:
        streams = [pool.submit(stream, number) for number in range(8)]
        begun.wait(60)
        endpoint.process.send_signal(signal.SIGTERM)
        while endpoint.state("readyz")[0] == 200:
            time.sleep(0.02)
        assert endpoint.state("readyz")[1][MODEL]["state"] == "draining"
        late = pool.submit(post, endpoint, max_tokens=4)  # a balancer that has not noticed yet
        endpoint.process.send_signal(signal.SIGTERM)  # impatience changes nothing
        for one in streams:
            assert one.result() == (64, "data: [DONE]")
        assert late.result().status_code == 200
    assert endpoint.process.wait(BALANCER_WAIT_S + DRAIN_S + 15) == 0
    assert not still_running(family)


def iter_lines_after(response, begun):
    """Waits for the others once its first line has come."""
    lines = response.iter_lines()
    yield next(lines)
    begun.wait(60)
    yield from lines
