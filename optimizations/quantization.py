"""Int8 quantisation: every linear layer's weights as 8-bit integers, a quarter of the bytes of float32.

Idea    A weight is round(w / scale) in [-127, 127], scale = absmax / 127. Decode at batch 1 is bound by reading weights, so a
        quarter of the bytes is up to four times the speed; with int8 activations the products are integer too, which
        speeds up prefill. Symmetric throughout: no zero points.
Schemes grouped      one scale per 64 inputs, for weights and for activations (quantised per token, on the fly); per 32 in
                     the layers of `--fine-layers`: down_proj, whose inputs are products of two and the most spread
        dynamic      the original's: one scale per output channel, one per token. An outlier in a token's
                     activations coarsens the whole token, which costs a small model 4 % of its quality; outliers are
                     therefore moved into the weights first (`--smoothing`), on calibration text, and 2 % are lost
        weight-only  int8 weights per channel, float activations: no outlier hurts, but prefill gains less
        classic      torch's deprecated quantize_dynamic, as a contrast: weights per tensor, 7-bit activations
        auto         grouped on a CPU, weight-only on CUDA and MPS, where torch has no grouped integer product
        `--granularity tensor` takes one scale for a whole matrix (the original's formula); `--float-activations
        down_proj,lm_head` leaves the inputs of the named layers, where outliers gather, in floating point.
Loses   Where the kernel is slow: without a C++ compiler the PyTorch twin runs, and the record's notes say so.
Papers  Jacob et al. 2017: https://arxiv.org/abs/1712.05877; Dettmers et al. 2022 on outliers: https://arxiv.org/abs/2208.07339
Writes  quantization_results.json beside the baseline's, and charts, in the results folder.

    python optimizations/quantization.py
    python optimizations/quantization.py --scheme weight-only --model smollm2-135m
"""

from __future__ import annotations

import warnings

import torch
from torch import nn

import cli
from devices import Unsupported
from fitting.calibration import calibration_ids, has_text
from fitting.smoothing import CALIBRATION_TOKENS, STRENGTH, smooth
from inference import Inference
from kernels.attention import use_grouped_heads
from kernels.gated_mlp import use_gated_mlps
from kernels.int8_modules import ClassicLinear, Int8Linear, Int8Table, kernel_note
from kernels.modules import SharedTable, add_notes, check_not_lean, is_tied, replace_linears
from streaming import read_weights, streams

LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"}
SCHEMES = ("auto", "grouped", "dynamic", "weight-only", "classic")


@streams
def apply(
    model, *, scheme: str = "auto", granularity: str = "channel", group_size: int = 64, embeddings: str = "int8",
    fine_layers: str = "down_proj", float_activations: str = "", smoothing: float | None = None,
):  # fmt: skip
    """Quantise in place. `embeddings` int8 stores the input table as int8 rows (a tied table is shared with lm_head).

    `granularity` (channel or tensor) applies to dynamic and weight-only, `group_size` to grouped, half of it to the
    `fine_layers`, named by kind and separated by commas. `float_activations` names layers whose inputs stay in floating point.
    `smoothing` is the share of an activation's outliers that moves into the weights first (fitting/smoothing.py); by itself 0.7
    for dynamic, where the model has words and was not smoothed before, else 0.
    Raises ValueError if no nn.Linear is left to quantise, Unsupported where the device cannot run the scheme.
    """
    check_not_lean(model)
    check(
        model.config, scheme=scheme, granularity=granularity, group_size=group_size, embeddings=embeddings,
        fine_layers=fine_layers, float_activations=float_activations, smoothing=smoothing,
    )  # fmt: skip
    if scheme == "auto":
        grouped = "dynamic" if granularity == "tensor" else "grouped"
        scheme = grouped if model.device.type == "cpu" else "weight-only"
    if not any(type(module) is nn.Linear for module in model.modules()):
        raise ValueError("no nn.Linear left to quantize: apply quantization once, to a model in floating point")
    if scheme == "classic":
        return _apply_classic(model)

    tied = is_tied(model)
    if smoothing is None:
        wanted = scheme == "dynamic" and has_text(model) and not getattr(model, "smoothed", False)
        smoothing = STRENGTH if wanted else 0.0
    if smoothing:
        read_weights(model)
        note = smooth(model, calibration_ids(model, tokens=CALIBRATION_TOKENS), smoothing)
        add_notes(model, note)
    in_float, fine = LAYERS if scheme == "weight-only" else _names(float_activations), _names(fine_layers)
    group = group_size if scheme == "grouped" else None

    def make(name: str, linear: nn.Module) -> nn.Module:
        kind = name.rpartition(".")[2]
        size = _half(group) if group and kind in fine else group
        return Int8Linear(linear, group_size=size, int8_activations=kind not in in_float, per_tensor=granularity == "tensor")

    replace_linears(model, make)
    if embeddings == "int8":
        embedding = model.get_input_embeddings()
        model.set_input_embeddings(SharedTable(model.lm_head) if tied else Int8Table(embedding, group_size=group))
    read_weights(model)  # the table, where it stays float32
    use_grouped_heads(model)
    use_gated_mlps(model)
    table = "" if not tied else "; tied table shared as int8" if embeddings == "int8" else "; table untied, float32 copy kept"
    add_notes(model, f"int8 {scheme}: {kernel_note(model.device, scheme)}{table}")
    return model


def check(config, *, scheme, granularity, group_size, embeddings, fine_layers, float_activations, smoothing) -> None:
    """What can be known before weights are loaded. Raises ValueError naming the flag."""
    if scheme not in SCHEMES:
        raise ValueError(f"--scheme {scheme}: choose from {', '.join(SCHEMES)}")
    given = {"granularity": granularity, "group_size": group_size, "embeddings": embeddings, "fine_layers": fine_layers,
             "float_activations": float_activations, "smoothing": smoothing}  # fmt: skip
    if scheme == "classic" and (ignored := [name for name, value in given.items() if value != apply.__kwdefaults__[name]]):
        raise ValueError(f"--{ignored[0].replace('_', '-')}: --scheme classic is torch's own and takes no other option")
    if granularity not in ("channel", "tensor"):
        raise ValueError(f"--granularity {granularity}: choose channel or tensor")
    if scheme == "grouped" and granularity == "tensor":
        raise ValueError("--granularity tensor: one scale has no groups; choose --scheme dynamic or weight-only")
    if embeddings not in ("int8", "float"):
        raise ValueError(f"--embeddings {embeddings}: choose int8 or float")
    for flag, value in (("--fine-layers", fine_layers), ("--float-activations", float_activations)):
        if unknown := _names(value) - LAYERS:
            raise ValueError(f"{flag} {min(unknown)}: choose from {', '.join(sorted(LAYERS))}")
    if smoothing is not None and not 0 <= smoothing <= 1:
        raise ValueError(f"--smoothing {smoothing:g}: choose a number from 0 to 1")
    if group_size < 4 or group_size % 4:
        raise ValueError(f"--group-size {group_size}: choose a multiple of 4, e.g. 32, 64 or 128")


def _half(group_size: int) -> int:
    """The kernels take groups of multiples of 4."""
    return max(4, group_size // 8 * 4)


def _names(comma_list: str) -> set[str]:
    return {name.strip() for name in comma_list.split(",") if name.strip()}


def _apply_classic(model):
    """torch.ao's dynamic quantisation: CPU only, qint8 tensors (deprecated), the embedding stays float32."""
    if model.device.type != "cpu":
        raise Unsupported(f"torch's quantize_dynamic has no kernels for {model.device.type}")
    engines = [engine for engine in torch.backends.quantized.supported_engines if engine != "none"]
    if not engines:
        raise Unsupported("this build of torch has no quantized engine (fbgemm, x86 or qnnpack)")
    if torch.backends.quantized.engine == "none":  # some macOS builds
        torch.backends.quantized.engine = "qnnpack" if "qnnpack" in engines else engines[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated on purpose: this is the contrast
        replace_linears(model, lambda _, linear: ClassicLinear(linear))
    read_weights(model)
    note = f"torch.ao dynamic quantisation, engine {torch.backends.quantized.engine}; embeddings stay float32"
    add_notes(model, note)
    return model


class QuantizedInference(Inference):
    """`QuantizedInference(scheme="grouped").generate("Hello")`: load, quantise, answer."""

    apply = staticmethod(apply)


def main(argv: list[str] | None = None) -> int:
    import experiment

    parser = cli.build_parser(__doc__)
    defaults = apply.__kwdefaults__
    parser.add_argument("--scheme", choices=SCHEMES, default=defaults["scheme"], help="default: %(default)s")
    parser.add_argument("--granularity", choices=["channel", "tensor"], default=defaults["granularity"],
        help="scales of dynamic and weight-only weights (default: %(default)s)")  # fmt: skip
    parser.add_argument(
        "--group-size", type=int, default=defaults["group_size"], help="inputs per scale (default: %(default)s)"
    )
    parser.add_argument("--fine-layers", default=defaults["fine_layers"], metavar="LAYER[,LAYER...]",
        help="layers that get groups of half the size, or '' (default: %(default)s)")  # fmt: skip
    parser.add_argument("--embeddings", choices=["int8", "float"], default=defaults["embeddings"],
        help="how the input embedding table is stored (default: %(default)s)")  # fmt: skip
    parser.add_argument("--float-activations", default=defaults["float_activations"], metavar="LAYER[,LAYER...]",
        help="layers whose inputs stay floating point, e.g. down_proj,lm_head (default: none)")  # fmt: skip
    parser.add_argument("--smoothing", type=float, default=defaults["smoothing"], metavar="SHARE",
        help="of activation outliers that move into the weights first (default: 0.7 for dynamic, else 0)")  # fmt: skip
    args = cli.parse(parser, argv)
    options = {name: getattr(args, name) for name in defaults}
    return experiment.run({"quantization": [("quantization", options)]}, args, parser=parser)


if __name__ == "__main__":
    raise SystemExit(main())
