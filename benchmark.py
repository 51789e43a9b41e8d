"""What is measured on a model, whatever was done to it: time to first token, prefill, decode, memory, bytes.

This file knows no technique. It asks the model for its KV cache (`model.make_cache`) and its decode loop
(`model.greedy_steps`), if a technique has set them, drives prefill itself, and reads bytes, heads and dtypes off the modules,
so that a record states what is there rather than what was asked for.

Definitions (P prompt tokens, N new tokens, B sequences; end-of-sequence is ignored, so the work is fixed; t0 is taken when
the inputs are on the device and the device is idle; t_k when the host holds token k; tokenising is never inside):
    ttft_ms              = t_1 - t0
    prefill_tokens_per_s = B * P / (time of the prefill forward)        llama-bench "pp"
    tpot_ms              = (t_N - t_1) / (N - 1)                        vLLM, AIPerf
    decode_tokens_per_s  = B * (N - 1) / (t_N - t_1)                    the first token belongs to prefill
Only the last position's logits are computed: at 2048 x 32000 x 4 B the others would dominate the peak (262 MB).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from transformers import DynamicCache

from devices import MB, synchronize
from memory import PeakMemory

test_prompts = [
    "The capital of France is",
    "Explain in simple terms how a refrigerator keeps food cold:",
    "Once upon a time, in a village by the sea,",
    "Write a short note to a colleague about tomorrow's meeting:",
]


@dataclass(frozen=True)
class Workload:
    """The fixed work of a run. `depth` tokens are already in the cache before the timed prompt arrives."""

    prompt_tokens: int = 128
    new_tokens: int = 32
    depth: int = 0
    batch_size: int = 1
    repeats: int = 7
    seed: int = 0
    quality_windows: int = 16
    quality_window: int = 512
    quality_chunk: int = 128
    continuation_tokens: int = 32
    draft_pairs: int = 3

    def as_dict(self) -> dict:
        return asdict(self)

    @property
    def positions(self) -> int:
        """How many positions of the model the longest sequence uses."""
        return self.depth + self.prompt_tokens + self.new_tokens

    @property
    def mean_fill(self) -> float:
        """The share of the final KV cache that a decoded token reads on average."""
        return (self.depth + self.prompt_tokens + self.new_tokens / 2) / self.positions

    def bytes_per_token(self, streamed_bytes: int, kv_cache_mb: float, tokens_per_pass: float = 1.0) -> float:
        """What is read for one decoded token: weights once a pass, and the KV cache as full as it is on average."""
        return (streamed_bytes + kv_cache_mb * MB * self.mean_fill) / tokens_per_pass


@dataclass(frozen=True)
class Timing:
    """Raw readings of one generation: no statistics. `tokens` are the greedy ids, shape [B, N].

    `passes` forward passes decoded all but the first of them, and judged `drafted` tokens that were guessed beforehand.
    """

    prefill_s: float
    ttft_s: float
    decode_s: float
    tokens: torch.Tensor
    kv_cache_bytes: int
    passes: int
    drafted: int

    def rates(self, prompt_tokens: int) -> dict[str, float]:
        """The four speed quantities of a record; decode figures are absent when only one token was generated."""
        batch_size, new_tokens = self.tokens.shape
        times = {"prefill_s": self.prefill_s, "ttft_s": self.ttft_s, "decode_s": self.decode_s}
        return speeds(**times, prompt_tokens=prompt_tokens, new_tokens=new_tokens, batch_size=batch_size)


def speeds(
    *, prefill_s: float, ttft_s: float, decode_s: float, prompt_tokens: int, new_tokens: int, batch_size: int = 1
) -> dict[str, float]:
    """The four speed quantities, of ours and of peers. The first token belongs to prefill."""
    rates = {"ttft_ms": ttft_s * 1e3, "prefill_tokens_per_s": batch_size * prompt_tokens / prefill_s}
    if new_tokens > 1:
        rates["tpot_ms"] = decode_s / (new_tokens - 1) * 1e3
        rates["decode_tokens_per_s"] = batch_size * (new_tokens - 1) / decode_s
    return rates


def new_cache(model, *, room: int = 0):
    """The KV cache this model asks for: a technique's own where it has set `model.make_cache`, else transformers' default.

    One that can hold `room` tokens from the start is told to: it is then never copied to a larger place.
    """
    make_cache = getattr(model, "make_cache", None)
    cache = make_cache() if make_cache is not None else DynamicCache(config=model.config)
    if hasattr(cache, "room"):
        cache.room = room
    return cache


def greedy_steps(model, ids: torch.Tensor, cache, *, new_tokens: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The plain decode loop, one token a forward pass: what `model.greedy_steps` of a technique replaces.

    Args:
        ids: int64 [B, T], everything so far; `cache` holds all of it but the last token.
        new_tokens: how many to decode, whatever they are.

    Yields, for each forward pass:
        tokens int64 [B, k] on the host, the next k greedy ones (here k is 1), and the logits [B, rows, V] they come from,
        where all rows but one judged a drafted token. Exactly `new_tokens` tokens in all.
    """
    token = ids[:, -1:]
    for _ in range(new_tokens):
        logits = model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        token = logits[:, -1:].argmax(-1)
        yield token.cpu(), logits  # the copy to the host is what a user waits for, and waits for the device


def decode_steps(model):
    """The decode loop this model asks for: a technique's own where it has set `model.greedy_steps`, else the plain one."""
    return getattr(model, "greedy_steps", None) or greedy_steps


@torch.inference_mode()
def time_generation(model, input_ids: torch.Tensor, *, new_tokens: int, depth: int = 0, steps=None) -> Timing:
    """Prefill `input_ids` [B, depth + P] and decode greedily to `new_tokens`; the first `depth` ids are fed untimed.

    `steps` is the decode loop (see greedy_steps), by default the one the model asks for.
    Raises FloatingPointError when the last logits are not finite: a speed of garbage is no result.
    """
    steps = steps or decode_steps(model)
    device = input_ids.device
    cache = new_cache(model, room=input_ids.shape[1] + new_tokens)
    if depth:
        model(input_ids=input_ids[:, :depth], past_key_values=cache, use_cache=True, logits_to_keep=1)
    prompt = input_ids[:, depth:]

    synchronize(device)
    start = time.perf_counter()
    logits = model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    synchronize(device)
    prefilled = time.perf_counter()
    token = logits[:, -1:].argmax(-1)
    generated = [token.cpu()]
    first = time.perf_counter()
    passes = drafted = 0
    for tokens, logits in steps(model, torch.cat((input_ids, token), 1), cache, new_tokens=new_tokens - 1):
        generated.append(tokens)
        passes, drafted = passes + 1, drafted + logits.shape[1] - 1
    end = time.perf_counter()

    if not torch.isfinite(logits).all():
        raise FloatingPointError(f"the logits are not finite after {new_tokens} tokens")
    generated = torch.cat(generated, dim=1)
    return Timing(prefilled - start, first - start, end - first, generated, cache_bytes(cache), passes, drafted)


def measure_memory(model, input_ids: torch.Tensor, *, new_tokens: int, depth: int = 0) -> dict:
    """Peaks of prefill and of decode apart, in a pass that is not timed.

    Returns `prefill_peak_mb`, `decode_peak_mb` (absolute: the caller subtracts the runtime's own share), the counter's
    `method` and `interval_ms`, the `kv_cache_mb` at the end, and how many `tokens_per_pass` the weights were read for.
    """
    device = input_ids.device
    with PeakMemory(device) as prefill_peak:
        time_generation(model, input_ids, new_tokens=1, depth=depth)
    with PeakMemory(device) as decode_peak:
        timing = time_generation(model, input_ids, new_tokens=new_tokens, depth=depth)
    return {
        "prefill_peak_mb": prefill_peak.peak_mb,
        "decode_peak_mb": decode_peak.peak_mb,
        "kv_cache_mb": timing.kv_cache_bytes / MB,
        "tokens_per_pass": (new_tokens - 1) / timing.passes if timing.passes else 1.0,
        "method": prefill_peak.method,
        "interval_ms": prefill_peak.interval_ms,
    }


def cache_bytes(cache) -> int:
    """Bytes of the keys, values and scales a cache really holds."""
    if hasattr(cache, "nbytes"):
        return cache.nbytes
    tensors = (tensor for layer in cache.layers for tensor in (layer.keys, layer.values))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def weight_bytes(model) -> int:
    """Bytes of all parameters and buffers, a storage shared by two modules (tied embeddings) counted once."""
    return sum(_storages(model).values())


def streamed_bytes(model) -> int:
    """Bytes of weights read for one decoded token: all but the input embedding table, unless lm_head shares it."""
    embedding = model.get_input_embeddings()
    head = _storages(model.get_output_embeddings())
    lookup_only = sum(size for key, size in _storages(embedding).items() if key not in head)
    return weight_bytes(model) - lookup_only


def evidence(model) -> dict:
    """What can be seen on the model: bytes by dtype, modules by kind, heads that are really there, bits a weight where a
    technique counted them."""
    by_dtype: Counter = Counter()
    for tensor in stored_tensors(model).values():
        by_dtype[str(tensor.dtype).removeprefix("torch.")] += tensor.numel() * tensor.element_size()
    kinds = Counter(type(module).__name__ for module in model.modules() if "Linear" in type(module).__name__)
    attentions = [module for name, module in model.named_modules() if name.endswith("self_attn")]
    bits = getattr(model, "effective_bits", None)
    return ({} if bits is None else {"effective_bits": bits}) | {
        "bytes_by_dtype": dict(by_dtype),
        "linear_kinds": dict(kinds),
        "query_heads": sum(attention.o_proj.in_features // attention.head_dim for attention in attentions),
        "kv_heads": sum(attention.k_proj.out_features // attention.head_dim for attention in attentions),
        "layers": len(attentions),
        "cache": type(new_cache(model)).__name__,
    }


def count_parameters(model) -> int:
    """Weights of the network, however they are stored: packed modules say how many they stand for."""
    seen: set[int] = set()
    total = 0
    for module in model.modules():
        if hasattr(module, "logical_parameters"):
            if id(module) not in seen:
                total += module.logical_parameters
            seen.add(id(module))
            continue
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen:
                total += parameter.numel()
                seen.add(id(parameter))
    return total


@torch.inference_mode()
def first_non_finite_module(model, input_ids: torch.Tensor) -> str | None:
    """Name of the first module, in order of execution, whose output is NaN or infinite; None if none is."""
    found: list[str] = []

    def watch(name):
        def hook(_module, _arguments, output):
            tensors = output if isinstance(output, tuple) else (output,)
            if not found and not all(t.isfinite().all() for t in tensors if isinstance(t, torch.Tensor)):
                found.append(name)

        return hook

    leaves = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    handles = [module.register_forward_hook(watch(name)) for name, module in leaves]
    try:
        model(input_ids=input_ids, past_key_values=new_cache(model), use_cache=True, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def main_dtype(model) -> str:
    """The dtype that most bytes of the weights are stored in."""
    by_dtype = evidence(model)["bytes_by_dtype"]
    return max(by_dtype, key=by_dtype.get)


def stored_tensors(module) -> dict[str, torch.Tensor]:
    """Every tensor that must be kept to run the module again, by name; one that two modules share appears once.

    A module whose weights are neither parameters nor buffers (torch's packed linears) lists them in `packed_tensors()`.
    """
    named = [*module.named_parameters(), *module.named_buffers()]
    for name, part in module.named_modules():
        if hasattr(part, "packed_tensors"):
            named += [(f"{name}.{key}", tensor) for key, tensor in part.packed_tensors().items()]
    unique: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in named:
        unique.setdefault(tensor.data_ptr(), (name, tensor))  # parts of one fused weight begin at different places
    return dict(unique.values())


def _storages(module) -> dict[int, int]:
    tensors = stored_tensors(module).values()
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
