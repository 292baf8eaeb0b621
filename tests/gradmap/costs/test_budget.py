"""A budget of minutes becomes a number of samples."""

from dataclasses import replace

from gradmap.costs.steps import CalibrationSize, Hardware
from gradmap.costs.timing import Pruning
from gradmap.methods.costs import repair_seconds, select_seconds
from gradmap.model.shape import Shape
from gradmap.pruning import budget
from gradmap.pruning.budget import LEAST_SAMPLES, affordable_samples, samples_within_budget
from gradmap.pruning.settings import PruneSettings
from tests.gradmap.costs.test_costs import HARDWARE, shape_of


def test_a_budget_buys_as_many_samples_as_are_estimated_to_fit():
    shape = shape_of("llama")
    hardware = Hardware("here", flops=1e9, bandwidth=1e9, memory=1e9, efficiency=1.0)
    pruning = Pruning(remove=2)

    def seconds(samples):
        smaller = replace(pruning, size=CalibrationSize(samples, pruning.size.tokens))
        return select_seconds(shape, hardware, smaller) + repair_seconds(shape, hardware, smaller)

    whole_s = seconds(pruning.size.samples)
    assert affordable_samples(shape, hardware, pruning, whole_s) == pruning.size.samples
    bought = [
        affordable_samples(shape, hardware, pruning, share * whole_s)
        for share in (0.9, 0.5, 0.25, 0.0)
    ]
    assert bought == sorted(bought, reverse=True)
    assert bought[0] < pruning.size.samples
    assert bought[-1] == LEAST_SAMPLES
    for share, samples in zip((0.9, 0.5), bought, strict=False):
        assert seconds(samples) <= share * whole_s


def test_a_budget_is_given_in_minutes(picos, monkeypatch):
    checkpoint, size = picos["llama"].checkpoint, CalibrationSize(24, 16)
    monkeypatch.setattr(budget, "measure_hardware", lambda config, dtype, device: HARDWARE)
    settings = PruneSettings(
        remove=2,
        calibration="none",
        selector="repair",
        compensator="distil",
        samples=size.samples,
        tokens=size.tokens,
    )
    shape, pruning = Shape.of_config(checkpoint.config), Pruning(2, size=size)
    needed_s = select_seconds(shape, HARDWARE, pruning) + repair_seconds(shape, HARDWARE, pruning)
    for share, samples in ((1.001, 24), (0.999, 18)):
        limited = settings.model_copy(update={"budget_minutes": share * needed_s / 60})
        assert samples_within_budget(checkpoint, limited, "float32") == samples
