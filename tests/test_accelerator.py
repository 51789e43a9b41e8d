"""Every technique on a CUDA or MPS device: applied there, it computes what it computes on a CPU, and leaves nothing behind."""

import copy

import pytest
import torch
from conftest import logits_of, stepwise_logits
from torch.nn.functional import cosine_similarity

from benchmark import new_cache, time_generation
from inference import generate_ids
from models import ModelSource
from records import technique_module
from stacks import parse_stack

# The tiny model has no words: pruning and recovery learn from random ids here, int4 rounds to nearest, nothing is smoothed.
STACKS = [
    "mixed_precision",
    "mixed_precision:dtype=bf16",
    "quantization:scheme=grouped",
    "quantization:scheme=dynamic,smoothing=0",
    "quantization:scheme=dynamic,smoothing=0,granularity=tensor",
    "quantization:scheme=weight-only",
    "int4:rounding=nearest",
    "int4:tune_steps=8",
    "kv_cache_quant",
    "head_pruning",
    "head_pruning:mode=mask",
    "head_pruning:method=calibrated",
    "mlp_pruning",
    "layer_pruning:what=blocks,count=1",
    "lean_decode",
    "mixed_precision + lean_decode",
    "mixed_precision + kv_cache_quant + lean_decode",
    "quantization + lean_decode + prompt_lookup",
    "int4:rounding=nearest + kv_cache_quant + lean_decode",
    "head_pruning + quantization:scheme=weight-only + kv_cache_quant + lean_decode",
]


@pytest.mark.parametrize("stack", STACKS)
def test_computes_what_a_cpu_does(stack, tiny, ids, accelerator, tmp_path, monkeypatch):
    """A prompt at once and token by token. Int8 activations and half precision round differently there: direction, not bits."""
    monkeypatch.setattr("fitting.calibration_cache.ROOT", tmp_path)
    on_cpu = tiny(initializer_range=0.08)
    on_device = applied(stack, copy.deepcopy(on_cpu).to(accelerator))
    on_cpu = applied(stack, on_cpu)
    expected = logits_of(on_cpu, ids, new_cache(on_cpu))
    for actual in (
        logits_of(on_device, ids.to(accelerator), new_cache(on_device)),
        stepwise_logits(on_device, ids.to(accelerator), new_cache(on_device)),
    ):
        assert cosine_similarity(actual.cpu(), expected, dim=-1).min() > 0.995
    stored = [*on_device.parameters(), *on_device.buffers()]
    assert {tensor.device.type for tensor in stored} == {accelerator.type}


@pytest.mark.parametrize("stack", STACKS)
def test_generates_and_is_timed(stack, tiny, ids, accelerator, tmp_path, monkeypatch):
    """What the benchmark times is what a user gets."""
    monkeypatch.setattr("fitting.calibration_cache.ROOT", tmp_path)
    model = applied(stack, tiny(initializer_range=0.08).to(accelerator))
    prompt = ids[:1].to(accelerator)
    timing = time_generation(model, prompt, new_tokens=40)
    assert torch.equal(generate_ids(model, prompt, max_new_tokens=40)[:, 24:].cpu(), timing.tokens)
    assert timing.kv_cache_bytes > 0


def applied(stack: str, model):
    if "prompt_lookup" not in stack:  # which refuses random weights that say so
        model.source = ModelSource("tiny", "random", "")
    for technique, options in parse_stack(stack):
        model = technique_module(technique).apply(model, **options)
    return model
