"""The figure of healing has every look at held-out samples."""

import re

import pytest

from gradmap.common.colors import PRUNED_COLOR
from gradmap.pruning.plan import HealingPoint, HealingRecord
from loadtest.drawing import KEPT_COLOR
from loadtest.pipeline.healing_figure import draw_healing


def record(*points):
    curve = [
        HealingPoint(
            tokens=tokens, seconds=1.0, training_divergence=trained, held_out_divergence=held
        )
        for tokens, trained, held in points
    ]
    return HealingRecord(recipe={}, samples=1, bos=None, sha256="", passes={}, curve=curve)


def marks(svg, color):
    """Points are drawn as uses of a marker in their colour."""
    return len(re.findall(rf"<use [^>]*fill: {color}", svg))


@pytest.mark.parametrize("looks", [1, 4])
def test_every_look_is_a_point(looks):
    points = [(1000 * look, 0.5 / look if look else None, 1 / (1 + look)) for look in range(looks)]
    svg = draw_healing(record(*points))
    legend = looks > 1
    assert marks(svg, PRUNED_COLOR) == looks + 1
    assert marks(svg, KEPT_COLOR) == (looks - 1 + legend)
    assert "held out" in svg
