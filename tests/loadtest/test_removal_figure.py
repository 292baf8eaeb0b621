"""The figure of what was removed shows every candidate of the first round, and all sublayers."""

import re

import pytest

from gradmap.common.colors import PRUNED_COLOR
from gradmap.pruning.plan import BaseModelIdentity, CalibrationRecord, Plan, StepRecord
from loadtest.drawing import KEPT_COLOR
from loadtest.pipeline.removal_figure import MOST_LAYERS_WITH_TEXT, draw_removal
from tests.gradmap.removals import pairs

LAYERS = 4


def plan_without(*rounds, layers=LAYERS, selector="sleb"):
    """rounds: the scores of each, and what it removed, as plan.json has them."""
    steps = [
        StepRecord(
            scores=dict(zip(pairs(*scores), scores.values(), strict=True)),
            removed=[*pairs(removed)],
        )
        for scores, removed in rounds
    ]
    return Plan(
        base_model=BaseModelIdentity(name="m", model_type="llama", layers=layers, files={}),
        recipe={"selector": selector},
        calibration=CalibrationRecord(
            source="s", seed=0, samples=1, tokens=1, bos=None, held_out_samples=0, sha256=""
        ),
        removal_order=[pair for step in steps for pair in step.removed],
        steps=steps,
        drift={},
        corrections=[],
        environment={},
        timings_s={},
    )


def texts(svg):
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def fills(svg, color):
    return len(re.findall(rf"fill: {color}", svg))


def test_every_candidate_has_a_bar_and_every_sublayer_a_cell():
    scores = {0: 4.0, "M0+A1": 3.0, 1: 2.0, "M1+A2": 1.0, 2: 2.0, "M2+A3": 3.0, 3: 4.0}
    svg = draw_removal(plan_without((scores, "M1+A2"), ({"A1+M2": 1.0, 0: 2.0}, "A1+M2")))
    bars, cells = len(scores), 2 * LAYERS
    # one bar: the other one is no candidate of the first round
    assert fills(svg, PRUNED_COLOR) == 1 + 4
    assert fills(svg, PRUNED_COLOR) + fills(svg, KEPT_COLOR) == bars + cells
    assert sorted(text for text in texts(svg) if text in "AM") == ["A", "A", "M", "M"]
    # numbers of the axis aside, the order in the cells
    assert texts(svg).count("1") >= 2 and texts(svg).count("2") >= 2


def test_what_became_one_layer_is_in_brackets():
    scores = {0: 4.0, "M0+A1": 3.0, 1: 2.0, "M1+A2": 1.0, 2: 2.0, "M2+A3": 3.0, 3: 4.0}
    joined = draw_removal(plan_without((scores, "M1+A2")))
    whole = draw_removal(plan_without((scores, 1)))
    # a bracket is a line with an end mark on either side
    assert len(re.findall("<path", joined)) > len(re.findall("<path", whole))


def test_cells_of_deep_models_have_no_letters():
    layers = MOST_LAYERS_WITH_TEXT + 1
    svg = draw_removal(plan_without(({5: 1.0, 6: 2.0}, 5), layers=layers))
    assert not {"A", "M"} & set(texts(svg))


@pytest.mark.parametrize(
    ("selector", "label"), [("sleb", "loss without the layer"), ("somebody's", "score")]
)
def test_the_axis_says_what_scores_are(selector, label):
    svg = draw_removal(plan_without(({1: 1.0, 2: 2.0}, 1), selector=selector))
    assert any(text.startswith(label) for text in texts(svg))
