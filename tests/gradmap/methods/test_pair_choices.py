"""Which pairs of sublayers go, and in which order."""

import re

import pytest

from gradmap.common.errors import UserError
from gradmap.methods.registry import selector, selector_names
from gradmap.methods.selection import Selection, lowest_apart
from gradmap.model.sublayers import are_neighbours
from tests.families import LAYERS
from tests.gradmap.methods.test_selectors import choose
from tests.gradmap.named_methods import NOT_NESTED, make_scorer
from tests.gradmap.removals import pairs
from tests.gradmap.subjects import subject_of

MEASURING = sorted(
    name for name in selector_names() if name != "manual" and not selector(name).whole_layers
)
NESTED = sorted(set(MEASURING) - NOT_NESTED)


def test_of_pairs_that_share_a_sublayer_one_goes():
    scores = dict(zip(pairs(1, "M0+A1", "M1+A2", 3), (0.1, 0.2, 0.3, 0.4), strict=True))
    assert lowest_apart(scores, 2) == pairs(1, 3)
    with pytest.raises(UserError, match="Only 2 layers may still be removed at once"):
        lowest_apart(scores, 3)
    scores[pairs(1)[0]] = 0.25
    assert lowest_apart(scores, 3) == pairs("M0+A1", "M1+A2", 3)


@pytest.mark.parametrize("name", MEASURING)
def test_pairs_that_are_chosen_at_once_share_no_sublayer(picos, input_ids, name):
    (step,) = choose(
        name, subject_of(picos["llama"], input_ids, unit="pair"), 3, one_shot=True
    ).steps
    assert len({sublayer for pair in step.removed for sublayer in pair}) == 6
    assert are_neighbours(LAYERS, step.removed)
    # Each that is lower and stayed shares one with what went
    gone = {sublayer for pair in step.removed for sublayer in pair}
    highest = max(step.scores[pair] for pair in step.removed)
    lower = [pair for pair, score in step.scores.items() if score < highest]
    assert all(not gone.isdisjoint(pair) for pair in lower)


@pytest.mark.parametrize("name", NESTED)
def test_pairs_go_one_by_one_and_the_model_stays_whole(picos, input_ids, name):
    subject = subject_of(picos["llama"], input_ids, unit="pair")
    before = subject.model.network(input_ids=input_ids).logits
    selection = choose(name, subject, 3)
    for number, step in enumerate(selection.steps):
        candidates = subject.candidates(selection.removal_order[:number])
        assert set(step.scores) <= set(candidates)
        assert step.removed == (min(step.scores, key=step.scores.__getitem__),)
    assert choose(name, subject, 2).removal_order == selection.removal_order[:2]
    assert choose(name, subject, 3, done=selection.steps[:1]) == selection
    assert subject.model.network(input_ids=input_ids).logits.equal(before)


@pytest.mark.parametrize("name", NESTED)
@pytest.mark.parametrize("one_shot", [False, True])
def test_both_sublayers_of_a_protected_layer_stay(picos, input_ids, name, one_shot):
    protected = frozenset({0, 2})
    subject = subject_of(picos["llama"], input_ids, protected=protected, unit="pair")
    order = choose(name, subject, 2, one_shot=one_shot).removal_order
    assert len(order) == 2
    assert not any(sublayer.layer in protected for pair in order for sublayer in pair)


@pytest.mark.parametrize("name", ["window", "uidl"])
def test_a_block_of_pairs_keeps_to_what_may_go(picos, input_ids, name):
    """Between layers 0 and 3 there are three blocks of one unit, and one of two."""
    protected = frozenset({0, 3, 4})
    subject = subject_of(picos["gpt2"], input_ids, protected=protected, unit="pair")
    assert choose(name, subject, 2).removal_order == pairs(1, 2)
    assert set(choose(name, subject, 1).removal_order) < set(pairs(1, "M1+A2", 2))
    with pytest.raises(UserError, match="leave no 3 consecutive ones"):
        choose(name, subject, 3)


@pytest.mark.parametrize("name", [*MEASURING, "manual"])
def test_a_round_of_pairs_takes_the_work_that_was_announced(picos, input_ids, name):
    options = {"layers": pairs("M2+A3", 1)} if name == "manual" else {}
    subject = subject_of(picos["llama"], input_ids, count=2, unit="pair")
    scorer = make_scorer(name, subject, **options)
    done: list = []
    scorer.score(Selection(()), done.append)
    assert sum(done) == scorer.work(LAYERS)


def test_pairs_go_in_the_order_of_the_list(picos, input_ids):
    order = pairs(2, "M1+A3", "A1+M3", "M0+A4")
    subject = subject_of(picos["llama"], input_ids, unit="pair")
    assert choose("manual", subject, 4, layers=order).removal_order == order


@pytest.mark.parametrize(
    ("order", "unit", "message"),
    [
        (("M2+A3",), "layer", "names M2+A3, which is no layer; give --unit pair"),
        (("M2+A4",), "pair", "must name distinct layers, or neighbours in what is left, between 0"),
        (("M1+A3", 2), "pair", "neighbours in what is left, between 0 and 4, in order of removal"),
        (("M2+A3", 3), "pair", "neighbours in what is left"),
        (("M4+A5",), "pair", "neighbours in what is left"),
    ],
)
def test_a_list_of_what_cannot_go_is_refused(picos, input_ids, order, unit, message):
    subject = subject_of(picos["llama"], input_ids, unit=unit)
    with pytest.raises(UserError, match=re.escape(message)):
        make_scorer("manual", subject, layers=pairs(*order))
