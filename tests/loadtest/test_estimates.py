"""Estimates against what was recorded, and what `gradmap doctor` and `run --dry-run` make of
them."""

import json
from dataclasses import replace

import pytest
import typer

from export.costs import ExportSize, export_bytes, export_seconds
from gradmap.cli import run_app
from gradmap.common.errors import EXIT_BUG, UserError
from gradmap.common.flags import flags_of
from gradmap.common.reading import read_json
from gradmap.costs.speed import Disk
from gradmap.costs.steps import Hardware
from gradmap.costs.timing import STARTING_S
from gradmap.evaluation.costs import PAPER_TASKS, EvaluationSize, evaluation_seconds
from gradmap.evaluation.tasks import PAPER_TASKS as TASK_NAMES
from gradmap.model.checkpoint import read_config
from gradmap.model.shape import Shape
from loadtest import commands
from loadtest.costs import CPU_SERVER, load_test_seconds
from loadtest.loads import ClosedLoop, OpenLoop
from loadtest.options import DENSE, PRUNED, LoadTestOptions
from loadtest.pipeline import estimates
from loadtest.pipeline.estimates import (
    Speeds,
    default_recipe,
    estimate_stages,
    misfits,
)
from loadtest.pipeline.recipe import Recipe, load_recipe
from loadtest.settings import LoadTestSettings
from tests.command_line import gradmap
from tests.conftest import ROOT

SMOLLM2 = Shape("SmolLM2-135M", 576, 1536, 30, 3 / 9, 49152, tied=True)
DISK = Disk("", 10**12, write=4e8, read=1e9)
# The two cores of an EPYC that benchmarks/results/amd-epyc-2-cores.json is of: one of them reached
# 85 GFLOP/s in float32 (benchmarks.importance, ShortGPT: the layers alone).
EPYC = Hardware(
    "cpu",
    flops=150e9,
    bandwidth=30e9,
    memory=20e9,
    efficiency=1.0,
    single_token_share=0.5,
    weight_bytes=4,
    state_bytes=4,
)
SERVED = replace(EPYC, flops=300e9, weight_bytes=2)


@pytest.fixture(scope="module")
def recorded():
    result = read_json(ROOT / "benchmarks" / "results" / "amd-epyc-2-cores.json")["end_to_end"][
        "result"
    ]
    return {name: stage["seconds"] for name, stage in result["stages"].items()}


@pytest.fixture(scope="module")
def demo():
    return load_recipe(ROOT / "recipes" / "smollm2.yaml")


@pytest.fixture
def speeds(picos, monkeypatch):
    """Of a pico model, on hardware that is not timed."""
    monkeypatch.setattr(estimates, "measure_hardware", lambda config, dtype, device: EPYC)
    return Speeds(read_config(str(picos["llama"].directory)), DISK)


def recipe_of(picos, word_file, **sections):
    text = f"file:{word_file}"
    sections = {
        "prune": {"remove": 2, "calibration": text},
        "eval": {"perplexity": {"a": text}, "limit": 5},
    } | sections
    return Recipe.model_validate({"model": str(picos["llama"].directory), **sections})


def within_two(seconds, measured):
    return measured / 2 < seconds < 2 * measured


def test_the_recorded_evaluation_is_within_a_factor_of_two(recorded, demo):
    size = EvaluationSize(2, 128, TASK_NAMES, demo.eval.limit, answers=True)
    seconds = evaluation_seconds(SMOLLM2, EPYC, size, (30, 22))
    assert within_two(seconds + STARTING_S, recorded["eval"])


def test_the_recorded_exports_are_within_a_factor_of_two(recorded, demo):
    size = ExportSize(demo.export.formats, roundings=2)
    assert within_two(export_seconds(SMOLLM2, EPYC, size, 22, DISK), recorded["export"])
    assert within_two(
        export_seconds(SMOLLM2, EPYC, ExportSize(["vllm"]), 30, DISK), recorded["baseline"]
    )


def test_the_recorded_load_test_is_within_a_factor_of_two(recorded, demo):
    settings = LoadTestSettings.of(demo.loadtest, DENSE, {PRUNED: PRUNED})
    seconds = load_test_seconds(settings, SMOLLM2, {DENSE: 30, PRUNED: 22}, SERVED, CPU_SERVER)
    assert within_two(seconds, recorded["loadtest"])


def test_every_task_of_the_paper_is_known():
    assert set(PAPER_TASKS) == set(TASK_NAMES)


def test_what_has_no_limit_is_not_known_but_for_the_paper_s_tasks():
    def seconds(*tasks, texts=0, limit=None):
        return evaluation_seconds(SMOLLM2, EPYC, EvaluationSize(texts, 128, tasks, limit), (30,))

    assert seconds("mmlu") is None and seconds(texts=1) is None
    assert 0 < seconds("mmlu", limit=10) < seconds("mmlu", limit=20)
    assert seconds("openbookqa") < seconds("hellaswag")
    assert seconds("openbookqa") == seconds("openbookqa", limit=10**6)


def test_every_token_of_a_text_passes_the_layers_and_the_head():
    size = EvaluationSize(2, 128, limit=10)
    passes_s = [
        2 * 128 * 10 * SMOLLM2.forward_flops(layers) / EPYC.sustained_flops for layers in (30, 22)
    ]
    assert evaluation_seconds(SMOLLM2, EPYC, size, (30, 22)) == pytest.approx(sum(passes_s))
    with_answers = evaluation_seconds(SMOLLM2, EPYC, replace(size, answers=True), (30, 22))
    assert with_answers > sum(passes_s)


def test_each_format_and_a_check_by_vllm_add_their_time():
    def seconds(*formats, **options):
        return export_seconds(SMOLLM2, EPYC, ExportSize(formats, **options), 22, DISK)

    assert (
        seconds("hf")
        < seconds("vllm", check_vllm=False) + 1
        < seconds("vllm")
        < seconds("hf", "vllm")
    )
    assert seconds("hf") < seconds("onnx")
    onnx, stock = (export_bytes(SMOLLM2, EPYC, ExportSize([name]), 22) for name in ("onnx", "hf"))
    assert stock < onnx
    # read from disk
    assert export_bytes(replace(SMOLLM2, layers=3000), EPYC, ExportSize(["hf"]), 3000) < EPYC.memory


def test_what_quantisation_looks_at_takes_time():
    def seconds(form, quantise=None, tokens=10**6):
        size = ExportSize([form], quantise=quantise, calibration_tokens=tokens)
        return export_seconds(SMOLLM2, EPYC, size, 22, DISK)

    pass_s = 10**6 * SMOLLM2.layer_flops(22) / EPYC.sustained_flops
    # the texts that it is judged on take time, too
    assert seconds("vllm") < seconds("vllm", "int8") < seconds("vllm") + pass_s
    assert seconds("vllm", "w4a16") - seconds("vllm", "int8") == pytest.approx(
        STARTING_S + 3 * pass_s
    )
    assert seconds("gguf", "q4_k_m") - seconds("gguf", "int8") == pytest.approx(STARTING_S + pass_s)


def test_a_full_load_test_starts_a_server_for_each_block():
    def seconds(**changes):
        settings = replace(LoadTestSettings(DENSE, {PRUNED: PRUNED}), **changes)
        return load_test_seconds(settings, SMOLLM2, {DENSE: 30, PRUNED: 22}, SERVED, CPU_SERVER)

    quick, full = seconds(pairs=3, interleaved=False), seconds()
    assert full > quick + 10 * CPU_SERVER.start  # 13 blocks and 2 stays
    assert seconds(find_rate=True) > full + 2 * CPU_SERVER.start
    open_loop = (ClosedLoop(1), OpenLoop("poisson", 2.0))
    longer = seconds(loads=open_loop, open_loop_s=100.0) - seconds(loads=open_loop)
    assert longer == pytest.approx(13 * 80)


def test_a_section_is_understood_as_the_command_understands_its_options(monkeypatch, tmp_path):
    understood = []
    monkeypatch.setattr(
        "loadtest.outcome.run_load_test",
        lambda settings, *rest: understood.append(settings) or 1 / 0,
    )
    for options in (
        {},
        {"quick": True, "concurrency": [4]},
        {"pairs": 7, "rate": [2.0], "arrivals": "burst", "open_loop_s": 5.0, "requests": 3},
        {
            "prompt_tokens": 9,
            "output_tokens": 8,
            "length_spread": 0.5,
            "shared_prefix": 2,
            "seed": 3,
        },
        {"find_rate": True, "slo": ["ttft_p95=200ms"], "vllm_flag": ["--enforce-eager"]},
    ):
        section = LoadTestOptions(**options)
        arms = ("--dense", DENSE, "--pruned", PRUNED, "--out", tmp_path)
        assert gradmap("loadtest", *arms, *flags_of(section)).returncode == EXIT_BUG
        expected = LoadTestSettings.of(section, DENSE, {PRUNED: PRUNED})
        assert understood.pop() == expected


def test_every_stage_of_a_recipe_is_estimated(picos, word_file, speeds):
    found = estimate_stages(recipe_of(picos, word_file), speeds)
    assert list(found) == ["prune", "eval", "export", "baseline", "loadtest"]
    prune = found["prune"]
    assert list(prune.parts) == ["choose layers", "repair"]
    assert prune.seconds == pytest.approx(sum(prune.parts.values()))
    assert all(estimate.seconds > 0 and estimate.peak_bytes > 0 for estimate in found.values())
    unknown = estimate_stages(
        recipe_of(picos, word_file, prune={"remove": 2, "calibration": "c4", "selector": "mka"}),
        speeds,
    )
    assert unknown["prune"].seconds is None and unknown["prune"].parts["repair"] > 0
    assert unknown["eval"].seconds == found["eval"].seconds


@pytest.mark.parametrize("budget", [{"budget_minutes": 3.0}, {"budget_tokens": 10_000}])
def test_healing_is_estimated_where_a_recipe_asks_for_it(picos, word_file, speeds, budget):
    heal = {"text": [f"file:{word_file}"], **budget}
    found = estimate_stages(recipe_of(picos, word_file, heal=heal), speeds)
    assert list(found) == ["prune", "heal", "eval", "export", "baseline", "loadtest"]
    more = {name: 2 * amount for name, amount in budget.items()}
    longer = estimate_stages(recipe_of(picos, word_file, heal=heal | more), speeds)["heal"]
    added = longer.seconds - found["heal"].seconds
    assert added == pytest.approx(180) if "budget_minutes" in budget else added > 0
    assert found["heal"].peak_bytes > 0


def test_a_schedule_takes_what_its_stages_take(picos, word_file, speeds):
    heal = {"text": [f"file:{word_file}"], "budget_tokens": 30_000}
    once = estimate_stages(recipe_of(picos, word_file, heal=heal), speeds)
    found = estimate_stages(recipe_of(picos, word_file, heal=heal | {"schedule": [1]}), speeds)
    assert list(found)[:4] == ["prune-1", "heal-1", "prune", "heal"]
    # two layers in two turns; half of the tokens, the first of them with a layer more
    first, both = (each.parts["choose layers"] for each in (found["prune-1"], once["prune"]))
    assert first < both
    assert found["heal"].seconds < found["heal-1"].seconds < once["heal"].seconds
    too_large = replace(found["prune-1"], peak_bytes=2e9, available_bytes=1e9)
    assert "prune-1 needs about 2 GB" in misfits({"prune-1": too_large})[0]


def test_without_vllm_a_load_test_is_not_known(picos, word_file, speeds, monkeypatch):
    monkeypatch.setattr(estimates, "is_cpu_build", lambda: False)
    monkeypatch.setattr(estimates, "find_spec", lambda name: None)
    found = estimate_stages(recipe_of(picos, word_file), speeds)
    assert found["loadtest"].seconds is None and found["export"].seconds > 0


def test_a_model_that_does_not_fit_is_named_with_a_cure(picos, word_file, speeds, monkeypatch):
    assert misfits(estimate_stages(recipe_of(picos, word_file), speeds)) == []
    monkeypatch.setattr(estimates, "measure_hardware", lambda *_: replace(EPYC, memory=10**6))
    small = Speeds(speeds.config, DISK)
    sentences = misfits(estimate_stages(recipe_of(picos, word_file), small))
    assert "prune needs about" in sentences[0] and "does not fit; use --stream" in sentences[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"remove": 5, "ratio": None}, "Cannot remove 5 of the 5 layers"),
        ({"remove": None, "ratio": None}, "Give either --remove K or --ratio R"),
        ({"remove": None, "ratio": 1.5}, "--ratio is 1.5"),
    ],
)
def test_counts_that_cannot_be_removed_are_refused(picos, speeds, options, message):
    with pytest.raises(UserError, match=message):
        estimate_stages(default_recipe(str(picos["llama"].directory), None, **options), speeds)


def run_doctor(capsys, *arguments):
    """As `gradmap doctor`; it is found by that name once the package is installed with its entry
    points."""
    app = typer.Typer()
    app.command("doctor")(commands.doctor)
    app.command("other")(lambda: None)
    code = run_app(lambda **options: app(["doctor", *map(str, arguments)], **options))
    return code, capsys.readouterr()


def test_doctor_describes_the_machine_and_with_a_model_each_stage(picos, capsys):
    code, output = run_doctor(capsys, "--json")
    assert code == 0 and "This machine" in output.out and "choose layers" not in output.out
    assert json.loads(output.out.splitlines()[-1])["machine"]["cores"] > 0
    code, output = run_doctor(capsys, "--model", picos["llama"].directory, "--ratio", 0.4, "--json")
    assert code == 0 and "prune: choose layers" in output.out and "loadtest" in output.out
    stages = json.loads(output.out.splitlines()[-1])["stages"]
    assert (
        stages["prune"]["seconds"] > 0
        and stages["prune"]["peak_bytes"] < stages["prune"]["available_bytes"]
    )


def test_doctor_refuses_what_it_cannot_estimate(picos, capsys):
    for arguments, message in (
        (["--remove", 2], "give --model"),
        (["--model", "nowhere/at/all", "--remove", 2], "does not exist"),
        (["--model", picos["llama"].directory], "Give either --remove K or --ratio R"),
        (["--model", picos["llama"].directory, "--remove", 9], "Cannot remove 9 of the 5 layers"),
    ):
        code, output = run_doctor(capsys, *arguments)
        assert code == 2 and message in output.err
        assert output.err.count("Error") == 1


def test_the_entry_point_is_declared():
    declared = (ROOT / "pyproject.toml").read_text()
    assert 'doctor = "loadtest.commands:doctor"' in declared
