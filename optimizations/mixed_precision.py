"""Mixed precision: linear layers in half, everything that sums or normalises in float32.

Idea    Decode at batch 1 is bound by reading weights: half the bytes, up to twice the speed. Residual stream, RMSNorm and
        input embeddings stay float32 (the residual adds 44 small numbers to a growing one); linears and lm_head are
        half, with casts where the two meet. lm_head in float32 would cost 6 % of TinyLlama's decode.
Dtype   fp16 on CUDA and MPS, bf16 on a CPU. fp16 on a CPU without AMX-FP16 is refused: it is converted in software and
        slower than float32. A CPU without bf16 arithmetic stores bf16 and multiplies in float32, each weight widened as it is
        read: decode and memory gain as elsewhere, prefill less. The record's notes say which it was.
Tied    SmolLM2's input embedding is lm_head. A float32 copy would cost 21 % of the model, so the one table stays shared, in
        half, and looks up float32 rows; with `--untie` the float32 copy is kept and counted.
Loses   Nothing that shows in perplexity (retention >= 99.8 %).
Paper   Micikevicius et al.: Mixed Precision Training. https://arxiv.org/abs/1710.03740
Writes  mixed_precision_results.json beside the baseline's, and charts, in the results folder.

    python optimizations/mixed_precision.py
    python optimizations/mixed_precision.py --dtype bf16 --model smollm2-135m
"""

from __future__ import annotations

import torch
from torch import nn

import cli
from devices import Unsupported, has_half_arithmetic
from inference import Inference
from kernels.attention import use_grouped_heads
from kernels.build import cpu_note, load_kernels
from kernels.gated_mlp import use_gated_mlps
from kernels.half import CastAfter, HalfLinear
from kernels.modules import SharedTable, add_notes, check_not_lean, is_tied, replace_linears
from streaming import read_weights, streams

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@streams
def apply(model, *, dtype: str = "auto", untie: bool = False):
    """Convert in place. `dtype` is auto, fp16 or bf16; `untie` keeps a float32 copy of a shared embedding table.

    Raises Unsupported for fp16 on a CPU that has no arithmetic for it, ValueError if no nn.Linear is left to convert.
    """
    check_not_lean(model)
    check(model.config, dtype=dtype, untie=untie)
    half, native, how = _choose(model.device, dtype)
    if not any(type(module) is nn.Linear for module in model.modules()):
        raise ValueError("no nn.Linear left to convert: run mixed_precision before quantization")
    tied = is_tied(model)
    if tied and not untie:
        model.lm_head = HalfLinear(model.lm_head, dtype=half, native=native)
        model.set_input_embeddings(SharedTable(model.lm_head))
    replace_linears(model, lambda _, linear: HalfLinear(linear, dtype=half, native=native))
    read_weights(model)  # the table, where it stays float32
    if native:
        _cast_where_dtypes_meet(model, half)
    use_grouped_heads(model)
    use_gated_mlps(model)
    add_notes(model, how + _table_note(tied, untie))
    return model


def check(config, *, dtype: str, untie: bool) -> None:
    """What can be known before weights are loaded. Raises ValueError naming the flag."""
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"--dtype {dtype}: choose auto, fp16 or bf16")


def _choose(device: torch.device, dtype: str) -> tuple[torch.dtype, bool, str]:
    """The dtype, whether the device multiplies it by operators of its own, and what is said of it."""
    half = DTYPES["bf16" if device.type == "cpu" else "fp16"] if dtype == "auto" else DTYPES[dtype]
    native, reason = has_half_arithmetic(device, half)
    if half == torch.float16 and not native:
        raise Unsupported(f"fp16 on this CPU is slower than float32 ({reason}): use bf16")
    name = str(half).removeprefix("torch.")
    how = f"{name} products in hardware ({reason})" if native else f"{name} weights, float32 products: {reason}"
    if device.type == "cpu":
        missing = load_kernels()
        if missing is None and half == torch.bfloat16:
            return half, False, f"{name} weights, {cpu_note()}: activations stay float32 between layers"
        how += f"; {missing}" if missing else ""
    return half, native, how


def _cast_where_dtypes_meet(model, half: torch.dtype) -> None:
    decoder = model.model
    for layer in decoder.layers:
        if hasattr(layer, "input_layernorm"):  # layer_pruning takes it with the attention sublayer
            layer.input_layernorm = CastAfter(layer.input_layernorm, half)
        layer.post_attention_layernorm = CastAfter(layer.post_attention_layernorm, half)
    decoder.norm = CastAfter(decoder.norm, half)
    decoder.rotary_emb = CastAfter(decoder.rotary_emb, half)  # else float32 angles promote q and k, but not v


def _table_note(tied: bool, untie: bool) -> str:
    if not tied:
        return ""
    return "; embedding table untied, float32 copy kept" if untie else "; tied table kept, in half"


class MixedPrecisionInference(Inference):
    """`MixedPrecisionInference().generate("Hello")`: load, convert, answer."""

    apply = staticmethod(apply)


def main(argv: list[str] | None = None) -> int:
    import experiment

    parser = cli.build_parser(__doc__)
    defaults = apply.__kwdefaults__
    parser.add_argument(
        "--dtype", choices=["auto", *DTYPES], default=defaults["dtype"], help="default: fp16 on CUDA and MPS, bf16 on CPU"
    )
    parser.add_argument("--untie", action="store_true", help="keep a float32 copy of a tied embedding table")
    args = cli.parse(parser, argv)
    steps = [("mixed_precision", {"dtype": args.dtype, "untie": args.untie})]
    return experiment.run({"mixed_precision": steps}, args, parser=parser)


if __name__ == "__main__":
    raise SystemExit(main())
