"""Int4 weights: the twin is what it says, nothing is lost in packing, odd shapes included."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kernels import int4
from kernels.int4_modules import Int4Linear
from kernels.int8 import dequantize_groups, quantize_groups

SHAPES = [(37, 100), (8, 128), (3, 31), (16, 577)]  # N, K
GROUPS = [32, 64, 128]


def make(n, k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=generator), torch.randn(5, k, generator=generator)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("n,k", SHAPES)
def test_the_twin_is_a_product_of_dequantised_factors(n, k, group):
    weight, x = make(n, k)
    codes, scale, minimum = int4.quantize_int4(weight, group)
    assert codes.dtype == torch.uint8 and codes.shape == (n, k) and codes.max() <= 15
    assert scale.dtype == minimum.dtype == torch.bfloat16 and scale.shape == minimum.shape == (n, -(-k // group))
    rounded = dequantize_groups(*quantize_groups(x, group), group)
    bias = torch.arange(n).float()
    expected = F.linear(rounded.double(), int4.dequantize_int4(codes, scale, minimum, group).double(), bias.double())
    actual = int4.int4_linear_reference(x, codes, scale, minimum, group, bias)
    assert (actual - expected).abs().max() < 1e-5 * expected.abs().max()
    packed = int4.pack_nibbles(codes)
    assert packed.shape == (n, -(-k // 2)) and torch.equal(int4.unpack_nibbles(packed, k), codes)
    assert torch.equal(int4.int4_linear(x, packed, scale, minimum, n, group, bias), actual)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("n,k", SHAPES)
def test_no_weight_is_further_away_than_half_a_step(n, k, group):
    weight, _ = make(n, k)
    codes, scale, minimum = int4.quantize_int4(weight, group, search=False)
    step = scale.float().repeat_interleave(group, 1)[:, :k]
    error = (int4.dequantize_int4(codes, scale, minimum, group) - weight).abs()
    # bfloat16 keeps 8 bits: the range that the levels span may end a little before the largest weight.
    assert (error <= 0.5 * step + weight.abs().max() * 2**-8).all()


def test_searching_never_raises_the_squared_error():
    weight, _ = make(37, 100)
    plain, searched = (int4.quantize_int4(weight, 32, search=search) for search in (False, True))
    errors = [(int4.dequantize_int4(*form, 32) - weight).square().sum() for form in (plain, searched)]
    assert errors[1] < errors[0]


def test_constant_groups_are_exact_and_bad_weights_show():
    weight = torch.full((2, 64), 0.5)
    weight[1, 40] = torch.nan
    codes, scale, minimum = int4.quantize_int4(weight, 32)
    out = int4.dequantize_int4(codes, scale, minimum, 32)
    assert torch.equal(out[0], weight[0]) and torch.equal(out[1, :32], weight[1, :32])
    assert out[1, 32:].isnan().all()


def test_a_bad_row_of_activations_becomes_nan_and_the_others_stay():
    weight, x = make(8, 128)
    x[2, 7] = torch.inf
    out = int4.int4_linear_reference(x, *int4.quantize_int4(weight, 64), 64)
    assert out[2].isnan().all() and out[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("bias", [True, False])
def test_the_module_stores_half_a_byte_a_weight(bias):
    source = nn.Linear(100, 37, bias=bias)
    layer = Int4Linear(source, group_size=32)
    assert layer.weight.dtype == torch.uint8 and layer.weight.numel() in (37 * 50, 48 * 64)  # rows, or padded panels
    assert layer.logical_parameters == sum(p.numel() for p in source.parameters())
    x = torch.randn(2, 3, 100)
    assert layer(x).shape == (2, 3, 37) and layer(x.bfloat16()).dtype == torch.bfloat16
    assert F.cosine_similarity(layer(x).flatten(), source(x).flatten(), dim=0) > 0.98
    ids = torch.tensor([[3, 3], [36, 0]])
    full = int4.dequantize_int4(*int4.quantize_int4(source.weight.data, 32), 32)
    assert torch.equal(layer.rows(ids), full[ids])
