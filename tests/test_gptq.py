"""GPTQ: the blocked version equals the textbook's, and the error it minimises really falls."""

from __future__ import annotations

import pytest
import torch

from fitting.gptq import damp, descend, gptq, gptq_reference, gptq_refined, refit_grid
from kernels.int4 import dequantize_int4, quantize_int4

SHAPES = [(37, 100), (8, 64), (20, 257)]  # N, K


def make(n, k, seed=0, dtype=torch.float64):
    """A weight and the second moments of inputs that are correlated and of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(k, k, generator=generator, dtype=dtype) / k**0.5 + torch.eye(k, dtype=dtype)
    x = torch.randn(4 * k, k, generator=generator, dtype=dtype) @ mixing * torch.rand(k, generator=generator, dtype=dtype)
    return torch.randn(n, k, generator=generator, dtype=dtype), x.T @ x / len(x)


def output_error(weight, moments, form, group):
    difference = weight - dequantize_int4(*form, group)
    return ((difference @ moments) * difference).sum()


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("n,k", SHAPES)
def test_blocked_equals_the_textbook(n, k, group):
    weight, moments = make(n, k)
    options = {"group_size": group, "damping": 0.01}
    for actual, expected in zip(gptq(weight, moments, **options), gptq_reference(weight, moments, **options), strict=True):
        assert actual.dtype == expected.dtype and torch.equal(actual, expected)


def test_independent_inputs_are_rounded_to_nearest():
    weight, _ = make(37, 100)
    forms = gptq(weight, torch.eye(100), group_size=32), quantize_int4(weight, 32)
    for actual, expected in zip(*forms, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_step_lowers_the_output_error(group, dtype):
    weight, moments = make(37, 200, dtype=dtype)
    damped = damp(moments, 0.01)
    nearest = quantize_int4(weight, group)
    one_pass = gptq(weight, moments, group_size=group)
    grid = refit_grid(weight.float(), damped.float(), *one_pass, group)
    moved = descend(weight.float(), damped.float(), one_pass[0], *grid, group)
    refined = gptq_refined(weight, moments, group_size=group)
    forms = [nearest, one_pass, (one_pass[0], *grid), (moved, *grid), refined]
    errors = [output_error(weight, damped, form, group) for form in forms]
    assert errors[1] < 0.7 * errors[0]
    assert errors == sorted(errors, reverse=True)


def test_descending_from_any_codes_never_raises_the_error():
    weight, moments = make(8, 96, dtype=torch.float32)
    codes, scale, minimum = quantize_int4(weight, 32)
    errors = []
    for _ in range(4):
        errors.append(output_error(weight, moments, (codes, scale, minimum), 32))
        codes = descend(weight, moments, codes, scale, minimum, 32)
    assert errors == sorted(errors, reverse=True) and errors[1] < errors[0]


def test_descending_equals_trying_every_level():
    """One code after another, its level being the one of sixteen with the least output error."""
    weight, moments = make(6, 70)
    codes, scale, minimum = quantize_int4(weight, 32)
    expected = codes.clone()
    for j in range(70):
        tried = []
        for level in range(16):
            expected[:, j] = level
            difference = weight - dequantize_int4(expected, scale, minimum, 32).double()
            tried.append(((difference @ moments) * difference).sum(1))
        expected[:, j] = torch.stack(tried).argmin(0)
    assert torch.equal(descend(weight, moments.float(), codes, scale, minimum, 32), expected)


def test_the_grid_equals_least_squares():
    """Each row's scales and minimums as a solver finds them that knows nothing of groups: L^T (w - B u), H = L L^T."""
    weight, moments = make(6, 96)
    codes, scale, minimum = quantize_int4(weight, 32)
    half = torch.linalg.cholesky(moments).T
    groups = torch.eye(3, dtype=torch.float64).repeat_interleave(32, 0)
    refitted = torch.cat(refit_grid(weight, moments, codes, scale, minimum, 32), 1)
    for row in range(6):
        of_grid = torch.cat([codes[row, :, None] * groups, groups], 1)
        expected = torch.linalg.lstsq(half @ of_grid, half @ weight[row]).solution
        torch.testing.assert_close(refitted[row].double(), expected, rtol=0.01, atol=0.01)


def test_dead_inputs_and_constant_groups_do_no_harm():
    weight, moments = make(8, 96)
    moments[10], moments[:, 10] = 0, 0
    weight[:, 32:64] = 0.5
    for form in (gptq(weight, moments, group_size=32), gptq_refined(weight, moments, group_size=32)):
        assert dequantize_int4(*form, 32).isfinite().all()
        assert output_error(weight, moments, form, 32) < output_error(weight, moments, quantize_int4(weight, 32), 32)


def test_the_weight_is_left_as_it_was():
    weight, moments = make(8, 64, dtype=torch.float32)
    before = weight.clone()
    gptq_refined(weight, moments, group_size=32)
    assert torch.equal(weight, before)
