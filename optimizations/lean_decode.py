"""A decode step without overhead: fused products, a cache that never moves, attention that reads it in place.

Idea    A token of TinyLlama in int8 needs 1.1 GB of weights: 36 ms at 30 GB/s. transformers' forward adds 20 ms of Python,
        masks, copies of the KV cache and small operators. Here q/k/v and gate/up are one product each, keys and values are
        written where they stay, and for few tokens a whole layer is one call: 8 ms remain (docs/performance-log.md).
Helps   Most where a token costs least: small models, few bytes. It changes no weight, so it goes on top of any recipe.
Cache   Keys and values are kept in bfloat16 (`--kv-dtype float32` for exactness), unless kv_cache_quant came before and
        keeps them in int8. Attention folds the int8 scales into scores and probabilities; nothing is expanded first.
Serves  `generate` too: greedy, sampling, beams. Padded batches go through transformers' own forward, with the same cache.
CUDA    A GPU waits for Python: 20 ms a token for an H200, which could read the weights in one. Steps of up to 16 tokens are
        recorded as a CUDA graph of Triton kernels (kernels/device_step.py) and replayed with one call.
Loses   Nothing measured, on a CPU with the kernels. Elsewhere (MPS, a prompt on CUDA, no Triton) the PyTorch twins of the
        operators run: correct, hardly faster.
        A layer whose q, k and v are not of one precision (int4 with int8 layers named by hand) cannot be one call.
Papers  Pope et al. 2022, inference as reading weights: https://arxiv.org/abs/2211.05102; Dao et al. 2022, FlashAttention's
        running softmax: https://arxiv.org/abs/2205.14135
Writes  lean_decode_results.json beside the baseline's, and charts, in the results folder.

    python optimizations/lean_decode.py
    python run_optimization.py --recipes int8+lean,int4+lean
"""

from __future__ import annotations

import torch

import cli
from inference import Inference
from kernels.build import cpu_note, gpu_kernels, load_kernels
from kernels.kv_cache import RoomyCache, RoomyLayer, use_cache
from kernels.lean import LeanForward, use_lean_forward
from kernels.modules import add_notes


class Float32Layer(RoomyLayer):
    DTYPE = torch.float32


class BFloat16Cache(RoomyCache):
    """Keys and values in bfloat16."""


class Float32Cache(RoomyCache):
    """Keys and values in float32: as exact as transformers' own cache."""

    LAYER = Float32Layer


CACHES = {"bfloat16": BFloat16Cache, "float32": Float32Cache}


def apply(model, *, kv_dtype: str = "bfloat16"):
    """Put the lean pass in front of the model's forward, and give it a cache with room to grow unless it has one.

    Raises ValueError if it was applied before, or for a model that it cannot serve.
    """
    check(model.config, kv_dtype=kv_dtype)
    if isinstance(model.forward, LeanForward):
        raise ValueError("this model has the lean forward pass already: apply lean_decode once, last of all techniques")
    lean = use_lean_forward(model)
    if getattr(model, "make_cache", None) is None:
        use_cache(model, CACHES[kv_dtype])
    how = "PyTorch twins"
    if model.device.type == "cpu":
        how = load_kernels() or cpu_note()
    elif model.device.type == "cuda":
        how = gpu_kernels() or "Triton kernels in a CUDA graph for few tokens, PyTorch's own for many"
    note = f"lean forward: {lean.fused} fused products, KV cache {model.make_cache.__name__}; {how}"
    add_notes(model, note)
    return model


def check(config, *, kv_dtype: str) -> None:
    """What can be known before weights are loaded. Raises ValueError naming the flag."""
    if kv_dtype not in CACHES:
        raise ValueError(f"--kv-dtype {kv_dtype}: choose from {', '.join(CACHES)}")


class LeanInference(Inference):
    """`LeanInference().generate("Hello")`: load, shorten the forward pass, answer."""

    apply = staticmethod(apply)


def main(argv: list[str] | None = None) -> int:
    import experiment

    parser = cli.build_parser(__doc__)
    parser.add_argument("--kv-dtype", choices=list(CACHES), default=apply.__kwdefaults__["kv_dtype"],
        help="what keys and values are kept in (default: %(default)s)")  # fmt: skip
    args = cli.parse(parser, argv)
    return experiment.run({"lean_decode": [("lean_decode", {"kv_dtype": args.kv_dtype})]}, args, parser=parser)


if __name__ == "__main__":
    raise SystemExit(main())
