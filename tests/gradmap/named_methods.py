"""Methods by name, as `gradmap prune` runs them: what they cannot do is refused before."""

from __future__ import annotations

from gradmap.methods.base import Job
from gradmap.methods.compensation import Compensation, Pruned
from gradmap.methods.options import MethodOptions
from gradmap.methods.registry import compensator, selector, selector_names
from gradmap.methods.selection import Scorer, Subject
from gradmap.model.layered import LayeredModel
from gradmap.model.sublayers import Unit

NOT_NESTED = {name for name in selector_names() if not selector(name).nested}


def make_scorer(name: str, subject: Subject, **options: object) -> Scorer:
    """options: of those of the selector."""
    method = selector(name)
    given = _given(method.options, options)
    samples = len(subject.calibration.input_ids)
    job = _job(subject.model, subject.count, subject.protected, samples, subject.unit)
    method.require_possible(job, subject.streamed, *given or (None,))
    return method.make(subject, *given)


def repair(name: str, pruned: Pruned, **options: object) -> Compensation:
    """options: of those of the compensator."""
    method = compensator(name)
    given = _given(method.options, options)
    samples = len(pruned.calibration.input_ids)
    unit: Unit = "layer" if all(pair.is_layer for pair in pruned.removed) else "pair"
    job = _job(pruned.model, len(pruned.removed), frozenset(), samples, unit)
    method.require_possible(job, False, *given or (None,))
    return method.run(pruned, *given)


def _given(
    kind: type[MethodOptions] | None, options: dict[str, object]
) -> tuple[MethodOptions, ...]:
    return () if kind is None else (kind(**options),)


def _job(
    model: LayeredModel, remove: int, protected: frozenset[int], samples: int, unit: Unit
) -> Job:
    config = model.config.to_dict()
    layers = len(model.layers)
    return Job(config, model.architecture, layers, remove, protected, samples, unit)
