"""Recipes are strict, and a dry run says what a run would do."""

import json
from pathlib import Path

import pytest

from gradmap.common.errors import UserError
from gradmap.common.files import write_json
from gradmap.common.stages import stage_key
from loadtest.pipeline.recipe import load_recipe
from loadtest.pipeline.result import build_result
from loadtest.pipeline.run import plan_run, run_recipe
from loadtest.pipeline.stages import plan_stages
from tests.command_line import gradmap
from tests.conftest import ROOT
from tests.loadtest.recipes import MINIMAL, NAMES, finish
from tests.test_docs import COMMANDS

HEAL = (
    '{text: ["file:a.txt", "file:b.jsonl#body"], mix: [3, 1], budget_tokens: 4096, rank: 8, '
    "seed: 3, dtype: float32, track: [tensorboard]}"
)
FULL_EXPORT = (
    "{formats: [vllm], dtype: float16, quantise: int8, min_agreement: 0.8, max_divergence: 0.1, "
    "max_perplexity_ratio: 1.2, shard_size_gb: 2, check_vllm: false}"
)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("prunes: {}", "prunes: this key is not known"),
        ("loadtest: {speed: 2}", r"loadtest\.speed: this key is not known"),
        ("loadtest: {pairs: many}", r"loadtest\.pairs: .*integer"),
        ("export: {formats: [hf]}", "formats must include vllm"),
        ("model: [", "not valid YAML"),
        ("quality: {max_average_drop: 0.1}", r"quality\.max_average_drop needs eval\.tasks"),
        ("quality: {max_accuracy: 0.1}", r"quality\.max_accuracy: this key is not known"),
        ("loadtest: {slo: [fast]}", r"loadtest\.slo\.0: .*ttft_p95=200ms"),
        ("loadtest: {arrivals: rarely}", r"loadtest\.arrivals: .*'poisson'"),
        ("loadtest: {output_tokens: 1}", r"loadtest\.output_tokens: .*greater than or equal to 2"),
        ("loadtest: {against: none.json}", r"none\.json, which the recipe names, does not exist"),
        ("export: {formats: [vllm, exe]}", "Unknown format 'exe'"),
        ("export: {formats: [hf, vllm], quantise: int8}", "Format hf has no quantisation 'int8'"),
    ],
)
def test_recipes_with_mistakes_are_refused(recipe_file, tmp_path, extra, message):
    recipe_file.write_text(recipe_file.read_text() + extra)
    with pytest.raises(UserError, match=message):
        run_recipe(recipe_file, tmp_path / "out", None, False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("refuse", [run_recipe, plan_run])
@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("dtype: float8", "Unknown dtype 'float8'"),
        ("device: tpu", "Unknown device 'tpu'"),
        ("tasks: [piqa, no_such_task]", "has no task 'no_such_task'"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_pruning(
    recipe_file, tmp_path, refuse, asked, message
):
    recipe_file.write_text(recipe_file.read_text().replace("eval: {", f"eval: {{{asked}, "))
    with pytest.raises(UserError, match=message):
        refuse(recipe_file, tmp_path / "out", None, False)
    assert not (tmp_path / "out").exists()


def test_what_a_format_cannot_do_with_the_model_is_refused_before_pruning(
    tmp_path, picos, word_file
):
    (recipe_file := tmp_path / "recipe.yaml").write_text(
        MINIMAL.format(model=picos["gpt2"].directory, text=word_file)
        + "export: {formats: [vllm], quantise: int8}"
    )
    with pytest.raises(
        UserError, match="cannot quantise a model that stores its weights transposed"
    ):
        run_recipe(recipe_file, tmp_path / "out", None, False)
    assert not (tmp_path / "out").exists()


def test_a_tracker_that_is_not_installed_is_refused_before_any_work(
    recipe_file, tmp_path, monkeypatch
):
    recipe_file.write_text(recipe_file.read_text() + "heal: " + HEAL)
    monkeypatch.setattr("gradmap.healing.tracking.find_spec", lambda package: None)
    with pytest.raises(UserError, match=r"--track tensorboard needs .*gradmap\[track\]"):
        run_recipe(recipe_file, tmp_path / "out", None, False)
    assert not (tmp_path / "out").exists()


def test_an_unknown_stage_or_a_missing_recipe_is_refused(recipe_file, tmp_path):
    with pytest.raises(UserError, match="Unknown stage 'bake'"):
        run_recipe(recipe_file, tmp_path / "out", "bake", False)
    with pytest.raises(UserError, match="does not exist"):
        run_recipe(tmp_path / "none.yaml", tmp_path / "out", None, False)


def test_stage_commands_are_ones_the_command_line_knows(recipe_file, tmp_path):
    """Every option a recipe turns into a flag exists, so that a recipe cannot fail late on one."""
    commands = COMMANDS
    (full := tmp_path / "full.yaml").write_text(
        recipe_file.read_text() + "export: " + FULL_EXPORT + "\nheal: " + HEAL
    )
    recipes = [
        load_recipe(recipe_file),
        load_recipe(ROOT / "recipes" / "smollm2.yaml"),
        load_recipe(full),
    ]
    for stage in [stage for recipe in recipes for stage in plan_stages(recipe, tmp_path)]:
        name, *arguments = stage.arguments
        known = {
            option
            for parameter in commands[name].params
            for option in (*parameter.opts, *parameter.secondary_opts)
        }
        assert {
            argument.partition("=")[0] for argument in arguments if argument.startswith("--")
        } <= known


def test_both_arms_are_quantised_on_the_samples_of_the_plan(recipe_file, tmp_path):
    stages = {stage.name: stage for stage in plan_stages(load_recipe(recipe_file), tmp_path)}
    for name, option in {"export": "--plan", "baseline": "--samples-of"}.items():
        arguments = stages[name].arguments
        assert arguments[arguments.index(option) + 1] == str(tmp_path / "plan")
        assert tmp_path / "plan" in stages[name].inputs


def test_a_plan_is_healed_before_it_is_used_where_a_recipe_says_so(recipe_file, tmp_path):
    out = tmp_path / "out"
    plain = {stage.name: stage for stage in plan_stages(load_recipe(recipe_file), out)}
    recipe_file.write_text(recipe_file.read_text() + "heal: " + HEAL)
    stages = plan_stages(load_recipe(recipe_file), out)
    assert [stage.name for stage in stages] == ["prune", "heal", *NAMES[1:]]
    healed = {stage.name: stage for stage in stages}
    (unhealed,), (plan,) = healed["prune"].outputs, healed["heal"].outputs
    assert (plan,) == plain["prune"].outputs
    assert {unhealed, Path("a.txt"), Path("b.jsonl")} < set(healed["heal"].inputs)
    for name in NAMES[1:]:
        assert healed[name].arguments == plain[name].arguments
        assert healed[name].inputs == plain[name].inputs


def test_a_schedule_heals_on_the_way_and_shares_the_budget(recipe_file, tmp_path):
    asked = HEAL.replace("{", "{schedule: [1, 2], ").replace("4096", "9216")
    recipe_file.write_text(
        recipe_file.read_text().replace("remove: 2", "remove: 4") + "heal: " + asked
    )
    stages = plan_stages(load_recipe(recipe_file), tmp_path)
    names = ["prune-1", "heal-1", "prune-2", "heal-2", "prune", "heal"]
    assert [stage.name for stage in stages] == [*names, *NAMES[1:]]
    made = dict(zip(names, stages, strict=False))
    assert "--remove=1" in made["prune-1"].arguments
    assert "--from-plan" not in made["prune-1"].arguments
    for before, pruned, count in (("heal-1", "prune-2", 2), ("heal-2", "prune", 4)):
        (plan,) = made[before].outputs
        arguments = made[pruned].arguments
        assert arguments[arguments.index("--from-plan") + 1] == str(plan)
        assert plan in made[pruned].inputs
        assert f"--remove={count}" in arguments
    for number in range(0, len(names), 2):
        assert stages[number].outputs[0] in stages[number + 1].inputs
        assert "--budget-tokens=3072" in stages[number + 1].arguments
    last = {output for name in names for output in made[name].outputs}
    assert len(last) == len(names)
    assert made["heal"].outputs == (tmp_path / "plan",)


@pytest.mark.parametrize("refuse", [run_recipe, plan_run])
@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("[2]", "heal.schedule heals without 2 layers, and 2 are removed in all"),
        ("[2, 1]", "schedule must name each count once, the lowest first"),
        ("[0]", "greater than or equal to 1"),
        ("[1]", "shared by 2 healings, less than a step of 4096"),
    ],
)
def test_a_schedule_that_cannot_be_kept_is_refused(
    recipe_file, tmp_path, refuse, schedule, message
):
    budget = 4096 if "shared" in message else 3 * 4096
    (text := tmp_path / "a.txt").write_text("text")
    recipe_file.write_text(
        recipe_file.read_text()
        + f'heal: {{text: ["file:{text}"], schedule: {schedule}, step_tokens: 4096, '
        f"budget_tokens: {budget}}}"
    )
    with pytest.raises(UserError, match=message):
        refuse(recipe_file, tmp_path / "out", None, False)
    assert not (tmp_path / "out").exists()


def test_a_stage_depends_on_its_command_and_its_inputs(tmp_path):
    (tmp_path / "text.jsonl").write_text("a")
    recipe = """
model: m
prune: {remove: 2, calibration: "file:%s"}
eval: {perplexity: {a: "file:b.txt"}}
"""
    path = tmp_path / "recipe.yaml"

    def key() -> str:
        path.write_text(recipe % (tmp_path / "text.jsonl#field"))
        return stage_key(plan_stages(load_recipe(path), Path("out"))[0])

    first = key()
    assert key() == first
    (tmp_path / "text.jsonl").write_text("b")
    changed_input = key()
    assert changed_input != first
    recipe = recipe.replace("remove: 2", "remove: 3")
    assert key() != changed_input


def running(recipe_file, out, from_stage=None, fresh=False):
    planned = plan_run(recipe_file, out, from_stage, fresh)
    assert [stage.name for stage in planned] == NAMES
    return [stage.name for stage in planned if stage.runs]


def files_below(directory):
    return {path: path.stat().st_mtime_ns for path in sorted(directory.rglob("*"))}


def test_a_dry_run_writes_nothing_and_estimates_every_stage(recipe_file, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADMAP_CACHE", str(tmp_path / "cache"))
    before = files_below(tmp_path)
    finished = gradmap("run", recipe_file, "--dry-run", "--out", tmp_path / "out", "--json")
    assert finished.returncode == 0, finished.stderr
    assert files_below(tmp_path) == before
    stages = json.loads(finished.stdout.splitlines()[-1])["stages"]
    assert [stage["name"] for stage in stages] == NAMES and all(stage["runs"] for stage in stages)
    assert all(name in finished.stdout for name in NAMES)
    assert stages[0]["estimate"]["seconds"] > 0
    # the text is not limited
    assert stages[1]["estimate"]["seconds"] is None and "not known" in finished.stdout


def test_a_dry_run_says_which_stages_are_done_and_which_would_run_for_an_earlier_one(
    recipe_file, tmp_path
):
    out = tmp_path / "out"
    assert running(recipe_file, out) == NAMES
    finish(recipe_file, out, *NAMES)
    assert running(recipe_file, out) == []
    assert running(recipe_file, out, fresh=True) == NAMES
    assert running(recipe_file, out, from_stage="baseline") == ["baseline", "loadtest"]
    (out / "vllm" / "gradmap.json").unlink()
    assert running(recipe_file, out) == ["export", "loadtest"]
    (out / "plan" / "plan.json").write_text("{ }")
    assert running(recipe_file, out) == NAMES
    finish(recipe_file, out, *NAMES)
    recipe_file.write_text(recipe_file.read_text().replace("remove: 2", "remove: 3"))
    assert running(recipe_file, out) == NAMES


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("prunes: {}", "prunes: this key is not known"),
        ("loadtest: {against: none.json}", r"none\.json, which the recipe names, does not exist"),
        ("export: {formats: [vllm, exe]}", "Unknown format 'exe'"),
        ("export: {formats: [hf, vllm], quantise: int8}", "Format hf has no quantisation 'int8'"),
    ],
)
def test_a_dry_run_refuses_what_a_run_would(recipe_file, tmp_path, extra, message):
    recipe_file.write_text(recipe_file.read_text() + extra)
    with pytest.raises(UserError, match=message):
        plan_run(recipe_file, tmp_path / "out", None, False)
    with pytest.raises(UserError, match="Unknown stage 'bake'"):
        plan_run(ROOT / "recipes" / "smollm2.yaml", tmp_path / "out", "bake", False)


def test_a_report_has_no_results_of_another_protocol(tmp_path):
    write_json(tmp_path / "eval.json", {"schema_version": 2, "dense": {}, "pruned": {}})
    with pytest.raises(
        UserError, match=r"has evaluation schema 2.* cannot be compared; evaluate again"
    ):
        build_result(tmp_path, {}, {})
