"""Attention over a cache of ours, for a few rows and for a prompt, against its twin in PyTorch; in a model, against "sdpa"."""

import pytest
import torch
from conftest import logits_of, make_tiny, stepwise_logits
from transformers import DynamicCache

from kernels import attention, step
from kernels.build import load_kernels
from kernels.kv_cache import RoomyLayer
from optimizations import head_pruning
from optimizations.kv_cache_quant import Int8CacheLayer
from optimizations.lean_decode import Float32Layer

LAYERS = [RoomyLayer, Float32Layer, Int8CacheLayer]


def filled(layer_type, batch_size, depth, head_dim):
    """A layer of three KV heads with room to spare, and a generator of queries."""
    generator = torch.Generator().manual_seed(depth)
    layer = layer_type()
    keys, values = torch.randn(2, batch_size, 3, depth + 5, head_dim, generator=generator)
    layer.update(keys * 3, values)
    layer.crop(-5)
    return layer, generator


@pytest.mark.parametrize("layer_type", LAYERS)
@pytest.mark.parametrize(("batch_size", "depth"), [(1, 1), (3, 63), (9, 65), (1, 257), (2, 700), (1, 2048)])
@pytest.mark.parametrize("head_dim", [16, 64, 80])
def test_a_few_rows_equal_their_twin(layer_type, batch_size, depth, head_dim, kernels):
    layer, generator = filled(layer_type, batch_size, depth, head_dim)
    for rows, heads in ((1, 9), (min(5, depth), 3)):
        q = torch.randn(batch_size, rows, heads, head_dim, generator=generator)
        expected = step.attend_reference(q, layer, scaling=head_dim**-0.5)
        actual = step.attend(q, layer, scaling=head_dim**-0.5)
        assert (actual - expected).abs().max() < 1e-5
    readers = torch.tensor([0, 0, 2, 1, 0])
    q = torch.randn(batch_size, 1, 5, head_dim, generator=generator)
    expected = step.attend_reference(q, layer, scaling=0.1, kv_of_head=readers)
    assert (step.attend(q, layer, scaling=0.1, kv_of_head=readers) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("layer_type", LAYERS)
@pytest.mark.parametrize(
    ("batch_size", "rows", "depth"), [(1, 17, 0), (3, 64, 0), (2, 33, 100), (1, 600, 7), (9, 18, 1), (1, 20, 2028)]
)
@pytest.mark.parametrize("head_dim", [6, 64, 80])
def test_a_prompt_equals_its_twin(layer_type, batch_size, rows, depth, head_dim, kernels):
    layer, generator = filled(layer_type, batch_size, depth + rows, head_dim)
    for readers in (None, torch.tensor([0, 0, 2, 1, 0, 2])):
        q = torch.randn(batch_size, rows, 6, head_dim, generator=generator)
        expected = step.attend_reference(q, layer, scaling=head_dim**-0.5, kv_of_head=readers)
        assert (step.attend(q, layer, scaling=head_dim**-0.5, kv_of_head=readers) - expected).abs().max() < 1e-5


def test_a_prompts_rows_do_not_depend_on_each_other(kernels):
    layer, generator = filled(Float32Layer, 1, 50, 64)
    q = torch.randn(1, 50, 3, 64, generator=generator)
    whole = step.attend(q, layer, scaling=0.125)
    assert torch.equal(step.attend(q[:, 20:].contiguous(), layer, scaling=0.125), whole[:, 20:])


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_attention_does_not_depend_on_threads(rows, kernels):
    """Enough heads and tokens that two threads have work; the suite runs on one."""
    layer, generator = filled(Float32Layer, 2, 700, 64)
    q = torch.randn(2, rows, 9, 64, generator=generator)
    alone = step.attend(q, layer, scaling=0.125)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(step.attend(q, layer, scaling=0.125), alone)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [1, 20])
def test_what_is_not_finite_is_not_hidden(rows, kernels):
    layer = Int8CacheLayer()
    keys = torch.randn(1, 1, 24, 16)
    keys[0, 0, 3, 5] = float("nan")
    layer.update(keys, torch.randn(1, 1, 24, 16))
    assert step.attend(torch.randn(1, rows, 2, 16), layer, scaling=0.25)[0, -1].isnan().any()


@pytest.mark.parametrize("shape", ["grouped", "three_a_group", "multi_head"])
@pytest.mark.parametrize("pruned", [False, True])
def test_a_model_gives_the_logits_of_sdpa(shape, pruned, kernels, monkeypatch):
    """A prompt of 40 tokens, then single ones."""
    ids = torch.randint(0, 97, (2, 43), generator=torch.Generator().manual_seed(1))
    model = make_tiny(shape)
    if pruned:
        head_pruning.apply(model, prune_ratio=0.25)
    attention.use_grouped_heads(model)
    served, asked = [], attention.kernels_serve
    monkeypatch.setattr(attention, "kernels_serve", lambda *call: served.append(asked(*call)) or served[-1])
    fast = logits_of(model, ids[:, :40], cache := DynamicCache()), stepwise_logits(model, ids[:, 40:], cache)
    uneven = [getattr(layer.self_attn, "kv_of_head", None) is not None for layer in model.model.layers]
    assert all(served) and len(served) == 3 + 3 * sum(uneven)  # the prompt, and single tokens of uneven heads
    assert all(uneven) if pruned and shape == "three_a_group" else not any(uneven)
    monkeypatch.setattr(attention, "kernels_serve", lambda *_: False)
    slow = logits_of(model, ids[:, :40], cache := DynamicCache()), stepwise_logits(model, ids[:, 40:], cache)
    torch.testing.assert_close(fast, slow, atol=1e-4, rtol=1e-4)


def test_learning_goes_through_pytorch():
    model = make_tiny().requires_grad_(True)
    attention.use_grouped_heads(model)
    loss = model(torch.arange(40)[None]).logits.square().mean()
    loss.backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().max() > 0


def test_wider_heads_than_the_kernels_have_room_for(ids):
    model = make_tiny(head_dim=272)
    expected = logits_of(model, ids)
    attention.use_grouped_heads(model)
    assert (logits_of(model, ids) - expected).abs().max() < 1e-4


def test_nothing_to_attend_to_is_refused():
    """A call without a token, or with a map of heads that has gaps: a sentence instead of a division by zero."""
    if reason := load_kernels():
        pytest.skip(reason)
    cache, q = torch.zeros(1, 2, 8, 16), torch.zeros(1, 0, 4, 16)
    with pytest.raises(RuntimeError, match="attend: q must be"):
        torch.ops.tinyopt.attend(q, cache, cache, None, None, 0, 1.0, None)
    heads = torch.tensor([0, 9, 1, 9, 0, 9, 1, 9])[::2]
    out = torch.ops.tinyopt.attend(q.new_ones(1, 1, 4, 16), cache, cache + 1, None, None, 1, 1.0, heads)
    assert torch.equal(out, torch.ones(1, 1, 64))


def test_a_norm_of_another_width_is_refused():
    if reason := load_kernels():
        pytest.skip(reason)
    for weight in (torch.ones(4), torch.ones(12)[::2]):
        with pytest.raises(RuntimeError, match="add_rms_norm"):
            torch.ops.tinyopt.add_rms_norm(torch.ones(2, 6), None, weight, 1e-5)
