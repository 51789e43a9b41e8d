"""Mixed precision: what is half, what stays float32, on CPUs that multiply in half and on those that only store it."""

import copy

import pytest
import torch
from conftest import logits_of, make_tiny, stepwise_logits
from torch import nn

import devices
from benchmark import count_parameters, evidence, new_cache, stored_tensors, streamed_bytes, weight_bytes
from devices import Unsupported
from inference import generate_ids
from kernels.build import load_kernels
from kernels.half import HalfLinear
from optimizations import mixed_precision
from optimizations.head_pruning import apply as prune
from optimizations.kv_cache_quant import apply as quantize_cache
from optimizations.mixed_precision import apply

NO_FEATURES = dict.fromkeys(("avx512", "vnni", "avx512_bf16", "amx", "amx_fp16"), False)


@pytest.fixture
def cpu(monkeypatch):
    """`cpu(amx=True, ...)`: run as on an x86 CPU with these features and no others, without the C++ kernels."""

    def pretend(**features):
        monkeypatch.setenv("TINYOPT_NO_KERNELS", "1")
        monkeypatch.setattr(devices, "cpu_features", lambda: NO_FEATURES | features)
        monkeypatch.setattr(devices.platform, "machine", lambda: "x86_64")

    return pretend


@pytest.fixture(params=["kernels", "native", "expanding"])
def path(request, cpu):
    """The C++ kernels; products in bf16, through the casting modules; or weights expanded to float32 products."""
    if request.param == "kernels":
        if reason := load_kernels():
            pytest.skip(reason)
    else:
        cpu(avx512_bf16=request.param == "native")
    return request.param


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a.flatten(0, 1), b.flatten(0, 1), dim=-1).min().item()


# Which dtype


def test_fp16_is_refused_on_a_cpu_without_it(tiny, cpu):
    """AMX for bf16 is not enough: fp16 would be converted in software, slower than float32. The model is left as it was."""
    cpu(avx512=True, avx512_bf16=True, amx=True)
    model = tiny()
    with pytest.raises(Unsupported, match=r"fp16 on this CPU is slower.*bf16"):
        apply(model, dtype="fp16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert any(type(module) is nn.Linear for module in model.modules())


def test_fp16_where_the_cpu_has_it(tiny, cpu):
    cpu(amx_fp16=True)
    model = apply(tiny(), dtype="fp16")
    assert model.lm_head.weight.dtype == torch.float16 and model.lm_head.native


def test_auto_is_bf16_on_a_cpu(tiny, path):
    """With or without arithmetic for it; the note says which it was."""
    model = apply(tiny())
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.lm_head.native == (path == "native")
    assert ("float32 products" in model.notes[-1]) == (path == "expanding")


def test_unknown_dtype(tiny):
    with pytest.raises(ValueError, match=r"--dtype fp8.*fp16 or bf16"):
        apply(tiny(), dtype="fp8")


# What is converted


@pytest.mark.parametrize("tied", [False, True])
def test_every_linear_is_half_and_the_rest_is_not(tiny, path, tied):
    """Weights of linears and lm_head are bf16; norms, rotary frequencies and an input table of its own stay float32."""
    model = apply(tiny(tied=tied))
    assert not any(type(module) is nn.Linear for module in model.modules())
    assert evidence(model)["linear_kinds"] == {"HalfLinear": 22}
    for name, tensor in stored_tensors(model).items():
        is_half = "proj" in name or "lm_head" in name or (tied and "embed_tokens" in name)
        assert tensor.dtype == (torch.bfloat16 if is_half else torch.float32), name


def test_tied_table_is_kept_and_counted_once(tiny, path):
    """One bf16 tensor serves both ends: no float32 copy, and it is read once a token."""
    model = tiny(tied=True)
    table, parameters = model.config.vocab_size * model.config.hidden_size, count_parameters(model)
    untied = apply(tiny(tied=True), untie=True)
    apply(model)
    assert model.get_input_embeddings().shared is model.lm_head
    assert count_parameters(model) == parameters
    assert streamed_bytes(model) == weight_bytes(model)
    assert untied.get_input_embeddings().weight.dtype == torch.float32
    assert untied.lm_head.weight.dtype == torch.bfloat16
    assert weight_bytes(untied) - weight_bytes(model) == 4 * table
    assert streamed_bytes(untied) == streamed_bytes(model)
    assert "untied" in untied.notes[-1] and "tied table kept" in model.notes[-1]


@pytest.mark.parametrize("tied", [False, True])
def test_bytes_fall(tiny, path, tied):
    """By two for each weight of a linear, measured on the tensors."""
    model = tiny(tied=tied)
    before, streamed = weight_bytes(model), streamed_bytes(model)
    linear = sum(module.weight.numel() for module in model.modules() if type(module) is nn.Linear)
    apply(model)
    if path != "kernels":  # their panels are padded to 16 channels
        assert weight_bytes(model) == before - 2 * linear
        assert streamed_bytes(model) == streamed - 2 * linear
    assert streamed_bytes(model) < 0.53 * streamed


def test_biases_are_converted(path):
    """Llamas with biases exist; their results stay close too."""
    model = make_tiny("grouped", attention_bias=True, mlp_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.uniform_(-0.5, 0.5)
    inputs = torch.arange(1, 20)[None]
    expected = logits_of(model, inputs)
    assert cosine(logits_of(apply(model), inputs), expected) > 0.999


# What it computes


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shape", ["grouped", "three_a_group", "multi_head"])
def test_logits_stay_close(tiny, ids, path, shape, tied):
    """Cosine above 0.999 with float32 at every position, in one pass and token by token; and not equal, which would mean
    that nothing was converted."""
    model = tiny(shape, tied=tied, initializer_range=0.08)
    expected = logits_of(model, ids)
    apply(model)
    whole = logits_of(model, ids)
    assert cosine(whole, expected) > 0.999 and not torch.equal(whole, expected)
    assert cosine(stepwise_logits(model, ids, new_cache(model)), expected) > 0.999
    cache = new_cache(model)
    chunks = [logits_of(model, ids[:, start : start + 7], cache) for start in range(0, 24, 7)]
    assert cosine(torch.cat(chunks, dim=1), expected) > 0.999


@pytest.mark.parametrize("shape", ["grouped", "three_a_group", "multi_head"])
def test_closer_than_a_model_all_in_bf16(tiny, ids, path, shape):
    """What stays float32 buys accuracy: the error is below that of `.to(bfloat16)` on the same weights."""
    model = tiny(shape)
    expected = logits_of(model, ids)
    plain = (logits_of(copy.deepcopy(model).bfloat16(), ids) - expected).abs().mean()
    assert (logits_of(apply(model), ids) - expected).abs().mean() < plain


def test_the_residual_stream_is_float32(tiny, ids, path):
    """What runs from layer to layer is summed in float32: half would drop small contributions to a growing sum."""
    model, seen = apply(tiny()), []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, arguments, output: seen.append(output.dtype))
    logits_of(model, ids)
    assert seen == [torch.float32] * 3


def test_native_products_are_half(tiny, ids, cpu):
    """Where the CPU multiplies in bf16 no linear falls back to float32 in silence, and the cache is half as well."""
    cpu(amx=True)
    model, seen = apply(tiny()), {}
    for name, module in model.named_modules():
        if isinstance(module, HalfLinear):
            module.register_forward_hook(lambda module, arguments, output, name=name: seen.update({name: output.dtype}))
    cache = new_cache(model)
    logits_of(model, ids, cache)
    assert set(seen.values()) == {torch.bfloat16} and len(seen) == 22
    assert cache.layers[0].keys.dtype == cache.layers[0].values.dtype == torch.bfloat16


def test_expanded_products_equal_float32_products_of_the_rounded_weights(tiny, ids, cpu):
    """Without bf16 arithmetic only the storage is half: the logits are those of a float32 model whose weights were
    rounded to bf16."""
    cpu()
    model = tiny()
    rounded = copy.deepcopy(model)
    for module in rounded.modules():
        if type(module) is nn.Linear:
            module.weight.data = module.weight.data.bfloat16().float()
    torch.testing.assert_close(logits_of(apply(model), ids), logits_of(rounded, ids), atol=1e-4, rtol=0)


def test_generate(tiny, ids, path):
    """Greedy and beam search run; greedy gives the argmax of its own logits."""
    model = apply(tiny())
    output = generate_ids(model, ids[:, :8], max_new_tokens=10)
    cache, fed, by_hand = new_cache(model), ids[:, :8], []
    for _ in range(10):
        fed = logits_of(model, fed, cache)[:, -1].argmax(-1, keepdim=True)
        by_hand.append(fed)
    assert torch.equal(output[:, 8:], torch.cat(by_hand, dim=1))
    assert generate_ids(model, ids[:, :8], max_new_tokens=4, num_beams=3).shape[1] <= 12


def test_on_an_accelerator(tiny, ids, accelerator):
    """fp16 by default, multiplied by the device."""
    model = tiny(initializer_range=0.08)
    expected = logits_of(model, ids)
    model = apply(model.to(accelerator))
    assert model.lm_head.weight.dtype == torch.float16 and model.lm_head.native
    assert cosine(stepwise_logits(model, ids.to(accelerator), new_cache(model)).cpu(), expected) > 0.999


# Order


def test_second_time_is_refused(tiny, path):
    for tied in (False, True):
        with pytest.raises(ValueError, match=r"no nn.Linear left to convert"):
            apply(apply(tiny(tied=tied)))


@pytest.mark.parametrize("tied", [False, True])
def test_after_quantization_is_refused(tiny, tied):
    """Int8 layers are no nn.Linear any more: the sentence gives the order."""
    quantization = pytest.importorskip("optimizations.quantization")
    with pytest.raises(ValueError, match="before quantization"):
        apply(quantization.apply(tiny(tied=tied)))


def test_pruning_afterwards_is_refused(tiny, path):
    with pytest.raises(ValueError, match="run head_pruning before"):
        prune(apply(tiny()))


@pytest.mark.parametrize("shape", ["grouped", "three_a_group"])
def test_after_pruning_and_under_an_int8_cache(tiny, ids, path, shape):
    """prune -> precision -> cache: the combination of the README, with and without an explicit head map."""
    model = prune(tiny(shape), prune_ratio=0.25)
    expected = logits_of(model, ids)
    model = quantize_cache(apply(model))
    assert cosine(stepwise_logits(model, ids, new_cache(model)), expected) > 0.995
    assert generate_ids(model, ids[:, :8], max_new_tokens=4).shape == (2, 12)


@pytest.mark.embedded
def test_embedded_model(embedded, path):
    """The real model keeps its judgement on a sentence, on either path, at about half the bytes."""
    encoded = embedded.tokenizer("The capital of France is Paris, and the capital of Italy is", return_tensors="pt").input_ids
    expected, before = logits_of(embedded.model, encoded), weight_bytes(embedded.model)
    model = apply(embedded.model)
    actual = logits_of(model, encoded)
    assert cosine(actual, expected) > 0.998  # bf16 products of the library, the least exact of the three, reach 0.9988
    assert actual[0, -1].argmax() == expected[0, -1].argmax()
    assert weight_bytes(model) < 0.51 * before


@pytest.mark.embedded
def test_the_small_class(embedded_loaded_once):
    """`MixedPrecisionInference().generate(...)` converts and answers."""
    inference = mixed_precision.MixedPrecisionInference("smollm2-135m", device="cpu", dtype="bf16")
    assert "Paris" in inference.generate("The capital of France is", max_new_tokens=3)
