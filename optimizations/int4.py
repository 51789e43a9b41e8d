"""Int4: every linear layer's weights as 4-bit codes in groups of 64, a seventh of the bytes of float32.

Idea    A weight is code * scale + minimum, code in 0..15, scale and minimum in bfloat16 for each group of consecutive inputs:
        4.5 bits a weight in groups of 64. Inputs are int8 per token and group, so the products stay integers. Rounding each
        weight to its nearest code costs a small model a fifth of its quality. GPTQ, the default, rounds one input after another
        and makes good each error in the weights not yet rounded, weighed by the second moments of the layer's inputs on
        calibration text; then grid and codes are improved in turn. Blocks are visited in order, and each layer is rounded for
        the inputs that the rounded layers before it give. At last scales, minimums and norms learn the float model's answers
        for `--tune-steps` steps; codes stay. The model writes a quarter of the calibration text, the rest is of up to four
        kinds: what is learnt shall not hold for news alone. The result is cached in ~/.cache/tinyllama-optimization; where it
        is found there, layers are taken from it block by block, and the float model is never in memory.
Mixed   `--int8-layers auto` gives the layers whose rounding raises the loss most per bit int8 instead, as far as
        `--max-bits` allows: 4.6 is int4 with a few exceptions, 6 a mixture. q, k and v count as one layer, and so do gate
        and up: lean decode multiplies them as one. `none`, or names, choose by hand.
Helps   Decode at batch 1 is bound by reading weights: half the bytes of int8.
Loses   Quality, against int8, and more of it on text unlike the calibration text: SmolLM2 at 4.6 bits loses 5 % on news, 8 %
        on editorials; at 6 bits 2 and 3 %. Some ten minutes of calibration the first time. SmolLM2's file was rounded before,
        to another grid (Q4_1: groups of 32): its weights are 4-bit values already, but not ours. Random weights are rounded to
        nearest.
Papers  Frantar et al. 2022 (GPTQ): https://arxiv.org/abs/2210.17323
        Behdin et al. 2023 (QuantEase, codes improved in turn): https://arxiv.org/abs/2309.01885
        Chen et al. 2024 (EfficientQAT, tuning the grid end to end): https://arxiv.org/abs/2407.11062
        Dong et al. 2020 (HAWQ-V2, which layers need more bits): https://arxiv.org/abs/1911.03852
Writes  int4_results.json beside the baseline's, and charts, in the results folder.

    python optimizations/int4.py
    python optimizations/int4.py --max-bits 6 --model smollm2-135m
    python optimizations/int4.py --rounding nearest --int8-layers none
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Mapping

import torch
from torch import nn

import cli
import models
from devices import fast_products
from fitting import calibration
from fitting.blockwise import STAGES, round_blockwise, stages_of
from fitting.calibration_cache import CalibrationCache
from fitting.form_cache import cached_forms, rows_of_form, save_forms
from fitting.sensitivity import added_bits, choose_upgrades, costs_by_position, loss_increases
from fitting.tuning import HELD_OUT_MOST, tune
from inference import Inference
from kernels.attention import use_grouped_heads
from kernels.gated_mlp import use_gated_mlps
from kernels.int4 import GROUP_SIZES, nearest_change
from kernels.int4_modules import Int4Linear, Int4Table
from kernels.int8_modules import Int8Linear, Int8Table
from kernels.modules import SharedTable, add_notes, check_not_lean, is_tied, replace_linears
from streaming import read_weights, streams

TABLE = "model.embed_tokens"
SENSITIVITY_TOKENS = 2048
ROUNDING_CODE = ("gptq.py", "blockwise.py", "int4.py", "int8.py")  # a change of the maths is a change of the codes
TUNING_CODE = ("tuning.py", "blockwise.py", "divergence.py", "healing.py", "int4.py", "int8.py")


@streams
def apply(
    model, *, group_size: int = 64, rounding: str = "gptq", int8_layers: str = "auto", max_bits: float = 4.6,
    damping: float = 0.01, calibration_tokens: int = 16384, generated_share: float = 0.25, tune_steps: int = 96,
):  # fmt: skip
    """Quantise in place; sets `model.effective_bits`, stored bits per weight over linear layers and embedding.

    `int8_layers` is auto (the most sensitive, up to `max_bits` effective bits), none, or names separated by commas: a kind
    (down_proj, lm_head) or one layer (layers.3.mlp.down_proj). A tied table has the precision of lm_head.
    Raises ValueError if a linear layer is no longer nn.Linear.
    """
    check_not_lean(model)
    check(
        model.config, group_size=group_size, rounding=rounding, int8_layers=int8_layers, max_bits=max_bits,
        damping=damping, calibration_tokens=calibration_tokens, generated_share=generated_share, tune_steps=tune_steps,
    )  # fmt: skip
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    if len(linears) != 1 + sum(len(stage) for layer in model.model.layers for stage in stages_of(layer)):
        raise ValueError("no nn.Linear left to quantize: apply int4 once, to a model in floating point")
    notes, tied, real = [], is_tied(model), calibration.has_text(model)
    if not real and rounding == "gptq":
        rounding = "nearest"
        notes.append("no text to calibrate on (random weights, or no tokenizer): rounded to nearest, int8 layers by position")
    text = functools.partial(calibration.calibration_ids, model, generated_share=generated_share, mixed=True)
    upgraded = _int8_names(model, linears, int8_layers, text, max_bits=max_bits, group_size=group_size)
    layers = len(linears)
    del linears  # its modules would keep every replaced weight alive
    forms, norms = {}, {}
    if rounding == "gptq":
        ids = text(tokens=calibration_tokens)
        cache, forms = _gptq_forms(model, ids, tied=tied, group_size=group_size, damping=damping)
        if tune_steps:
            ids = text(tokens=(tune_steps + HELD_OUT_MOST) * calibration.WINDOW)
            options = {"int8": upgraded, "steps": tune_steps, "group_size": group_size, "tied": tied}
            forms, norms = _tuned_forms(model, forms, cache, ids, **options)
            learnt = any(not torch.equal(weight, model.get_parameter(name)) for name, weight in norms.items())
            outcome = "scales, minimums and norms learnt" if learnt else "nothing kept, held-out text did not gain"
            notes.append(f"tuned for {tune_steps} steps: {outcome}")

    def make(name: str, linear: nn.Linear) -> nn.Module:
        if name in upgraded:
            return Int8Linear(linear, group_size=group_size, int8_activations=True)
        form = functools.partial(rows_of_form, forms, name) if forms else None
        return Int4Linear(linear, group_size=group_size, form=form, search=real)

    replace_linears(model, make)
    for name, weight in norms.items():
        models.set_parameter(model, name, nn.Parameter(weight, requires_grad=False))
    table = Int8Table if TABLE in upgraded else Int4Table
    embedding = model.get_input_embeddings()
    model.set_input_embeddings(SharedTable(model.lm_head) if tied else table(embedding, group_size=group_size))
    use_grouped_heads(model)
    use_gated_mlps(model)
    model.effective_bits = effective_bits(model)
    kinds = f"{len(upgraded)} of {layers + (not tied)} in int8" + (f" ({_summary(upgraded)})" if upgraded else "")
    notes.insert(0, f"int4 in groups of {group_size}, {rounding}: {model.effective_bits:.2f} bits a weight, {kinds}")
    source = getattr(model, "source", None)
    if source is not None and (grid := models.rounded_as(source)):
        notes.append(f"the weights in the file had been rounded before, to {grid}: another grid than this one")
    add_notes(model, *notes)
    return model


def check(
    config, *, group_size: int, rounding: str, int8_layers: str, max_bits: float, damping: float,
    calibration_tokens: int, generated_share: float, tune_steps: int,
) -> None:  # fmt: skip
    """What can be known before weights are loaded. Raises ValueError naming the flag."""
    if group_size not in GROUP_SIZES:
        raise ValueError(f"--group-size {group_size}: choose from {', '.join(map(str, GROUP_SIZES))}")
    if rounding not in ("gptq", "nearest"):
        raise ValueError(f"--rounding {rounding}: choose gptq or nearest")
    if int8_layers == "auto" and not max_bits >= 4 + 32 / group_size:  # nan is no number of bits either
        raise ValueError(f"--max-bits {max_bits:g}: int4 in groups of {group_size} takes {4 + 32 / group_size:g} or more")
    if not 0 < damping < 1:
        raise ValueError(f"--damping {damping:g}: choose a number between 0 and 1, e.g. 0.01")
    if calibration_tokens < 512:
        raise ValueError(f"--calibration-tokens {calibration_tokens}: choose 512 or more")
    if not 0 <= generated_share <= 1:
        raise ValueError(f"--generated-share {generated_share:g}: choose a number from 0 to 1")
    if not 0 <= tune_steps <= 10_000:
        raise ValueError(f"--tune-steps {tune_steps}: choose from 0 (no tuning) to 10000")
    if int8_layers not in ("auto", "none"):
        _named(int8_layers, _layer_names(config))


def effective_bits(model) -> float:
    """Stored bits, scales included, per weight of the linear layers and the embedding (a tied table counts once)."""
    parts = [module for module in model.modules() if isinstance(module, Int4Linear | Int8Linear | Int4Table | Int8Table)]
    weights = sum(part.logical_parameters for part in parts)
    stored = {buffer.data_ptr(): buffer.nbytes for part in parts for buffer in part.buffers()}
    return 8 * sum(stored.values()) / weights


def _gptq_forms(model, ids: torch.Tensor, *, tied: bool, **options) -> tuple[CalibrationCache, Mapping]:
    """Codes, scale and minimum by layer name, those that will get int8 too, from the cache if found before; and that cache."""
    cache = CalibrationCache.of(model, ids, code=ROUNDING_CODE, **options)
    forms = cached_forms(cache, "gptq", model)
    if forms is None:
        read_weights(model)
        forms = round_blockwise(model, ids, tied=tied, **options)
        save_forms(cache, "gptq", forms)
    return cache, forms


def _tuned_forms(
    model, forms: Mapping, cache: CalibrationCache, ids: torch.Tensor, *, int8: list[str], steps: int, **options
) -> tuple[Mapping, dict]:
    """Like `forms`, which `cache` holds, but tuned on `ids` and without the layers in `int8`; and weights of norms by name."""
    tuned_cache = CalibrationCache.of(model, ids, code=TUNING_CODE, rounding=cache.folder.name, int8=sorted(int8), steps=steps)
    stored = cached_forms(tuned_cache, "tuned", model)
    if stored is not None:
        return stored, stored.norms
    read_weights(model)
    rounded = {name: form for name, form in forms.items() if name not in int8}
    tuned, norms = tune(model, ids, rounded, steps=steps, **options)
    save_forms(tuned_cache, "tuned", tuned, norms)
    return tuned, norms


def _int8_names(model, linears: dict, int8_layers: str, text, *, max_bits: float, group_size: int) -> list[str]:
    """Which layers get int8, the embedding among them where it is a table of its own."""
    tied = is_tied(model)
    if int8_layers == "none":
        return []
    if int8_layers != "auto":
        names = _named(int8_layers, _layer_names(model.config))
        return list(dict.fromkeys("lm_head" if tied and name == TABLE else name for name in names))  # one table, one precision
    candidates = linears if tied else linears | {TABLE: model.get_input_embeddings()}
    shapes = {name: tuple(module.weight.shape) for name, module in candidates.items()}
    added, spent = added_bits(shapes, group_size)
    if not calibration.has_text(model):
        costs = costs_by_position(added, len(model.model.layers))
    else:
        costs = _measured_costs(model, candidates, text(tokens=SENSITIVITY_TOKENS), group_size=group_size, tied=tied)
    return choose_upgrades(costs, added, max_bits * sum(n * k for n, k in shapes.values()) - spent)


def _measured_costs(model, candidates: dict, ids: torch.Tensor, *, group_size: int, tied: bool) -> dict[str, float]:
    """What rounding each layer alone to nearest costs on `ids`, in nats per token; from the cache if measured before."""
    cache = CalibrationCache.of(model, ids, code=("sensitivity.py", "int4.py"), group_size=group_size)
    if (known := cache.json("costs")) is not None:
        return known
    read_weights(model)
    changes = {name: functools.partial(nearest_change, module.weight.data, group_size) for name, module in candidates.items()}
    if tied:
        changes[TABLE] = changes["lm_head"]
    print("int4: measuring which layers need int8", file=sys.stderr, flush=True)
    with fast_products(model.device):
        costs = loss_increases(model, ids, changes)
    if tied:
        costs["lm_head"] += costs.pop(TABLE)
    cache.save_json("costs", costs)
    return costs


def _layer_names(config) -> list[str]:
    inside = [name for stage in STAGES for name in stage]
    blocks = [f"model.layers.{index}.{name}" for index in range(config.num_hidden_layers) for name in inside]
    return [*blocks, "lm_head", TABLE]


def _named(wanted: str, names: list[str]) -> list[str]:
    """The layers that a comma list names, by kind (down_proj) or by place (layers.3.mlp.down_proj)."""
    chosen: dict[str, None] = {}
    for item in filter(None, (part.strip() for part in wanted.split(","))):
        matching = [name for name in names if f".{name}".endswith(f".{item}")]
        if not matching:
            raise ValueError(f"--int8-layers {item}: choose auto, none, a kind (down_proj) or a layer ({names[6]})")
        chosen |= dict.fromkeys(matching)
    if not chosen:
        raise ValueError("--int8-layers is empty: choose auto, none, or names of layers")
    return list(chosen)


def _summary(names: list[str]) -> str:
    """How many of each kind, e.g. "2 down_proj, 1 lm_head"."""
    kinds = Counter(name.rpartition(".")[2] for name in names)
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())


class Int4Inference(Inference):
    """`Int4Inference(max_bits=6).generate("Hello")`: load, quantise, answer."""

    apply = staticmethod(apply)


def main(argv: list[str] | None = None) -> int:
    import experiment

    parser = cli.build_parser(__doc__)
    defaults = apply.__kwdefaults__
    parser.add_argument("--group-size", type=int, choices=GROUP_SIZES, default=defaults["group_size"],
        help="inputs per scale (default: %(default)s)")  # fmt: skip
    parser.add_argument("--rounding", choices=["gptq", "nearest"], default=defaults["rounding"], help="default: %(default)s")
    parser.add_argument("--int8-layers", default=defaults["int8_layers"], metavar="auto|none|NAME[,NAME...]",
        help="layers that get int8, by kind (down_proj) or place (layers.3.mlp.down_proj) (default: %(default)s)")  # fmt: skip
    parser.add_argument("--max-bits", type=float, default=defaults["max_bits"],
        help="effective bits a weight up to which auto chooses (default: %(default)s)")  # fmt: skip
    parser.add_argument("--damping", type=float, default=defaults["damping"],
        help="GPTQ: share of the mean second moment added to each, 0.05 for a tied lm_head (default: %(default)s)")  # fmt: skip
    parser.add_argument("--calibration-tokens", type=int, default=defaults["calibration_tokens"], help="default: %(default)s")
    parser.add_argument("--generated-share", type=float, default=defaults["generated_share"],
        help="share of the calibration windows that the model writes itself (default: %(default)s)")  # fmt: skip
    parser.add_argument("--tune-steps", type=int, default=defaults["tune_steps"],
        help="then scales and norms learn the float model's answers; 0: rounding only (default: %(default)s)")  # fmt: skip
    args = cli.parse(parser, argv)
    options = {name: getattr(args, name) for name in defaults}
    return experiment.run({"int4": [("int4", options)]}, args, parser=parser)


if __name__ == "__main__":
    raise SystemExit(main())
