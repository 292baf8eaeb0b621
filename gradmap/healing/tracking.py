"""What training tells of itself while it runs: to TensorBoard, Weights & Biases or MLflow."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from gradmap.common.console import say
from gradmap.common.errors import UserError
from gradmap.common.processes import is_main_process

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

# What pip installs for each; its package has the tracker's name.
INSTALLED_BY = {"tensorboard": "'gradmap[track]'", "wandb": "wandb", "mlflow": "mlflow"}
# Weights & Biases' name for it is a project, MLflow's is an experiment.
PROJECT = "gradmap"

# Is told values by their names, behind so many tokens.
Track = Callable[[int, Mapping[str, float]], None]


def untracked(tokens: int, values: Mapping[str, float]) -> None:
    """Tells nobody."""


def require_trackers(names: Sequence[str]) -> None:
    """Raises UserError for a tracker that is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise UserError(
                f"--track {name} needs the package {name}; pip install {INSTALLED_BY[name]}."
            )


def tracking_directory(out: Path) -> Path:
    """Of TensorBoard's files, beside the plan `out`."""
    return out.with_name(f"{out.name}.tracking")


@contextmanager
def tracking(names: Sequence[str], out: Path, from_tokens: int) -> Iterator[Track]:
    """Yields what tells all trackers of the training of the plan `out`. Of several processes, the
    main one tells.

    from_tokens: where training begins or goes on; what TensorBoard's files hold from there on is of
    an interrupted run, and is not shown any more. Raises UserError if a tracker does not start.
    """
    asked = dict.fromkeys(names) if is_main_process() else {}
    trackers = [_started(name, out, from_tokens) for name in asked]

    def track(tokens: int, values: Mapping[str, float]) -> None:
        trackers[:] = [tracker for tracker in trackers if _takes(tracker, tokens, values)]

    try:
        yield track
    finally:
        for tracker in trackers:
            tracker.finish()


def _started(name: str, out: Path, from_tokens: int) -> GeneralTracker:
    tracker = _tracker(name, out, from_tokens)
    try:
        tracker.start()
    except Exception as error:
        # Not what it says: addresses of servers may hold a password.
        raise UserError(
            f"--track {name} does not start ({type(error).__name__}); set {name} up, or leave it "
            "out."
        ) from None
    return tracker


def _tracker(name: str, out: Path, from_tokens: int) -> GeneralTracker:
    # Torch and much else come with it, and whoever only asks what is installed waits for nothing.
    from accelerate.tracking import MLflowTracker, TensorBoardTracker, WandBTracker

    if name == "tensorboard":
        directory = tracking_directory(out)
        return TensorBoardTracker(directory.name, directory.parent, purge_step=from_tokens)
    if name == "wandb":
        return WandBTracker(os.environ.get("WANDB_PROJECT", PROJECT), name=out.name)
    return MLflowTracker(PROJECT, run_name=out.name)


def _takes(tracker: GeneralTracker, tokens: int, values: Mapping[str, float]) -> bool:
    """Whether a tracker takes values. One that does not is not asked again: hours of training are
    worth more than what is told of them."""
    try:
        tracker.log(dict(values), step=tokens)
    except Exception as error:
        say(f"{tracker.name} fails ({type(error).__name__}); training goes on without it")
        return False
    return True
