"""MLP width pruning: remove the channels that the others can best make up for, and refit what is left.

Idea    An MLP is a sum over channels, down_i * (silu(gate_i x) * up_i x); its channels are correlated, so some can be rebuilt
        from the rest. They are chosen by the second moments of down_proj's inputs (what a refit cannot recover) weighed by
        how much the model's answer feels it, and go from the layer where the model, as pruned by then, feels it least. Rows
        of gate_proj and up_proj and columns of down_proj go; then o_proj and down_proj are refitted in closed form, layer
        after layer, towards the dense model's residual stream (fitting/compensation.py).
        `--heal-minutes` then trains the layers that remain towards the dense model's answers (fitting/healing.py).
Helps   Where the bytes are: the MLP is 74 % of what TinyLlama streams per token, so a tenth of its width allows 1.08x in
        decode, more than a quarter of its heads (1.05x), and attention keeps its even shape.
Loses   Quality, like every removal, and more on text unlike what it learns from (`--calibration-text`).
        Width is removed 16 channels at a time: the kernels compute 16 output channels together (kernels/tiles.h), and
        a panel of gate_proj or up_proj that is not full would take as long as a full one.
Paper   Kurtic, Frantar, Alistarh: ZipLM, structured pruning with the layer's inverse Hessian. https://arxiv.org/abs/2302.04089
Writes  mlp_pruning_results.json, and mlp_pruning_healed_results.json where it was trained, beside the baseline's, and charts.

    python optimizations/mlp_pruning.py
    python optimizations/mlp_pruning.py --prune-ratio 0.2 --heal-minutes 5 --model smollm2-135m
    python optimizations/mlp_pruning.py --calibration-text evaluated --model smollm2-135m
"""

from __future__ import annotations

import torch
from torch import nn

import cli
from arguments import ratio
from fitting import calibration, healing
from fitting.allocation import remove_and_refit
from inference import Inference
from kernels.modules import add_notes, check_not_lean, cut_linear

PANEL = 16  # channels that go together
MOST = 0.75  # of a layer's width


def apply(model, *, prune_ratio: float = 0.1, heal_minutes: float = 0.0, calibration_text: str = "mixed"):
    """Remove `prune_ratio` of all MLP channels, in place, in multiples of 16 that differ from layer to layer.

    Raises ValueError if the ratio removes nothing or too much, or if the projections are no longer nn.Linear.
    """
    check_not_lean(model)
    check(model.config, prune_ratio=prune_ratio, heal_minutes=heal_minutes, calibration_text=calibration_text)
    if not all(hasattr(layer, "self_attn") for layer in model.model.layers):
        raise ValueError("some layers have no attention any more: run mlp_pruning before layer_pruning")
    mlps = [layer.mlp for layer in model.model.layers]
    if any(type(linear) is not nn.Linear for mlp in mlps for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)):
        raise ValueError("no nn.Linear left to prune: run mlp_pruning before precision and quantization")
    width = model.config.intermediate_size
    if any(mlp.down_proj.in_features != width for mlp in mlps):
        raise ValueError("this model's MLPs were narrowed before: apply mlp_pruning once")
    panels = _panels_to_remove(width, len(mlps), prune_ratio)
    windows = calibration.refit_windows(model, calibration_text)
    teacher = healing.Teacher(model, calibration.healing_windows(model, calibration_text)) if heal_minutes else None

    def cut(index: int, gone: list[int]) -> dict[str, torch.Tensor]:
        if gone:
            kept = sorted(set(range(width)) - set(gone))
            keep_channels(mlps[index], torch.tensor(kept))
        return {}

    steps = int(MOST * width) // PANEL
    remove_and_refit(model, windows, panels, part="mlp", group=1, at_once=PANEL, steps=steps, cut=cut)
    left = [mlp.down_proj.in_features for mlp in mlps]
    share = 1 - sum(left) / (width * len(mlps))
    how = f"asked for {prune_ratio:.1%}, calibrated on {calibration_text} text"
    note = f"removed {share:.1%} of the MLP channels ({how}); {min(left)} to {max(left)} of {width} are left"
    add_notes(model, note)
    if teacher:
        add_notes(model, healing.heal(model, teacher, minutes=heal_minutes))
    return model


def check(config, *, prune_ratio: float, heal_minutes: float, calibration_text: str) -> None:
    """What can be known before weights are loaded. Raises ValueError like `apply`."""
    _panels_to_remove(config.intermediate_size, config.num_hidden_layers, prune_ratio)
    healing.check(heal_minutes)
    calibration.check_text(calibration_text)


def _panels_to_remove(width: int, layers: int, prune_ratio: float) -> int:
    if not 0 < prune_ratio < 1:
        raise ValueError(f"--prune-ratio {prune_ratio}: choose a number strictly between 0 and 1")
    if width % PANEL:
        raise ValueError(f"--prune-ratio: an MLP of {width} channels does not divide into panels of {PANEL}")
    panels, most = round(prune_ratio * width * layers / PANEL), int(MOST * width) // PANEL * layers
    if panels == 0:
        raise ValueError(f"--prune-ratio {prune_ratio}: removes no {PANEL} channels of {width * layers}; choose more")
    if panels > most:
        raise ValueError(f"--prune-ratio {prune_ratio}: at most {most * PANEL / (width * layers):.2f} can go")
    return panels


def keep_channels(mlp, kept: torch.Tensor) -> None:
    """Cut gate_proj, up_proj and down_proj down to the channels `kept`, int64 [n] ascending."""
    kept = kept.to(mlp.down_proj.weight.device)
    mlp.gate_proj, mlp.up_proj = cut_linear(mlp.gate_proj, rows=kept), cut_linear(mlp.up_proj, rows=kept)
    mlp.down_proj = cut_linear(mlp.down_proj, columns=kept)
    mlp.intermediate_size = len(kept)


class MLPPrunedInference(Inference):
    """`MLPPrunedInference(prune_ratio=0.1).generate("Hello")`: load, prune, answer."""

    apply = staticmethod(apply)


def main(argv: list[str] | None = None) -> int:
    import experiment

    parser = cli.build_parser(__doc__)
    parser.add_argument("--prune-ratio", type=ratio, default=apply.__kwdefaults__["prune_ratio"],
        help="share of all MLP channels to remove (default: %(default)s)")  # fmt: skip
    healing.add_flag(parser)
    calibration.add_text_flag(parser)
    args = cli.parse(parser, argv)
    options = {name: getattr(args, name) for name in ("prune_ratio", "heal_minutes", "calibration_text")}
    return experiment.run(healing.recipes("mlp_pruning", options), args, parser=parser)


if __name__ == "__main__":
    raise SystemExit(main())
