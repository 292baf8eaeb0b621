"""What a start says: phases, errors, logs, warnings, and a command to try the server with."""

import json
import shlex
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from gradmap.common.errors import UserError
from serving.chat import has_chat_template
from serving.launch import curl_command, run
from serving.log import PHASES, Log, Output
from serving.settings import ServerSettings


def test_an_error_is_told_from_what_it_led_to(tmp_path):
    log = Log(tmp_path / "log")
    output = Output(log)
    output.follow(
        [
            b"Found ulimit of 20000 and failed; this can cause errors like "
            b"`OSError: [Errno 24] Too many open files`.\n",
            b"(EngineCore pid=7) ERROR 11-25 09:14:31 [core.py:9]   File 'x'\n",
            b"(EngineCore pid=7) ERROR 11-25 09:14:31 [core.py:9] "
            b"torch.OutOfMemoryError: CUDA out of memory\r\n",
            b"(APIServer pid=5) RuntimeError: Engine core initialization failed. "
            b"See root cause above.\n",
        ]
    )
    assert output.error() == "OutOfMemoryError: CUDA out of memory"
    assert (tmp_path / "log").read_text().count("\n") == 4


@pytest.mark.parametrize(
    ("lines", "phases"),
    [
        (
            [
                "Loading weights took 0.12 seconds",
                "Warming up model for the compilation...",
                "Warming up done.",
            ],
            ["warming up", "compiling"],
        ),
        (
            [
                "Starting torch.compile",
                "Dynamo bytecode transform time: 5.21 s",
                "torch.compile took 31.40 s in total",
                "Profiling CUDA graph memory: FULL=35 (largest=512)",
                "init engine (profile, create kv cache) took 60 s",
            ],
            ["compiling", "profiling memory", "capturing CUDA graphs", "starting the API"],
        ),
    ],
)
def test_a_start_says_what_it_waits_for(tmp_path, lines, phases):
    seen: list = []
    output = Output(Log(tmp_path / "log"), seen.append)
    assert output.phase == "importing vLLM"
    output.follow(
        [f"(EngineCore pid=7) INFO 11-25 09:14:31 [a.py:1] {line}\n".encode() for line in lines]
    )
    assert (seen, output.phase) == (phases, phases[-1])


def test_phases_are_told_by_lines_that_this_vllm_logs():
    packages = [find_spec(name) for name in ("vllm", "uvicorn")]
    if None in packages:
        pytest.skip("vLLM is not installed")
    missing = set(PHASES)
    for path in [
        path for package in packages for path in Path(package.origin).parent.rglob("*.py")
    ]:
        missing -= {sign for sign in missing if sign in path.read_text()}
    assert not missing


def test_logs_can_be_objects(tmp_path, capsys):
    log = Log(tmp_path / "log", as_json=True)
    log.say("ready")
    log.relay(
        "\x1b[0;36m(APIServer pid=5)\x1b[0;0m \x1b[33mWARNING\x1b[0m 11-25 09:14:31 [a.py:1] "
        "careful"
    )
    assert json.loads(capsys.readouterr().err)["message"] == "ready"
    entry = json.loads((tmp_path / "log").read_text())
    assert (entry["source"], entry["level"]) == ("vllm", "WARNING")
    assert entry["message"] == "(APIServer pid=5) WARNING 11-25 09:14:31 [a.py:1] careful"


def test_a_chat_template_is_looked_for_where_vllm_does(tmp_path):
    assert not has_chat_template(tmp_path, ())
    assert has_chat_template(tmp_path, ("--chat-template", "FILE"))
    assert not has_chat_template(tmp_path, ("--chat-template-content-format", "string"))
    for name, content in (
        ("tokenizer_config.json", '{"chat_template": "{{ messages }}"}'),
        ("chat_template.jinja", "{{ messages }}"),
        ("chat_template.json", '{"chat_template": "{{ messages }}"}'),
    ):
        (tmp_path / name).write_text(content)
        assert has_chat_template(tmp_path, ())
        (tmp_path / name).unlink()
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": null}')
    assert not has_chat_template(tmp_path, ())


def test_a_model_that_cannot_chat_is_warned_about_at_the_start(stand_in, tmp_path, capfd):
    launch = stand_in("--fail", "ValueError: no room")
    for flags, warned in (((), True), (("--chat-template", "FILE"), False)):
        settings = replace(launch.settings, vllm_flags=flags)
        with pytest.raises(UserError, match="no room"):
            run(replace(launch, settings=settings), Log(tmp_path / "log"))
        assert ("Warning: llama has no chat template" in capfd.readouterr().err) == warned


def test_the_printed_command_is_one_for_a_shell_whatever_names_are(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    settings = ServerSettings(Path("m"), certificate=Path("a b/$(touch x).pem"))
    words = shlex.split(curl_command(settings, "it's $(touch x)"))
    assert words[words.index("--cacert") + 1] == "a b/$(touch x).pem"
    assert json.loads(words[words.index("-d") + 1])["model"] == "it's $(touch x)"
    assert "Authorization: Bearer $VLLM_API_KEY" in words
    assert "secret" not in " ".join(words)
