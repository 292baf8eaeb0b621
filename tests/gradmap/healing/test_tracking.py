"""What trackers are told of training, read again by TensorBoard's own reader."""

import sys
from types import ModuleType

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gradmap.common.errors import UserError
from gradmap.healing import kept_training, tracking
from gradmap.healing.kept_training import KeptTraining
from tests.command_line import gradmap
from tests.gradmap.healing.small_healings import (
    STEP,
    TOKENS,
    KilledError,
    asking,
    heal_pico,
    manual_plan,
)
from tests.gradmap.model.test_distributed import in_two_processes

STEPS = 20
OF_A_STEP = ("training_divergence", "learning_rate", "tokens_per_second")


@pytest.fixture(scope="module")
def plan(picos, word_file, tmp_path_factory):
    return manual_plan(picos["llama"], word_file, tmp_path_factory.mktemp("plan") / "plan")


def asking_to_track(word_file, *names):
    return asking(word_file, budget_tokens=STEPS * STEP, track=list(names))


def scalars(out):
    """name -> {tokens: value}, of the files beside a plan. No tokens may come twice."""
    reader = EventAccumulator(str(tracking.tracking_directory(out))).Reload()
    found = {}
    for name in reader.Tags()["scalars"]:
        events = reader.Scalars(name)
        found[name] = {event.step: event.value for event in events}
        assert len(found[name]) == len(events), name
    return found


def require_whole(found, healed):
    """All steps, and the looks that the plan has."""
    for name in OF_A_STEP:
        assert list(found[name]) == [STEP * step for step in range(1, STEPS + 1)], name
    curve = {point.tokens: point.held_out_divergence for point in healed.healing[0].curve}
    # TensorBoard stores float32
    assert found["held_out_divergence"] == pytest.approx(curve, rel=1e-6)
    trained = list(found["training_divergence"].values())
    looks = [point.tokens // STEP for point in healed.healing[0].curve]
    for before, after, point in zip(looks, looks[1:], healed.healing[0].curve[1:], strict=False):
        mean = sum(trained[before:after]) / (after - before)
        assert mean == pytest.approx(point.training_divergence, rel=1e-6)
    assert found["learning_rate"][STEPS * STEP] == pytest.approx(5e-4)  # a tenth of the highest
    assert min(found["tokens_per_second"].values()) > 0


def test_tensorboard_is_told_of_every_step_and_look(picos, plan, word_file, tmp_path):
    out = tmp_path / "healed"
    options = asking_to_track(word_file, "tensorboard", "tensorboard")
    healed = heal_pico(picos, plan, options, out)
    require_whole(scalars(out), healed)
    assert "track" not in healed.healing[0].recipe


def test_a_run_that_was_killed_goes_on_in_its_curves(
    picos, plan, word_file, tmp_path, capsys, monkeypatch
):
    """Steps that were told of, but not kept, come once."""
    keep, rounds = KeptTraining.keep, []

    def keep_the_first(self, trainer):
        rounds.append(trainer)
        if len(rounds) == 2:
            raise KilledError
        keep(self, trainer)

    monkeypatch.setattr(kept_training, "KEEP_EVERY_S", 0.0)
    out, options = tmp_path / "healed", asking_to_track(word_file, "tensorboard")
    with monkeypatch.context() as killed, pytest.raises(KilledError):
        killed.setattr(KeptTraining, "keep", keep_the_first)
        heal_pico(picos, plan, options, out)
    assert len(scalars(out)["training_divergence"]) == 16
    healed = heal_pico(picos, plan, options, out, resume=True)
    assert "Going on after 8 steps" in capsys.readouterr().err
    require_whole(scalars(out), healed)


def test_another_tracker_is_no_reason_to_start_over(word_file):
    none, one = asking_to_track(word_file), asking_to_track(word_file, "tensorboard")
    assert none.of_training == one.of_training


def test_training_that_starts_over_replaces_the_curves(picos, plan, word_file, tmp_path):
    out = tmp_path / "healed"
    heal_pico(picos, plan, asking_to_track(word_file, "tensorboard"), out)
    shorter = asking_to_track(word_file, "tensorboard").model_copy(
        update={"budget_tokens": 3 * STEP}
    )
    heal_pico(picos, plan, shorter, out)
    found = scalars(out)
    assert list(found["learning_rate"]) == [STEP, 2 * STEP, 3 * STEP]
    assert list(found["held_out_divergence"]) == [0, 3 * STEP]


def test_of_two_processes_one_tells(picos, plan, word_file, tmp_path):
    model = ("--model", picos["llama"].directory, "--plan", plan)
    asked = ("--text", f"file:{word_file}", "--tokens", TOKENS, "--step-tokens", STEP)
    budget = ("--budget-tokens", 3 * STEP, "--held-out", 8, "--track", "tensorboard")
    in_two_processes("heal", *model, *asked, *budget, "--out", tmp_path / "healed")
    assert len(list(tracking.tracking_directory(tmp_path / "healed").iterdir())) == 1
    assert len(scalars(tmp_path / "healed")["training_divergence"]) == 3


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_what_is_not_installed_is_said_at_once(picos, plan, word_file, tmp_path, name, monkeypatch):
    monkeypatch.setattr(tracking, "find_spec", lambda package: None)
    with pytest.raises(UserError, match=rf"--track {name} needs .*; pip install {name}\."):
        heal_pico(picos, plan, asking_to_track(word_file, name), tmp_path / "healed")
    assert not (tmp_path / "healed").exists()


def test_a_tracker_that_does_not_exist_is_refused(picos, plan, word_file, tmp_path):
    asked = ("--text", f"file:{word_file}", "--budget-tokens", 1024, "--track", "tensorbord")
    model = ("--model", picos["llama"].directory, "--plan", plan)
    finished = gradmap("heal", *model, *asked, "--out", tmp_path / "healed")
    assert finished.returncode == 2
    assert "give tensorboard, wandb or mlflow" in finished.stderr


class StandIn(ModuleType):
    """Of `wandb`, as far as it is called."""

    def __init__(self, failing_at=None):
        super().__init__("wandb")
        self.asked, self.told, self.finished, self.failing_at = {}, [], 0, failing_at

    def init(self, **asked):
        self.asked = asked
        if self.failing_at == "start":
            raise RuntimeError("https://user:password@example.org")
        return self

    def log(self, values, step):
        if self.failing_at == step:
            raise RuntimeError("https://user:password@example.org")
        self.told.append((step, values))

    def finish(self):
        self.finished += 1


def start_wandb(monkeypatch, failing_at=None):
    wandb = StandIn(failing_at)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(tracking, "require_trackers", lambda names: None)
    return wandb


def test_several_trackers_are_told_the_same(tmp_path, monkeypatch):
    wandb, out = start_wandb(monkeypatch), tmp_path / "healed"
    with tracking.tracking(["tensorboard", "wandb"], out, 1) as track:
        for tokens in (64, 128):
            track(tokens, {"learning_rate": tokens / 1024})
    assert wandb.asked == {"project": "gradmap", "name": "healed"}
    assert wandb.told == [(64, {"learning_rate": 0.0625}), (128, {"learning_rate": 0.125})]
    assert wandb.finished == 1
    assert scalars(out) == {"learning_rate": {64: 0.0625, 128: 0.125}}


def test_a_tracker_that_fails_does_not_end_training_nor_tell_secrets(tmp_path, monkeypatch, capsys):
    wandb, out = start_wandb(monkeypatch, failing_at=128), tmp_path / "healed"
    with tracking.tracking(["wandb", "tensorboard"], out, 1) as track:
        for tokens in (64, 128, 192):
            track(tokens, {"learning_rate": 0.5})
    assert [tokens for tokens, _ in wandb.told] == [64]
    assert list(scalars(out)["learning_rate"]) == [64, 128, 192]
    told = capsys.readouterr().err
    assert told.count("wandb fails (RuntimeError); training goes on without it") == 1
    assert "password" not in told


def test_a_tracker_that_does_not_start_is_a_sentence_without_secrets(tmp_path, monkeypatch):
    start_wandb(monkeypatch, failing_at="start")
    with (
        pytest.raises(UserError, match="--track wandb does not start") as caught,
        tracking.tracking(["wandb"], tmp_path / "healed", 1),
    ):
        pass
    assert "password" not in str(caught.value)
