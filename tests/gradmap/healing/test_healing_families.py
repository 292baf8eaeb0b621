"""What is trained on hooks is what the plan has, however a family is built and whatever is cut."""

import pytest

from gradmap.healing.heal import heal
from gradmap.healing.options import HealOptions
from gradmap.model.loading import load_tokenizer
from gradmap.pruning.plan import load_plan
from tests.gradmap.healing.small_healings import (
    STEP,
    TOKENS,
    divergence_of,
    manual_plan,
    write_sentences,
)

# Transposed weights, norms behind maps, experts that may be idle, q/k norms, biases.
FAMILIES = ("gpt2", "gemma2", "mixtral", "qwen3", "opt")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return f"file:{write_sentences(tmp_path_factory.mktemp('texts') / 'healing.jsonl', 200)}"


@pytest.mark.parametrize(
    ("unit", "train"), [("layer", "low-rank"), ("pair", "low-rank"), ("pair", "full")]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_healed_plan_does_what_was_trained(
    picos, texts, word_file, tmp_path, family, unit, train
):
    pico, out = picos[family], tmp_path / "healed"
    layers = ["2"] if unit == "layer" else ["M1+A2"]
    plan = manual_plan(pico, word_file, tmp_path / "plan", layers=layers, unit=unit)
    options = HealOptions(
        text=[texts],
        tokens=TOKENS,
        step_tokens=STEP,
        budget_tokens=40 * STEP,
        train=train,
        rank=3,
        learning_rate=5e-3 if train == "low-rank" else 1e-3,
        held_out=4,
        dtype="float64",
    )
    healed = heal(pico.checkpoint, plan, options, out)
    ids = options.mixture.open(load_tokenizer(pico.directory)).held_out
    after = divergence_of(pico, out, ids)
    # corrections are stored in float32
    assert healed.healing[0].lowest_divergence == pytest.approx(after, rel=1e-5)
    assert after < healed.healing[0].curve[0].held_out_divergence
    assert load_plan(out) == healed
