"""Two processes make the plan of one, and any smaller plan follows from a larger one."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from gradmap.common.distributed import say_if_some_are_idle, sum_gradients
from tests.command_line import gradmap
from tests.gradmap.pruning.test_prune import prune_arguments


def without_record(plan):
    """What has to be the same: not the environment, the timings, or the --remove that was asked
    for."""
    return {
        key: plan[key]
        for key in ("base_model", "calibration", "removal_order", "steps", "corrections", "drift")
    }


def read(directory):
    return json.loads((directory / "plan.json").read_text())


@pytest.fixture(scope="module")
def alone(picos, word_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "plan"
    finished = gradmap(*prune_arguments(picos["llama"], word_file, out, remove=3))
    assert finished.returncode == 0, finished.stderr
    return out


def in_two_processes(*arguments):
    launcher = (
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "gradmap",
    )
    finished = subprocess.run(
        [*launcher, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished


def test_two_processes_make_the_same_plan(picos, alone, word_file, tmp_path):
    finished = in_two_processes(
        *prune_arguments(picos["llama"], word_file, tmp_path / "plan", remove=3)
    )
    assert finished.stdout.count("removed, in order") == 1  # one of them talks
    expected, actual = read(alone), read(tmp_path / "plan")
    assert actual["removal_order"] == expected["removal_order"]
    # float64 sums in another order
    for one, other in zip(actual["steps"], expected["steps"], strict=True):
        assert one["scores"] == pytest.approx(other["scores"], rel=1e-10)
    assert actual["drift"] == pytest.approx(expected["drift"], rel=1e-8)
    matrices, expected_matrices = (
        load_file(out / "corrections.safetensors") for out in (tmp_path / "plan", alone)
    )
    assert matrices.keys() == expected_matrices.keys()
    for name, matrix in matrices.items():
        torch.testing.assert_close(matrix, expected_matrices[name], rtol=1e-6, atol=1e-8)


def test_gradients_are_summed_up_in_one_message(monkeypatch):
    """With a process that has the same ones."""
    messages = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("torch.distributed.get_backend", lambda: "gloo")
    monkeypatch.setattr(
        "torch.distributed.all_reduce", lambda tensor: messages.append(len(tensor.mul_(2)))
    )
    parameters = [torch.zeros(shape, requires_grad=True) for shape in ((2, 3), (4,), (1, 1))]
    (parameters[0].sum() + 3 * parameters[2].sum()).backward()
    sum_gradients(parameters)
    assert messages == [6 + 4 + 1]
    for parameter, expected in zip(parameters, (2.0, 0.0, 6.0), strict=True):
        assert torch.equal(parameter.grad, torch.full_like(parameter, expected))


@pytest.mark.parametrize(
    ("processes", "said"), [(1, ""), (4, ""), (7, "3 of 7 processes are idle")]
)
def test_processes_for_which_a_step_of_training_has_no_sample_are_named(
    monkeypatch, capsys, processes, said
):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    say_if_some_are_idle(4)
    message = capsys.readouterr().err
    assert said in message
    assert bool(message) == bool(said)


def test_two_processes_repair_as_one_does(picos, word_file, tmp_path):
    plans = []
    for name, run in (("one", gradmap), ("two", in_two_processes)):
        arguments = prune_arguments(picos["llama"], word_file, tmp_path / name)
        assert run(*arguments, "--preset", "best").returncode == 0
        plans.append(read(tmp_path / name))
    one, two = plans
    assert one["removal_order"] == two["removal_order"]
    # sums in another order, over many steps
    for a, b in zip(one["corrections"], two["corrections"], strict=True):
        assert b["held_out_divergence_after"] == pytest.approx(
            a["held_out_divergence_after"], rel=1e-6
        )


@pytest.mark.parametrize("name", ["replace-me", "replace-me-cosine", "ghosted"])
def test_two_processes_find_the_matrix_of_a_block_as_one_does(picos, word_file, tmp_path, name):
    matrices = []
    chosen = ("--selector", "uidl", "--protect-first", 1, "--compensator", name)
    for number, run in enumerate((gradmap, in_two_processes)):
        arguments = prune_arguments(picos["llama"], word_file, tmp_path / str(number))
        assert run(*arguments, *chosen).returncode == 0
        matrices.append(load_file(tmp_path / str(number) / "corrections.safetensors"))
    one, two = matrices
    assert one.keys() == two.keys() and len(one) == 1
    for place, matrix in one.items():
        torch.testing.assert_close(two[place], matrix, rtol=1e-5, atol=1e-7)


def test_a_larger_plan_holds_every_smaller_one(picos, alone, word_file, tmp_path):
    pico = picos["llama"]
    from_larger = ("--from-plan", alone, "--remove", 2, "--out", tmp_path / "nested")
    for arguments in (
        prune_arguments(pico, word_file, tmp_path / "direct", remove=2),
        ("prune", "--model", pico.directory, *from_larger),
    ):
        finished = gradmap(*arguments)
        assert finished.returncode == 0, finished.stderr
    assert without_record(read(tmp_path / "nested")) == without_record(read(tmp_path / "direct"))
    assert read(tmp_path / "nested")["recipe"]["remove"] == 2


@pytest.mark.parametrize(
    ("family", "remove", "message"),
    [("llama", 5, "Cannot remove 5 of the 5 layers"), ("mistral", 2, "another model")],
)
def test_what_a_plan_does_not_hold_is_refused(picos, alone, tmp_path, family, remove, message):
    arguments = ("--model", picos[family].directory, "--remove", remove, "--from-plan", alone)
    finished = gradmap("prune", *arguments, "--out", tmp_path / "plan")
    assert finished.returncode == 2
    assert message in finished.stderr
    assert list(tmp_path.iterdir()) == []
