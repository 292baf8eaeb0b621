"""What a method says of itself: what it is called, where it is from, what it needs and what it
costs.

A method is one file here, or in another installed package. It makes a `Selector` or a `Compensator`
and is found through an entry point (gradmap.methods.registry). Help texts, refusals, estimates, the
labels of figures and the tables of the documentation are made of what stands in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from gradmap.common.errors import UserError
from gradmap.costs.timing import Timing
from gradmap.methods.compensation import Compensation
from gradmap.methods.options import MethodOptions
from gradmap.methods.selection import Scorer
from gradmap.model.architectures import Architecture
from gradmap.model.sublayers import Unit


@dataclass(frozen=True)
class Job:
    """What is known before a model is loaded. layers: how many it has, of which `remove` are to go
    and those in `protected` stay. samples: of the calibration set. config: the contents of
    config.json. unit: what goes at a time."""

    config: dict[str, Any]
    architecture: Architecture
    layers: int
    remove: int
    protected: frozenset[int]
    samples: int
    unit: Unit = "layer"


def _any_job(job: Job, options: Any) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Method:
    """What selectors and compensators have in common.

    about: what it does, as the end of a sentence that begins with its name. paper: its name and
    arXiv id; empty if it is ours. in_memory: whether it changes or differentiates every weight, so
    that all must be in memory. by_held_out: whether it chooses by what it does on held-out samples.
    whole_layers: why it cannot do with pairs of sublayers that are no layer, if so; as the end of a
    sentence that begins with its name.
    options: the class of what else it can be asked for. check: raises UserError for a job, with
    these options, that it cannot do. seconds: None if that is not known. flag: how it is chosen;
    streaming: one that needs no weights in memory.
    """

    flag: ClassVar[str]
    streaming: ClassVar[str]
    name: str
    about: str
    paper: str = ""
    in_memory: bool = False
    by_held_out: bool = False
    whole_layers: str = ""
    options: type[MethodOptions] | None = None
    check: Callable[[Job, Any], None] = _any_job
    seconds: Timing | None = None

    def require_possible(self, job: Job, streamed: bool, options: Any) -> None:
        """Raises UserError if it cannot be done."""
        if streamed and self.in_memory:
            raise UserError(
                f"{self.flag} {self.name} needs all weights in memory; leave out --stream, or use "
                f"{self.streaming}."
            )
        if job.unit == "pair" and job.architecture.unpaired is not None:
            raise UserError(
                f"Of a {job.config['model_type']} model only whole layers can go: "
                f"{job.architecture.unpaired}; give --unit layer."
            )
        if job.unit == "pair" and self.whole_layers:
            raise UserError(
                f"{self.flag} {self.name} {self.whole_layers}; give --unit layer, or another one."
            )
        self.check(job, options)


@dataclass(frozen=True, kw_only=True)
class Selector(Method):
    """How layers are chosen.

    make: of a Subject (and of the options, if it has some) what scores its layers: the lowest goes
    first. score_label: what a score is, for the axis of a figure. round_takes: what a round of
    scores computes. nested: whether what it removes begins with what it removes for fewer layers;
    if not, it chooses all of them by its first scores.
    """

    flag: ClassVar[str] = "--selector"
    streaming: ClassVar[str] = "gradient"
    make: Callable[..., Scorer]
    score_label: str
    round_takes: str = "nothing"
    nested: bool = True


@dataclass(frozen=True, kw_only=True)
class Compensator(Method):
    """How the loss is repaired.

    run: makes corrections of a Pruned (and of the options, if it has some), which is left as it
    was. linear_output: whether it needs a down projection behind which nothing follows but the
    addition to the hidden state; fits_norms: whether an RMS norm may follow all the same.
    no_experts: why it does not work with a mixture of experts, if so.
    """

    flag: ClassVar[str] = "--compensator"
    streaming: ClassVar[str] = "sequential"
    run: Callable[..., Compensation]
    linear_output: bool = False
    fits_norms: bool = False
    no_experts: str = ""

    def require_possible(self, job: Job, streamed: bool, options: Any) -> None:
        """Raises UserError if it cannot be done."""
        uncorrectable, can_fit = job.architecture.uncorrectable, job.architecture.is_fitted
        if self.linear_output and uncorrectable is not None and not (self.fits_norms and can_fit):
            others = "refit, distil or none" if can_fit else "distil or none"
            raise UserError(
                f"The down projections of a {job.config['model_type']} model cannot be corrected "
                f"by --compensator {self.name}: {uncorrectable}; use {others}."
            )
        if self.no_experts and job.architecture.expert_down_projections is not None:
            raise UserError(f"{self.no_experts}; use sequential.")
        super().require_possible(job, streamed, options)
