"""Plans of pico models, and what they are healed with."""

import json

import torch

from gradmap.healing.heal import heal
from gradmap.healing.options import HealOptions
from gradmap.model.layerwise import sample_divergences
from gradmap.pruning.plan import load_changes, load_plan
from gradmap.pruning.prune import prune
from gradmap.pruning.settings import PruneSettings

TOKENS, STEP = 16, 64


def sentence(start):
    """Words that follow each other by a rule, so that there is something to learn."""
    stride = 7 * (1 + start % 3)
    return " ".join(f"w{3 + (start + stride * place) % 190}" for place in range(20 + start % 9))


def write_sentences(path, count):
    """As the documents of a text."""
    documents = [json.dumps({"text": sentence(start)}) for start in range(count)]
    path.write_text("\n".join(documents))
    return path


def manual_plan(pico, word_file, out, **changes):
    """A plan that removes a layer, uncorrected; or something else."""
    asked = {
        "selector": "manual",
        "layers": ["1"],
        "compensator": "none",
        "remove": 1,
        "calibration": f"file:{word_file}",
        "samples": 4,
        "tokens": TOKENS,
        "dtype": "float64",
    }
    prune(pico.checkpoint, PruneSettings(**(asked | changes)), out)
    return out


def asking(texts, **changes):
    asked = {
        "text": [f"file:{texts}"],
        "tokens": TOKENS,
        "step_tokens": STEP,
        "budget_tokens": 24 * STEP,
        "rank": 4,
        "learning_rate": 5e-3,
        "held_out": 8,
        "dtype": "float64",
    }
    return HealOptions(**(asked | changes))


def heal_pico(picos, plan, options, out, resume=None):
    return heal(picos["llama"].checkpoint, plan, options, out, resume)


def divergence_of(pico, directory, input_ids):
    """From the dense model, of the model as the plan leaves it: mean over positions."""
    plan, model = load_plan(directory), pico.layered()
    with torch.no_grad():
        dense = model.network(input_ids=input_ids).logits
        with model.changed(load_changes(directory, plan), without=plan.removal_order):
            pruned = model.network(input_ids=input_ids, use_cache=False).logits
    return sample_divergences(pruned, dense).sum().item() / input_ids.numel()


class KilledError(Exception):
    """In place of kill -9."""
