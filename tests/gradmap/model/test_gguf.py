"""What a GGUF file says about its tokenizer and its head reaches the checkpoint that is made of
it."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize, quantize
from transformers import AutoConfig

from gradmap.common.errors import UserError
from gradmap.model import gguf_model
from gradmap.model.checkpoint import open_checkpoint
from gradmap.model.gguf_head import Stored, finer_of, judge_head, rounding_error
from gradmap.model.gguf_metadata import require_understood
from gradmap.model.gguf_tokenizer import (
    find_problem,
    load_gguf_tokenizer,
    read_settings,
    require_same_tokens,
)
from gradmap.model.loading import load_model, load_tokenizer
from tests.families import config_of
from tests.pico_gguf import BOS, EOS, TEMPLATE, WORDS, write_gguf

Q4_0, Q5_0, Q8_0 = GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q5_0, GGMLQuantizationType.Q8_0
F16, TQ1_0 = GGMLQuantizationType.F16, GGMLQuantizationType.TQ1_0


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """Writes a GGUF file and opens it as a model: settings -> checkpoint."""
    monkeypatch.setenv("GRADMAP_CACHE", str(tmp_path / "cache"))

    def open_gguf(kind="llama", **settings):
        write_gguf(tmp_path / "pico.gguf", kind, **settings)
        return open_checkpoint(str(tmp_path), "pico.gguf")

    return open_gguf


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("add_eos", [True, False])
def test_texts_begin_and_end_as_the_file_says(opened, kind, add_bos, add_eos):
    tokenizer = load_tokenizer(opened(kind, add_bos_token=add_bos, add_eos_token=add_eos).directory)
    ids = tokenizer("the")["input_ids"]
    assert (ids[0] == BOS, ids[-1] == EOS) == (add_bos, add_eos)
    assert (
        tokenizer("the", add_special_tokens=False)["input_ids"] == ids[add_bos : len(ids) - add_eos]
    )


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [
        ("llama", {}, True),
        ("gpt2", {}, False),
        ("gpt2", {"pre": "llama-bpe"}, True),
        ("gpt2", {"pre": "qwen2"}, False),
    ],
)
def test_a_silent_file_means_what_it_means_to_llama_cpp(opened, kind, settings, expected):
    tokenizer = load_tokenizer(opened(kind, **settings).directory)
    assert (tokenizer("the")["input_ids"][0] == BOS) == expected


def test_the_chat_template_and_special_tokens_survive(opened):
    tokenizer = load_tokenizer(opened("gpt2", chat_template=TEMPLATE, padding_token_id=7).directory)
    assert tokenizer.chat_template == TEMPLATE
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (BOS, EOS, 7)
    assert tokenizer("<s>")["input_ids"] == [BOS]


def test_a_tokenizer_beside_the_file_is_not_read(opened, tmp_path):
    """As in an artifact of ours, which lists the tokens as another class of tokenizer does."""
    expected = load_tokenizer(opened("gpt2").directory)
    expected.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(opened("gpt2", add_bos_token=True).directory)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (BOS, EOS)
    assert tokenizer("the")["input_ids"] == [BOS, *expected("the")["input_ids"]]


@pytest.mark.parametrize(("pre", "digits"), [("smollm", ["1", "2"]), ("gpt-2", ["12"])])
def test_digits_are_cut_as_the_file_says(opened, pre, digits):
    assert load_tokenizer(opened("gpt2", pre=pre).directory).tokenize("12") == digits


@pytest.mark.parametrize(("pre", "pieces"), [("llama-bpe", ["is"]), ("gpt-2", ["i", "s"])])
def test_words_are_taken_whole_where_the_file_says_so(opened, pre, pieces):
    assert "is" in WORDS  # and there is no merge that makes it
    assert load_tokenizer(opened("gpt2", pre=pre).directory).tokenize("is") == pieces


@pytest.mark.parametrize(("add_space_prefix", "first"), [(True, "▁the"), (False, "t")])
def test_a_space_is_put_before_only_where_the_file_says_so(opened, add_space_prefix, first):
    tokenizer = load_tokenizer(opened("llama", add_space_prefix=add_space_prefix).directory)
    assert tokenizer.tokenize("the")[0] == first
    ids = tokenizer(" the")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True).endswith("the")


def test_a_tokenizer_that_lost_something_is_refused(opened, tmp_path):
    tokenizer = load_tokenizer(
        opened("llama", add_bos_token=True, chat_template=TEMPLATE).directory
    )
    settings = read_settings(tmp_path / "pico.gguf")
    assert find_problem(tokenizer, settings) is None
    tokenizer.add_bos_token = False
    with pytest.raises(
        UserError, match=r"The tokenizer is not that of .*pico\.gguf.* from number 0 on, but \[1, "
    ):
        require_same_tokens(tokenizer, tmp_path / "pico.gguf")
    tokenizer.add_bos_token = True
    tokenizer.chat_template = None
    assert "chat template" in find_problem(tokenizer, settings)
    tokenizer.chat_template = TEMPLATE
    tokenizer.eos_token = "<s>"
    assert "eos_token is 1, where the file has 2" in find_problem(tokenizer, settings)


def test_a_checkpoint_whose_tokenizer_lost_something_is_not_kept(opened, tmp_path, monkeypatch):
    def load_without_bos(source):
        tokenizer = load_gguf_tokenizer(source)
        tokenizer.add_bos_token = False
        return tokenizer

    monkeypatch.setattr(gguf_model, "load_gguf_tokenizer", load_without_bos)
    with pytest.raises(
        UserError, match=r"The tokenizer is not that of .*pico\.gguf.*; nothing was written"
    ):
        opened("llama")
    assert not list(tmp_path.glob("cache/dequantised/*"))


@pytest.mark.parametrize("agrees", [True, False])
def test_where_llama_cpp_is_installed_its_tokens_decide(opened, tmp_path, monkeypatch, agrees):
    tokenizer = load_tokenizer(opened("gpt2").directory)

    class Llama:
        def __init__(self, model_path, vocab_only, verbose):
            assert (model_path, vocab_only) == (str(tmp_path / "pico.gguf"), True)

        def tokenize(self, text, add_bos, special):
            ids = tokenizer(text.decode())["input_ids"]
            return ids if agrees else [*ids[:-1], ids[-1] + 1]

    module = SimpleNamespace(Llama=Llama, __spec__="installed")
    monkeypatch.setitem(sys.modules, "llama_cpp", module)
    if agrees:
        require_same_tokens(tokenizer, tmp_path / "pico.gguf")
    else:
        with pytest.raises(UserError, match=r"in llama\.cpp"):
            require_same_tokens(tokenizer, tmp_path / "pico.gguf")


def test_a_file_that_is_no_gguf_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADMAP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "pico.gguf").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"pico\.gguf cannot be read as a GGUF model"):
        open_checkpoint(str(tmp_path), "pico.gguf")


def rounded(values, kind):
    """As a GGUF file gives them back."""
    return Stored(
        torch.from_numpy(np.array(dequantize(quantize(values.numpy(), kind), kind))), kind.name
    )


@pytest.fixture
def weights():
    return 0.02 * torch.randn(300, 64, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize(
    "kind", [Q4_0, Q5_0, Q8_0, F16, GGMLQuantizationType.Q4_1, GGMLQuantizationType.BF16]
)
def test_the_bound_on_rounding_holds_and_is_near(weights, kind):
    stored = rounded(weights, kind)
    error = float((stored.values - weights).norm())
    assert error <= rounding_error(stored) < 3 * error


def test_embeddings_stored_twice_are_one_matrix_and_the_finer_copy_is_kept(weights):
    head, embeddings = rounded(weights, Q8_0), rounded(weights, Q5_0)
    verdict = judge_head(head, embeddings)
    assert verdict.tied
    assert verdict.distance == pytest.approx(
        float((head.values - embeddings.values).norm() / embeddings.values.norm())
    )
    assert finer_of(head, embeddings) is head
    assert finer_of(embeddings, head) is head
    assert "Q8_0" in verdict.describe() and "are tied" in verdict.describe()


def test_a_head_of_its_own_stays_so(weights):
    other = weights + 0.3 * 0.02 * torch.randn(
        weights.shape, generator=torch.Generator().manual_seed(5)
    )
    verdict = judge_head(rounded(other, Q8_0), rounded(weights, Q5_0))
    assert not verdict.tied
    assert "0.3" in verdict.describe() and "stays a matrix of its own" in verdict.describe()


def test_levels_that_are_not_even_justify_nothing(weights):
    embeddings = rounded(weights, Q8_0)
    verdict = judge_head(Stored(embeddings.values, TQ1_0.name), embeddings)
    assert not verdict.tied
    assert "not known" in verdict.describe()


@pytest.mark.parametrize(
    ("types", "finer"), [((Q8_0, Q5_0), "output.weight"), ((Q5_0, Q8_0), "token_embd.weight")]
)
def test_a_head_stored_twice_is_tied_once(opened, tmp_path, types, finer):
    model = load_model(opened(head=types), "float32", "cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    stored = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "pico.gguf").tensors}[finer]
    assert np.array_equal(model.lm_head.weight.numpy(), dequantize(stored.data, stored.tensor_type))


def test_that_a_head_is_tied_is_said(opened, capfd):
    tied = opened(head=(Q8_0, Q5_0))
    assert tied.config["tie_word_embeddings"] is True
    assert "(Q8_0) and token_embd.weight (Q5_0) differ by" in capfd.readouterr().err


def test_a_head_of_its_own_is_kept(opened, capfd):
    apart = opened(head=(Q8_0, Q5_0, 0.5))
    assert not apart.config["tie_word_embeddings"]
    assert "stays a matrix of its own" in capfd.readouterr().err
    model = load_model(apart, "float32", "cpu")
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


@pytest.mark.parametrize(
    "metadata",
    [
        {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0},
        {"llama.attention.sliding_window": 64},
        {"llama.logit_scale": 0.5},
        {"llama.attention.key_length": 16},
        {"llama.attention.value_length": 16},
        {"llama.attention.causal": False},
        {"llama.expert_count": 8},
        {"llama.something.new": 1},
    ],
)
def test_what_a_file_says_and_transformers_passes_over_is_a_refusal(opened, metadata):
    with pytest.raises(UserError, match="which transformers does not take over"):
        opened(metadata=metadata)


def test_what_changes_nothing_is_no_obstacle(opened):
    metadata = {
        "llama.rope.scaling.type": "none",
        "llama.expert_count": 0,
        "llama.rope.freq_base": 50_000.0,
    }
    metadata |= {
        "llama.attention.key_length": 8,
        "llama.attention.value_length": 8,
        "llama.attention.causal": True,
    }
    config = opened(metadata=metadata).config
    assert config["rope_parameters"]["rope_theta"] == 50_000


@pytest.mark.parametrize(
    ("family", "key", "right", "wrong"),
    [
        ("llama", "rope.freq_base", 300.0, 300.01),
        ("llama", "attention.layer_norm_rms_epsilon", float(np.float32(1e-6)), 1.001e-6),
        ("gemma3_text", "rope.freq_base", 300.0, 100.0),  # of the layers with full attention
        ("qwen2", "attention.key_length", 8, 16),  # whose config leaves it to be derived
        ("mixtral", "expert_count", 4, 8),
        ("qwen3_moe", "expert_count", 6, 8),
    ],
)
def test_a_number_is_where_the_familys_config_has_it(tmp_path, family, key, right, wrong):
    config = AutoConfig.for_model(family, **config_of(family))
    require_understood({"general.architecture": "x", f"x.{key}": right}, config, tmp_path)
    with pytest.raises(UserError, match=rf"says x\.{key} = {wrong}, which"):
        require_understood({"general.architecture": "x", f"x.{key}": wrong}, config, tmp_path)


def test_another_file_of_the_same_name_is_another_model(opened):
    thetas = [
        opened(metadata={"llama.rope.freq_base": theta}).config["rope_parameters"]
        for theta in (2e4, 5e4)
    ]
    assert [theta["rope_theta"] for theta in thetas] == [2e4, 5e4]


def test_one_of_several_parts_is_refused_and_the_cure_named(opened):
    with pytest.raises(UserError, match=r"one of 2 parts .* llama-gguf-split --merge pico\.gguf"):
        opened(metadata={"split.count": 2, "split.no": 0})


def remove(name):
    return lambda tensors: tensors.pop(name)


def add(name, *shape):
    return lambda tensors: tensors.update(
        {name: (np.ones(shape, np.float32), GGMLQuantizationType.F32)}
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove("blk.1.ffn_down.weight"), r"they lack model\.layers\.1\.mlp\.down_proj\.weight"),
        (add("rope_freqs.weight", 4), r"does not read, rope_freqs\.weight first"),
        (add("blk.0.attn_q.bias", 32), r"does not read, blk\.0\.attn_q\.bias first"),
        (add("blk.2.attn_norm.weight", 32), r"does not read, blk\.2\.attn_norm\.weight first"),
    ],
)
def test_tensors_that_are_missing_or_not_read_are_refused(opened, change, message):
    with pytest.raises(UserError, match=message):
        opened(change=change)
