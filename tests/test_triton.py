"""The kernels for CUDA devices held to the twins: on a GPU where there is one, else in Triton's interpreter, on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from conftest import logits_of, make_tiny, stepwise_logits

from benchmark import new_cache
from kernels import int4, int8, triton_products, triton_step
from kernels.device_step import DeviceStep
from kernels.half import bf16_linear_reference
from kernels.kv_cache import RoomyLayer
from kernels.step import add_rms_norm, attend_reference, rope_append, silu_mul
from optimizations import head_pruning, kv_cache_quant, layer_pruning, lean_decode, mixed_precision, quantization
from optimizations import int4 as int4_technique
from optimizations.kv_cache_quant import Int8CacheLayer
from optimizations.lean_decode import Float32Layer

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
LAYERS = {"float32": Float32Layer, "bfloat16": RoomyLayer, "int8": Int8CacheLayer}
SHAPES = [(1, 24, 64), (3, 33, 160), (16, 8, 577), (2, 40, 1100)]  # rows, outputs, inputs


@pytest.fixture(autouse=True)
def plain_weights(monkeypatch):
    """Weights as a CUDA device holds them: not packed for the C++ kernels."""
    monkeypatch.setenv("TINYOPT_NO_KERNELS", "1")
    if not ON_GPU:  # the interpreter takes programs one after the other, each of any width
        monkeypatch.setattr(triton_products, "CHANNELS", 64)


def test_they_compile_for_a_gpu(tmp_path):
    """For one that need not be there: the interpreter takes what the compiler's types refuse."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": "."}
    command = [sys.executable, "tests/compile_triton.py"]
    subprocess.run(command, cwd=Path(__file__).parent.parent, env=environment, check=True)


@pytest.mark.parametrize("rows,n,k", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_float_product(rows, n, k, dtype):
    x, weight = torch.randn(rows, k, device=DEVICE), torch.randn(n, k, device=DEVICE).to(dtype)
    close(triton_products.float_product(x, weight), bf16_linear_reference(x, weight))


@pytest.mark.parametrize("rows,n,k", SHAPES)
@pytest.mark.parametrize("group", [32, 64, 128, None])
@pytest.mark.parametrize("rounds", [True, False])
def test_int8_product(rows, n, k, group, rounds):
    if group is None and rounds:
        pytest.skip("one scale for all of a token is torch's product")
    x, weight = inputs(rows, k), torch.randn(n, k, device=DEVICE)
    q, scale = int8.quantize_groups(weight, group or k, torch.bfloat16)
    twin = int8.int8_linear_reference if rounds else int8.int8_weight_only_reference
    close(triton_products.int8_product(x, q, scale, group or k, int8_activations=rounds), twin(x, q, scale, group or k))


@pytest.mark.parametrize("rows,n,k", SHAPES)
@pytest.mark.parametrize("group", int4.GROUP_SIZES)
def test_int4_product(rows, n, k, group):
    x = inputs(rows, k)
    codes, scale, minimum = int4.quantize_int4(torch.randn(n, k, device=DEVICE), group)
    packed = int4.pack_nibbles(codes)
    close(
        triton_products.int4_product(x, packed, scale, minimum, group),
        int4.int4_linear_reference(x, codes, scale, minimum, group),
    )


@pytest.mark.filterwarnings("ignore:invalid value")  # by NumPy, which the interpreter is
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_spoils_its_row_alone(bad):
    x, weight = inputs(2, 128), torch.randn(8, 128, device=DEVICE)
    x[1, 70] = bad
    out = [
        triton_products.int8_product(x, *int8.quantize_groups(weight, 64), 64, int8_activations=True),
        triton_products.int4_product(x, int4.pack_nibbles((form := int4.quantize_int4(weight, 64))[0]), *form[1:], 64),
    ]
    assert all(product[0].isfinite().all() and product[1].isnan().all() for product in out)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_nan_stays_in_an_int8_cache():
    """As a scale, through which every later token sees it."""
    keys, values = (torch.zeros(1, 1, 4, 16, dtype=torch.int8, device=DEVICE) for _ in range(2))
    scales = [torch.zeros(1, 1, 4, device=DEVICE) for _ in range(2)]
    place = torch.tensor([tensor.data_ptr() for tensor in (keys, values, *scales)] + [4], device=DEVICE)
    qkv, angles = torch.ones(1, 48, device=DEVICE), torch.ones(4, 8, device=DEVICE)
    qkv[0, 20] = float("nan")
    past = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    triton_step.rope_append(qkv, angles, angles, past, place, tokens=1, kv_heads=1, head_dim=16, stored=torch.int8)
    assert scales[0][0, 0, 0].isnan() and scales[1][0, 0, 0].isfinite()


def test_the_check_before_first_use(monkeypatch):
    assert triton_step.self_check(DEVICE) is None
    monkeypatch.setattr(triton_step, "int8_product", lambda x, weight, *_, **__: x.new_zeros(1, len(weight)))
    assert "differs from exact arithmetic" in triton_step.self_check(DEVICE)


def test_a_cache_of_other_sequences_is_refused(ids):
    model = lean_decode.apply(make_tiny(num_hidden_layers=1).to(DEVICE), kv_dtype="float32")
    cache, step = new_cache(model), DeviceStep(model.forward, record=False)
    logits_of(model, torch.cat([ids, ids], 1)[:1].to(DEVICE), cache)
    with pytest.raises(ValueError, match="2 sequences for a KV cache of 1"):
        step(ids[:, :1].to(DEVICE), cache)


def test_a_row_has_the_same_bits_in_any_company():
    """What drafts are judged by must be what single tokens give."""
    x, (q, scale) = inputs(11, 576), int8.quantize_groups(torch.randn(40, 576, device=DEVICE), 64)
    together = triton_products.int8_product(x, q, scale, 64, int8_activations=True)
    alone = [triton_products.int8_product(row[None], q, scale, 64, int8_activations=True) for row in x]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("update", [True, False])
def test_add_rms_norm(update):
    residual, weight = torch.randn(3, 144, device=DEVICE), torch.rand(144, device=DEVICE)
    added = torch.randn(3, 144, device=DEVICE) if update else None
    expected_residual = residual.clone()
    expected = add_rms_norm(expected_residual, added, weight, 1e-5)
    close(triton_step.add_rms_norm(residual, added, weight, 1e-5), expected)
    close(residual, expected_residual)


def test_silu_mul():
    both = 4 * torch.randn(3, 2 * 1500, device=DEVICE)
    close(triton_step.silu_mul(both), silu_mul(*both.chunk(2, -1)))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    "past,tokens,batch,mapped", [(0, 1, 1, False), (5, 1, 2, True), (70, 3, 1, False), (600, 1, 1, True), (511, 2, 2, False)]
)
def test_positions_cache_and_attention(kind, past, tokens, batch, mapped):
    """New tokens into a cache that holds `past`, then attention over all: like the operators for other devices."""
    heads, kv_heads, head_dim, most = 6, 2, 24, 700
    layers = [LAYERS[kind](), LAYERS[kind]()]
    for layer in layers:
        layer.make_room(batch, kv_heads, most, head_dim, device=DEVICE, dtype=torch.float32)
        generator = torch.Generator().manual_seed(1)
        states = [torch.randn(batch, kv_heads, past, head_dim, generator=generator).to(DEVICE) for _ in range(2)]
        layer.keep(slice(0, past), *states)
        layer.length = past
    qkv = torch.randn(batch, tokens, (heads + 2 * kv_heads) * head_dim, device=DEVICE)
    angles = torch.rand(most, head_dim // 2, device=DEVICE)
    expected_q = rope_append(qkv, angles.cos(), angles.sin(), layers[0], kv_heads=kv_heads, head_dim=head_dim)
    kv_of_head = torch.tensor([0, 1, 1, 0, 1, 1], device=DEVICE) if mapped else None
    expected = attend_reference(expected_q, layers[0], scaling=0.2, kv_of_head=kv_of_head)

    ours = layers[1]
    tensors = ours.keys, ours.values, *ours.scales()
    place = torch.tensor([0 if t is None else t.data_ptr() for t in tensors] + [most], device=DEVICE)
    length = torch.tensor([past], dtype=torch.int32, device=DEVICE)
    stored = ours.keys.dtype
    q = triton_step.rope_append(
        qkv.flatten(0, 1), angles.cos().contiguous(), angles.sin().contiguous(), length, place, tokens=tokens,
        kv_heads=kv_heads, head_dim=head_dim, stored=stored,
    )  # fmt: skip
    close(q.view_as(expected_q), expected_q)
    ours.length = past + tokens
    for name in ours.STORED:
        theirs = getattr(layers[0], name)[:, :, : ours.length].float()
        assert (getattr(ours, name)[:, :, : ours.length].float() - theirs).abs().max() <= (1 if kind == "int8" else 0.05)
    splits = 4 if past + tokens > triton_step.SPLIT else 1
    out = triton_step.attend(
        q, length, place, tokens=tokens, kv_heads=kv_heads, scaling=0.2, stored=stored, splits=splits, kv_of_head=kv_of_head
    )
    assert (out.view_as(expected) - expected).abs().max() < (1e-4 if kind == "float32" else 0.02)


RECIPES = {
    "float32": lambda model: model,
    "bf16": lambda model: mixed_precision.apply(model, dtype="bf16"),
    "int8": lambda model: quantization.apply(model, scheme="grouped"),
    "weight_only_kv8": lambda model: kv_cache_quant.apply(quantization.apply(model, scheme="weight-only")),
    "dynamic": lambda model: quantization.apply(model, scheme="dynamic", smoothing=0.0),
    "int4": lambda model: int4_technique.apply(model, rounding="nearest"),
    "pruned": lambda model: head_pruning.apply(model, prune_ratio=0.25),  # 9 heads of 3 groups: no longer equal ones
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_gives_what_the_twins_give(recipe, ids):
    """Prompt, single tokens and several at once, through one step and its tables; replayed from recordings on a GPU."""
    tiny = make_tiny("three_a_group" if recipe == "pruned" else "grouped", num_hidden_layers=2 if ON_GPU else 1)
    model = lean_decode.apply(RECIPES[recipe](tiny.to(DEVICE)), kv_dtype="float32")
    ids = ids[:, :6].to(DEVICE)
    model.forward.device_step = None
    expected = stepwise_logits(model, ids, new_cache(model))
    model.forward.device_step = step = DeviceStep(model.forward, record=ON_GPU)
    for _ in range(2 if ON_GPU else 1):  # launched and recorded, then replayed: a recording serves later caches as well
        cache = new_cache(model)
        parts = [logits_of(model, part, cache) for part in ids.split([3, 1, 2], 1)]
        close(torch.cat(parts, 1), expected, 0.02 if ON_GPU and recipe == "bf16" else 2e-3)  # the twin rounds products there
    assert len(step.recordings) == (3 if ON_GPU else 0)


def test_attention_sublayers_may_be_missing(ids):
    """Their layers own no layer of the cache, and no row of the table is read for them."""
    model, ids = make_tiny(num_hidden_layers=2).to(DEVICE), ids[:1, :3].to(DEVICE)
    layer_pruning._remove_attention(model, [0])
    model = lean_decode.apply(model, kv_dtype="float32")
    model.forward.device_step = None
    expected = stepwise_logits(model, ids, new_cache(model))
    model.forward.device_step = DeviceStep(model.forward, record=ON_GPU)
    close(stepwise_logits(model, ids, new_cache(model)), expected, 2e-3)


def inputs(rows: int, k: int) -> torch.Tensor:
    x = torch.randn(rows, k, device=DEVICE)
    x[:, :32] = 0  # a group of zeros has scale 0
    x[0, -1] = 40
    return x


def close(actual, expected, share: float = 1e-5):
    assert (actual - expected).abs().max() <= share * max(1.0, expected.abs().max().item())
