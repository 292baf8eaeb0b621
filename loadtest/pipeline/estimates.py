"""What the stages of a recipe will take on this machine: seconds, within a factor of two, and
memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any

import torch

from export.costs import ExportSize, export_bytes, export_seconds
from export.formats import FORMATS, SERVED_FORMAT
from gradmap.costs.footprint import RUNTIME_BYTES, heal_bytes, prune_bytes, streamed_bytes
from gradmap.costs.speed import Disk, measure_hardware
from gradmap.costs.steps import CalibrationSize, Hardware
from gradmap.costs.timing import STARTING_S, Pruning, healing_seconds, streaming_seconds
from gradmap.evaluation.costs import EvaluationSize, evaluation_bytes, evaluation_seconds
from gradmap.evaluation.tasks import expand_names
from gradmap.healing.options import HealOptions
from gradmap.methods.costs import repair_seconds, select_seconds
from gradmap.model.architectures import architecture_of
from gradmap.model.loading import SPREAD, auto_dtype, resolve_device
from gradmap.model.precision import AUTOCAST
from gradmap.model.shape import Shape
from gradmap.pruning.budget import affordable_samples
from gradmap.pruning.checks import layers_to_remove, require_removable
from gradmap.pruning.presets import choose_methods
from gradmap.runtimes.vllm_environment import cpu_wants_float32, is_cpu_build
from loadtest.costs import CPU_SERVER, GPU_SERVER, ServerSpeed, load_test_seconds, serving_bytes
from loadtest.options import DENSE, PRUNED, LoadTestOptions
from loadtest.pipeline.recipe import EvalSection, PruneSection, Recipe
from loadtest.settings import LoadTestSettings

# Where a stage does not fit into memory.
CURES = {
    "prune": "use --stream, with --selector gradient and --compensator sequential",
    "heal": "use a larger machine",
    "eval": "use a larger machine",
    "export": "leave out the ONNX formats, or use a larger machine",
    "baseline": "use a larger machine",
    "loadtest": "remove more layers, or use a larger machine",
}


@dataclass(frozen=True)
class Estimate:
    """seconds: None where the arithmetic does not know. peak_bytes: of the largest process;
    available_bytes: what is free where it runs. parts: what the seconds are the sum of, by name,
    where a stage has several."""

    seconds: float | None
    peak_bytes: float
    available_bytes: float
    parts: Mapping[str, float | None] = field(default_factory=dict)

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.available_bytes


class Speeds:
    """What this machine makes of one model, in any dtype. Each is measured when it is first asked
    for."""

    def __init__(self, config: dict[str, Any], disk: Disk) -> None:
        self.config, self.disk = config, disk
        self._known: dict[tuple[str, str], Hardware] = {}

    def of(self, dtype: str | None, device: str | None) -> Hardware:
        """dtype, device: as the commands take them; None is auto."""
        place = resolve_device(device or "auto")
        spread = place == SPREAD
        place = "cuda:0" if spread else place
        found = auto_dtype(self.config, place) if dtype in (None, "auto") else str(dtype)
        if (found, place) not in self._known:
            self._known[found, place] = measure_hardware(self.config, found, place)
        hardware = self._known[found, place]
        return (
            replace(hardware, memory=hardware.memory * torch.cuda.device_count())
            if spread
            else hardware
        )

    def of_server(self) -> tuple[Hardware, ServerSpeed] | None:
        """What vLLM computes on; None if it is not installed, or finds nothing to compute on."""
        if is_cpu_build():
            return self.of("float32" if cpu_wants_float32() else AUTOCAST, "cpu"), CPU_SERVER
        if find_spec("vllm") is None or not torch.cuda.is_available():
            return None
        return self.of("bfloat16", "cuda"), GPU_SERVER


def default_recipe(
    model: str, gguf_file: str | None, remove: int | None, ratio: float | None
) -> Recipe:
    """What a first run of everything may look like; texts and tasks are limited, as in
    recipes/smollm2.yaml."""
    return Recipe(
        model=model,
        gguf_file=gguf_file,
        prune=PruneSection(calibration="wikipedia", remove=remove, ratio=ratio),
        eval=EvalSection(perplexity={"wikitext2": "wikitext2"}, tasks=["paper"], limit=100),
    )


def estimate_stages(recipe: Recipe, speeds: Speeds) -> dict[str, Estimate]:
    """By the name of the stage. Raises UserError if so many layers cannot be removed, or if the
    model's sizes are not known."""
    shape = Shape.of_config(speeds.config, recipe.model)
    remove = layers_to_remove(speeds.config, recipe.prune.remove, recipe.prune.ratio)
    require_removable(remove, shape.layers, recipe.model)
    left = shape.layers - remove
    return {
        **_estimate_plan(recipe, shape, remove, speeds),
        "eval": _estimate_eval(recipe, shape, left, speeds),
        "export": _estimate_export(recipe, shape, left, recipe.export.formats, speeds),
        "baseline": _estimate_export(recipe, shape, shape.layers, [SERVED_FORMAT], speeds),
        "loadtest": _estimate_load_test(recipe.loadtest, shape, left, speeds),
    }


def _estimate_plan(
    recipe: Recipe, shape: Shape, remove: int, speeds: Speeds
) -> dict[str, Estimate]:
    """The stages that make it."""
    asked = recipe.heal
    if asked is None:
        return {"prune": _estimate_prune(recipe.prune, shape, remove, speeds)}
    found: dict[str, Estimate] = {}
    gone = 0
    for turn in asked.turns:
        count = turn.removed or remove
        left = replace(shape, layers=shape.layers - gone)
        found[f"prune{turn.suffix}"] = _estimate_prune(recipe.prune, left, count - gone, speeds)
        found[f"heal{turn.suffix}"] = _estimate_heal(asked.of_each, shape, count, speeds)
        gone = count
    return found


def _estimate_prune(section: PruneSection, shape: Shape, remove: int, speeds: Speeds) -> Estimate:
    hardware = speeds.of(section.dtype, section.device)
    methods = choose_methods(
        section.preset,
        selector=section.selector,
        compensator=section.compensator,
        unit=section.unit,
    )
    correctable = architecture_of(speeds.config).is_fitted
    size = CalibrationSize(section.samples, section.tokens)
    pruning = Pruning(
        remove,
        methods.selector,
        methods.compensator,
        size,
        section.one_shot,
        correctable,
        methods.unit,
    )
    if section.budget_minutes is not None:
        samples = affordable_samples(shape, hardware, pruning, 60 * section.budget_minutes)
        pruning = replace(pruning, size=replace(size, samples=samples))
    needed = prune_bytes(shape, hardware, pruning)
    parts = {
        "choose layers": select_seconds(shape, hardware, pruning),
        "repair": repair_seconds(shape, hardware, pruning),
    }
    reading_s = _reading_s(shape, hardware, speeds)
    if section.stream:
        needed = RUNTIME_BYTES + streamed_bytes(shape, size)
        reading_s += streaming_seconds(shape, hardware, pruning, speeds.disk.read)
    parts["choose layers"] = _sum(parts["choose layers"], STARTING_S + reading_s)
    return Estimate(_sum(*parts.values()), needed, hardware.memory, parts)


def _reading_s(shape: Shape, hardware: Hardware, speeds: Speeds) -> float:
    """Of the whole checkpoint."""
    return hardware.weight_bytes * shape.parameters(shape.layers) / speeds.disk.read


def _estimate_heal(options: HealOptions, shape: Shape, remove: int, speeds: Speeds) -> Estimate:
    hardware, rank = speeds.of(options.dtype, options.device), options.trained_rank
    seconds = (
        healing_seconds(shape, hardware, remove, options.budget_tokens, rank)
        if options.budget_tokens is not None
        else 60 * (options.budget_minutes or 0.0)
    )
    reading_s = _reading_s(shape, hardware, speeds)
    return Estimate(
        seconds + STARTING_S + reading_s,
        heal_bytes(shape, hardware, remove, options.tokens, rank),
        hardware.memory,
    )


def _estimate_eval(recipe: Recipe, shape: Shape, left: int, speeds: Speeds) -> Estimate:
    section = recipe.eval
    hardware = speeds.of(section.dtype, section.device)
    size = EvaluationSize(
        texts=len(section.perplexity),
        segment=section.segment,
        tasks=expand_names(section.tasks),
        limit=section.limit,
        answers=section.answers,
    )
    seconds = evaluation_seconds(shape, hardware, size, (shape.layers, left))
    return Estimate(
        _sum(seconds, STARTING_S), evaluation_bytes(shape, hardware, size), hardware.memory
    )


def _estimate_export(
    recipe: Recipe, shape: Shape, layers: int, formats: list[str], speeds: Speeds
) -> Estimate:
    """Verified in float32 on the CPU."""
    section, cpu = recipe.export, speeds.of("float32", "cpu")
    known = [FORMATS[name] for name in formats if name in FORMATS]
    dtypes = [section.dtype or form.default_dtype for form in known]
    roundings = {dtype if dtype in ("float16", "bfloat16") else None for dtype in dtypes}
    size = ExportSize(
        formats,
        roundings=len(roundings),
        check_vllm=section.check_vllm and find_spec("vllm") is not None,
        quantise=section.quantise,
        calibration_tokens=recipe.prune.samples * recipe.prune.tokens,
    )
    seconds = export_seconds(shape, cpu, size, layers, speeds.disk)
    return Estimate(seconds, export_bytes(shape, cpu, size, layers), cpu.memory)


def _estimate_load_test(
    options: LoadTestOptions, shape: Shape, left: int, speeds: Speeds
) -> Estimate:
    found = speeds.of_server()
    if found is None:
        return Estimate(None, 0.0, 0.0)
    settings = LoadTestSettings.of(options, DENSE, {PRUNED: PRUNED})
    seconds = load_test_seconds(settings, shape, {DENSE: shape.layers, PRUNED: left}, *found)
    return Estimate(seconds, serving_bytes(shape, found[0]), found[0].memory)


def estimate_rows(estimates: Mapping[str, Estimate]) -> list[tuple[str, ...]]:
    """Stage, minutes, memory and what is available; a row for each part of a stage that has
    several."""
    rows = []
    for name, estimate in estimates.items():
        parts = {f"{name}: {part}": seconds for part, seconds in estimate.parts.items()}
        for label, seconds in (parts or {name: estimate.seconds}).items():
            rows.append((label, *estimate_cells(estimate, seconds)))
    seconds = _sum(*(estimate.seconds for estimate in estimates.values()))
    return [*rows, ("all", _minutes(seconds), "", "")]


def estimate_cells(estimate: Estimate, seconds: float | None) -> tuple[str, str, str]:
    sizes = (estimate.peak_bytes, estimate.available_bytes)
    peak, available = (f"{size / 1e9:.1f}" if size else "" for size in sizes)
    return _minutes(seconds), peak, available


def misfits(estimates: Mapping[str, Estimate]) -> list[str]:
    """A sentence for each stage that needs more memory than there is."""
    sentences = []
    for name, estimate in estimates.items():
        if not estimate.fits:
            sentences.append(
                f"{name} needs about {estimate.peak_bytes / 1e9:.0f} GB of memory and "
                f"{estimate.available_bytes / 1e9:.0f} GB are available: it does not fit; "
                f"{CURES[name.partition('-')[0]]}."
            )
    return sentences


def _minutes(seconds: float | None) -> str:
    return "not known" if seconds is None else f"{seconds / 60:,.1f}"


def _sum(*parts: float | None) -> float | None:
    """None if one is not known."""
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None
