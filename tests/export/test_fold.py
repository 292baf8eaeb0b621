"""Folding a weight, cutting tensors into shards, and streaming them into files."""

import pytest
import torch
from safetensors.torch import load_file

from export.fold import plan_fold, split_shards
from export.safetensors_writer import write_safetensors
from gradmap.common.files import sha256_file
from gradmap.model import corrections
from gradmap.model.corrections import (
    Gain,
    LowRank,
    Projection,
    Scale,
    Update,
    fold_changes,
)
from gradmap.model.safetensors_reader import TensorSpec
from tests.export.sources import REMOVED, SHARD_BYTES, make_source


def test_folding_a_transposed_weight_is_folding_the_weight():
    generator = torch.Generator().manual_seed(0)
    weight, matrix = (
        torch.randn(6, 9, generator=generator),
        torch.randn(6, 6, generator=generator).double(),
    )
    changes = (Projection(matrix), LowRank(torch.ones(1, 9), torch.ones(6, 1)))
    torch.testing.assert_close(
        fold_changes(weight.mT, changes, True), fold_changes(weight, changes, False).mT
    )


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_gain_is_folded_into_what_the_norm_makes_it_of(offset):
    weight, factor = torch.randn(2, 6, generator=torch.Generator().manual_seed(0)).double().unbind()
    gain = Gain(factor, torch.tensor(offset).double())
    folded = fold_changes(weight, (gain, gain), False)
    # two products and sums of numbers of order one
    torch.testing.assert_close(
        offset + folded, factor**2 * (offset + weight), rtol=1e-14, atol=1e-14
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_folding_by_rows_is_folding_the_whole_weight(monkeypatch, dtype):
    # two rows, so that the last piece is smaller
    monkeypatch.setattr(corrections, "FOLD_BYTES", 8 * 9 * 2)
    generator = torch.Generator().manual_seed(0)
    weight, matrix = torch.randn(2, 7, 9, generator=generator).to(dtype)
    down, up = torch.randn(3, 9, generator=generator), torch.randn(7, 3, generator=generator)
    given = weight.clone()
    changes = (Update(matrix), Scale(torch.tensor(0.5).double()), LowRank(down, up))
    folded = fold_changes(weight, changes, False)
    wanted = (weight.double() + matrix.double()) * 0.5 + up.double() @ down.double()
    # a sum of r products and one number more, in another order
    rounding = (
        (len(down) + 1)
        * torch.finfo(torch.float64).eps
        * (wanted.abs() + up.abs().double() @ down.abs().double())
    )
    assert ((folded - wanted).abs() <= rounding).all()
    assert torch.equal(fold_changes(weight, changes, False, dtype), folded.to(dtype))
    assert torch.equal(fold_changes(weight.mT, changes, True), folded.mT)
    assert torch.equal(weight, given)


def test_the_stream_is_what_the_safetensors_library_reads(tmp_path):
    tensors = {
        "a": torch.randn(3, 4),
        "b": torch.arange(5),
        "c": torch.randn(7).bfloat16(),
        "d": torch.zeros(0, 2),
    }
    specs = [
        TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()
    ]
    digest = write_safetensors(tmp_path / "x.safetensors", specs, tensors.values())
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert digest == sha256_file(tmp_path / "x.safetensors")


def test_shards_keep_order_and_stay_below_the_limit(picos):
    source = make_source(picos["llama"])
    folded = plan_fold(
        source.checkpoint, picos["llama"].architecture, REMOVED, source.changes, None
    )
    shards = split_shards(folded, SHARD_BYTES)
    assert [tensor for shard in shards for tensor in shard] == folded
    assert all(
        sum(tensor.spec.bytes for tensor in shard) <= SHARD_BYTES or len(shard) == 1
        for shard in shards
    )
