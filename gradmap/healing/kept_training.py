"""Training as it is kept on disk every few minutes, so that a run that was killed goes on."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gradmap.common.console import say
from gradmap.common.distributed import own_part, summed, whole
from gradmap.common.errors import UserError
from gradmap.common.files import atomic_directory, write_json
from gradmap.common.processes import is_main_process
from gradmap.common.reading import MALFORMED, read_json_object
from gradmap.healing.trainer import Progress, Trainer
from gradmap.pruning.journal import may_go_on
from gradmap.pruning.plan import HealingPoint

PROGRESS_FILE, TENSORS_FILE = "progress.json", "training.safetensors"
# At least so long in between, and no larger a share of the time for it.
KEEP_EVERY_S = 120.0
WRITING_SHARE = 0.05
MOMENTS = ("exp_avg", "exp_avg_sq")

_CURVE = TypeAdapter(list[HealingPoint])


@dataclass
class KeptTraining:
    """A directory beside the plan `out` that is being made. key: what training depends on, as name
    -> hash or setting. What several processes share is in it whole, so that any number of them can
    go on."""

    out: Path
    key: dict[str, Any]
    _kept_at: float = field(default_factory=time.monotonic)
    _wait_s: float = field(default_factory=lambda: KEEP_EVERY_S)

    @property
    def path(self) -> Path:
        return self.out.with_name(f".{self.out.name}.healing")

    def keep(self, trainer: Trainer) -> None:
        """Writes it if it was not written for a while; whole or not at all."""
        begun = time.monotonic()
        due = is_main_process() and begun - self._kept_at >= self._wait_s
        if not summed(torch.tensor(int(due))):
            return
        tensors = _tensors_of(trainer)
        if is_main_process():
            self._write(trainer, tensors)
        self._kept_at = time.monotonic()
        self._wait_s = max(KEEP_EVERY_S, (self._kept_at - begun) / WRITING_SHARE)

    def restore(self, trainer: Trainer, resume: bool | None) -> None:
        """Brings the trainer to where it was.

        resume: True requires a run of the same inputs, False ignores one, None goes on with one of
        the same inputs. Raises UserError if there is none to resume, its inputs were others, or it
        is damaged.
        """
        if resume is False:
            return
        with self._damage_refused():
            stored = self._stored()
            key = None if stored is None else dict(stored["key"])
        if not may_go_on(self.path, key, self.key, insist=bool(resume)):
            return
        assert stored is not None, "what is not there cannot be gone on with"
        with self._damage_refused():
            _put_back(trainer, stored, load_file(self.path / TENSORS_FILE))
            drawn = str(stored["samples_sha256"])
        trainer.samples.skip(trainer.progress.steps * trainer.options.samples_in_step)
        if trainer.samples.sha256 != drawn:
            raise UserError(
                f"A text is not what it was when {self.path} was trained on it; start over with "
                "--fresh."
            )
        say(f"Going on after {trainer.progress.steps} steps of an interrupted run ({self.path})")

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def _stored(self) -> dict[str, Any] | None:
        """None if there is nothing."""
        progress = self.path / PROGRESS_FILE
        return read_json_object(progress) if progress.is_file() else None

    @contextmanager
    def _damage_refused(self) -> Iterator[None]:
        try:
            yield
        except (UserError, SafetensorError, *MALFORMED):
            raise UserError(f"{self.path} is damaged; start over with --fresh.") from None

    def _write(self, trainer: Trainer, tensors: dict[str, Tensor]) -> None:
        progress = trainer.progress
        with atomic_directory(self.path, marker=PROGRESS_FILE) as partial:
            save_file(tensors, partial / TENSORS_FILE)
            write_json(
                partial / PROGRESS_FILE,
                {
                    "key": self.key,
                    "steps": progress.steps,
                    "seconds": progress.seconds,
                    "samples_sha256": trainer.samples.sha256,
                    "losses": progress.losses,
                    "curve": _CURVE.dump_python(progress.curve, mode="json"),
                },
            )


def _tensors_of(trainer: Trainer) -> dict[str, Tensor]:
    """Everything that training changes, whole and in the CPU's memory, by a name."""
    tensors: dict[str, Tensor] = {}
    for number, parameter in enumerate(trainer.parameters):
        state = trainer.optimizer.state[parameter]
        tensors[f"{number}.now"] = parameter
        tensors[f"{number}.best"] = trainer.progress.best[number]
        tensors |= {f"{number}.{moment}": state[moment] for moment in MOMENTS}
    return {name: whole(tensor).contiguous() for name, tensor in tensors.items()}


@torch.no_grad()
def _put_back(trainer: Trainer, stored: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    best: list[Tensor] = []
    for number, parameter in enumerate(trainer.parameters):
        own = {
            name: own_part(tensors[f"{number}.{name}"], parameter)
            for name in ("now", "best", *MOMENTS)
        }
        parameter.copy_(own["now"])
        best.append(own["best"])
        steps = torch.tensor(float(stored["steps"]))
        moments = {moment: own[moment] for moment in MOMENTS}
        trainer.optimizer.state[parameter] = {"step": steps, **moments}
    trainer.progress = Progress(
        steps=int(stored["steps"]),
        seconds=float(stored["seconds"]),
        losses=[float(loss) for loss in stored["losses"]],
        curve=_CURVE.validate_python(stored["curve"]),
        best=best,
    )
