"""Attention-head pruning: remove the query heads that matter least.

Idea    Many heads matter little (Michel et al. 2019). Which ones, `--method` says:
        l2          those whose columns of o_proj have the smallest L2 norm, the same share of every layer
        energy      those that write least on calibration text: mean square of what passes o_proj
        calibrated  those whose loss the others can best make up for (second moments of o_proj's inputs), one after another
                    from the layer where the model, as pruned by then, feels it least; then o_proj and down_proj are
                    refitted in closed form, layer after layer, towards the dense model's residual stream
                    (fitting/pruning_costs.py, allocation.py, compensation.py)
        `--heal-minutes` then trains the layers that remain towards the dense model's answers (fitting/healing.py).
Helps   By the bytes that are gone, no more: 25 % of the query heads are 4.5 % of what TinyLlama streams per token, so
        decode gains at most 1.047x. `--mode mask`, the original's zeroing, removes nothing and gains nothing.
Loses   Quality. The L2 norm ignores what flows through a head; on a small model it is a poor guide (see the README).
        Calibrated takes minutes once (kept in ~/.cache/tinyllama-optimization), and holds best for text like what it learns
        from (`--calibration-text`). Where layers lose different heads the KV heads' readers differ: attention then needs
        the map below.
Heads   Query heads that share a KV head form a group. By l2 and energy, heads are removed evenly from every group where
        that comes within five points of the ratio asked for; otherwise, and by calibrated, an explicit map from query head
        to KV head is kept. A KV head that nobody reads any more goes too, and the KV cache shrinks.
Papers  Michel, Levy, Neubig: Are Sixteen Heads Really Better than One? https://arxiv.org/abs/1905.10650
        Kurtic, Frantar, Alistarh: ZipLM, structured pruning with the layer's inverse Hessian. https://arxiv.org/abs/2302.04089
Writes  head_pruning_results.json, and head_pruning_healed_results.json where it was trained, beside the baseline's, and charts.

    python optimizations/head_pruning.py
    python optimizations/head_pruning.py --method calibrated --model smollm2-135m
    python optimizations/head_pruning.py --prune-ratio 0.15 --mode mask --model smollm2-135m
"""

from __future__ import annotations

import torch
from torch import nn

import cli
from arguments import ratio
from fitting import calibration, healing
from fitting.allocation import remove_and_refit
from inference import Inference
from kernels.attention import use_grouped_heads
from kernels.modules import add_notes, check_not_lean, cut_linear

METHODS = ("l2", "energy", "calibrated")
EVENNESS_TOLERANCE = 0.05
ENERGY_WINDOWS = 16


def apply(
    model, *, prune_ratio: float = 0.25, mode: str = "structural", method: str = "l2", heal_minutes: float = 0.0,
    calibration_text: str = "mixed",
):  # fmt: skip
    """Remove (`structural`) or zero (`mask`) the least important query heads, in place.

    Raises ValueError if the ratio leaves no head or removes none, or if the projections are no longer nn.Linear.
    """
    check_not_lean(model)
    check(
        model.config, prune_ratio=prune_ratio, mode=mode, method=method, heal_minutes=heal_minutes,
        calibration_text=calibration_text,
    )  # fmt: skip
    if not all(hasattr(layer, "self_attn") for layer in model.model.layers):
        raise ValueError("some layers have no attention any more: run head_pruning before layer_pruning")
    attentions = [layer.self_attn for layer in model.model.layers]
    if any(type(attention.o_proj) is not nn.Linear for attention in attentions):
        raise ValueError("no nn.Linear left to prune: run head_pruning before precision and quantization")
    if any(hasattr(attention, "kv_of_head") for attention in attentions):
        raise ValueError("this model was pruned unevenly before: apply head_pruning once")
    total = sum(count_query_heads(attention) for attention in attentions)
    teacher = healing.Teacher(model, calibration.healing_windows(model, calibration_text)) if heal_minutes else None
    windows = None if method == "l2" else calibration.refit_windows(model, calibration_text)
    if method == "calibrated":
        removed = _remove_calibrated(model, windows, prune_ratio, mode)
    else:
        importances = (
            energies(model, windows) if method == "energy" else [head_importance(attention) for attention in attentions]
        )
        removed = 0
        for attention, importance in zip(attentions, importances, strict=True):
            kept = heads_to_keep(importance, kv_heads=count_kv_heads(attention), prune_ratio=prune_ratio)
            removed += count_query_heads(attention) - len(kept)
            _take_away(model, attention, kept, mode)
    verb = "zeroed" if mode == "mask" else "removed"
    how = "" if method == "l2" else f", {method} on {calibration_text} text"
    note = f"{verb} {removed} of {total} query heads ({removed / total:.1%}; asked for {prune_ratio:.1%}{how})"
    add_notes(model, note)
    if teacher:
        add_notes(model, healing.heal(model, teacher, minutes=heal_minutes))
    return model


def check(config, *, prune_ratio: float, mode: str, method: str, heal_minutes: float, calibration_text: str) -> None:
    """What can be known before weights are loaded. Raises ValueError like `apply`."""
    if mode not in ("structural", "mask"):
        raise ValueError(f"--mode {mode}: choose structural or mask")
    if method not in METHODS:
        raise ValueError(f"--method {method}: choose {', '.join(METHODS)}")
    healing.check(heal_minutes)
    calibration.check_text(calibration_text)
    if heal_minutes and mode == "mask":
        raise ValueError("--heal-minutes: training would bring masked heads back; choose --mode structural")
    if calibration_text != "mixed" and method == "l2" and not heal_minutes:
        raise ValueError(f"--calibration-text {calibration_text}: --method l2 reads no text without --heal-minutes")
    heads = config.num_attention_heads
    if method == "calibrated":
        _calibrated_count(heads, config.num_hidden_layers, prune_ratio)
    else:
        heads_to_keep(torch.zeros(heads), kv_heads=config.num_key_value_heads, prune_ratio=prune_ratio)


def _calibrated_count(heads: int, layers: int, prune_ratio: float) -> int:
    """How many heads of the whole model go; every layer keeps one at least."""
    if not 0 < prune_ratio < 1:
        raise ValueError(f"--prune-ratio {prune_ratio}: choose a number strictly between 0 and 1")
    count = round(prune_ratio * heads * layers)
    if count == 0:
        raise ValueError(f"--prune-ratio {prune_ratio}: rounds to no head at all of {heads * layers}")
    if count > (heads - 1) * layers:
        raise ValueError(f"--prune-ratio {prune_ratio}: leaves some layer no head; choose at most {1 - 1 / heads:.3f}")
    return count


def _remove_calibrated(model, windows: torch.Tensor, prune_ratio: float, mode: str) -> int:
    """Choose, cut and refit. Returns how many heads went."""
    attentions = [layer.self_attn for layer in model.model.layers]
    heads, head_dim = count_query_heads(attentions[0]), attentions[0].head_dim
    if any(count_query_heads(attention) != heads for attention in attentions):
        raise ValueError("this model's layers differ in heads already: apply head_pruning once")
    count = _calibrated_count(heads, len(attentions), prune_ratio)

    def cut(index: int, gone: list[int]) -> dict[str, torch.Tensor]:
        kept = [head for head in range(heads) if head not in gone]
        if gone:
            _take_away(model, attentions[index], kept, mode)
        masked = mode == "mask" and gone
        return {"attention": _head_rows(torch.tensor(kept, device=model.device), head_dim)} if masked else {}

    remove_and_refit(model, windows, count, part="attention", group=head_dim, at_once=1, steps=heads - 1, cut=cut)
    return count


def energies(model, windows: torch.Tensor) -> list[torch.Tensor]:
    """Mean square of what each head writes through o_proj, per layer [heads], on the first of `windows` int64 [W, T]."""
    attentions = [layer.self_attn for layer in model.model.layers]

    def run() -> None:
        for window in windows[:ENERGY_WINDOWS]:
            model.model(window[None], use_cache=False)

    moments = calibration.second_moments(run, [attention.o_proj for attention in attentions])
    result = []
    for attention, moment in zip(attentions, moments, strict=True):
        by_head = (-1, attention.head_dim)
        w = attention.o_proj.weight.float().T.unflatten(0, by_head)  # [heads, d, N]
        own = moment.unflatten(0, by_head).unflatten(2, by_head).diagonal(dim1=0, dim2=2)  # [d, d, heads]
        result.append(torch.einsum("hin,ijh,hjn->h", w, own, w))
    return result


def head_importance(attention) -> torch.Tensor:
    """L2 norm of each query head's columns of o_proj, shape [heads]."""
    weight = attention.o_proj.weight
    return weight.view(weight.shape[0], -1, attention.head_dim).norm(dim=(0, 2))


def heads_to_keep(importance: torch.Tensor, *, kv_heads: int, prune_ratio: float) -> list[int]:
    """Indices of the query heads that stay, ascending; the same number from every KV group where that is close enough."""
    importance = importance.cpu()
    heads = len(importance)
    if not 0 < prune_ratio < 1:
        raise ValueError(f"--prune-ratio {prune_ratio}: choose a number strictly between 0 and 1")
    group = heads // kv_heads
    per_group = round(prune_ratio * group)
    if 0 < per_group < group and abs(per_group / group - prune_ratio) <= EVENNESS_TOLERANCE:
        ranked = importance.view(kv_heads, group).argsort(dim=1, descending=True)[:, : group - per_group]
        return sorted((ranked + torch.arange(kv_heads)[:, None] * group).flatten().tolist())
    remove = round(prune_ratio * heads)
    if remove == 0:
        raise ValueError(f"--prune-ratio {prune_ratio}: rounds to no head at all of {heads}; choose more than {0.5 / heads:g}")
    if remove == heads:
        raise ValueError(f"--prune-ratio {prune_ratio}: leaves no head of {heads}; choose less than {1 - 0.5 / heads:g}")
    return sorted(importance.argsort(descending=True)[: heads - remove].tolist())


def count_query_heads(attention) -> int:
    return attention.q_proj.out_features // attention.head_dim


def count_kv_heads(attention) -> int:
    return attention.k_proj.out_features // attention.head_dim


def _take_away(model, attention, kept: list[int], mode: str) -> None:
    if mode == "mask":
        _mask_heads(attention, kept)
    elif _keep_heads(attention, kept):
        use_grouped_heads(model)


def _mask_heads(attention, kept: list[int]) -> None:
    gone = sorted(set(range(count_query_heads(attention))) - set(kept))
    attention.o_proj.weight.data.view(attention.o_proj.out_features, -1, attention.head_dim)[:, gone] = 0


def _keep_heads(attention, kept: list[int]) -> bool:
    """Cut the projections down to `kept`; KV heads that nobody reads go too. Returns whether a map had to be kept."""
    device = attention.q_proj.weight.device
    group = count_query_heads(attention) // count_kv_heads(attention)
    kv_of_head = torch.tensor([head // group for head in kept], device=device)
    kv_kept, kv_of_head = kv_of_head.unique(return_inverse=True)  # renumbered over the KV heads that stay
    rows = _head_rows(torch.tensor(kept, device=device), attention.head_dim)
    attention.q_proj = cut_linear(attention.q_proj, rows=rows)
    attention.o_proj = cut_linear(attention.o_proj, columns=rows)
    if len(kv_kept) < count_kv_heads(attention):
        kv_rows = _head_rows(kv_kept, attention.head_dim)
        attention.k_proj, attention.v_proj = (
            cut_linear(attention.k_proj, rows=kv_rows),
            cut_linear(attention.v_proj, rows=kv_rows),
        )
    readers = kv_of_head.bincount()
    even = bool((readers == readers[0]).all())
    attention.num_key_value_groups = int(readers[0]) if even else 1
    if not even:
        attention.register_buffer("kv_of_head", kv_of_head)
    return not even


def _head_rows(heads: torch.Tensor, head_dim: int) -> torch.Tensor:
    return (heads[:, None] * head_dim + torch.arange(head_dim, device=heads.device)).flatten()


class PrunedInference(Inference):
    """`PrunedInference(prune_ratio=0.15).generate("Hello")`: load, prune, answer."""

    apply = staticmethod(apply)


def main(argv: list[str] | None = None) -> int:
    import experiment

    parser = cli.build_parser(__doc__)
    parser.add_argument("--prune-ratio", type=ratio, default=apply.__kwdefaults__["prune_ratio"],
        help="share of the query heads to remove, of each layer or, calibrated, of all (default: %(default)s)")  # fmt: skip
    parser.add_argument("--mode", choices=["structural", "mask"], default=apply.__kwdefaults__["mode"],
        help="structural: rows and columns are gone; mask: the original's zeroing (default: %(default)s)")  # fmt: skip
    parser.add_argument("--method", choices=METHODS, default=apply.__kwdefaults__["method"],
        help="how heads are chosen; calibrated also refits what is left (default: %(default)s)")  # fmt: skip
    healing.add_flag(parser)
    calibration.add_text_flag(parser)
    args = cli.parse(parser, argv)
    options = {name: getattr(args, name) for name in ("prune_ratio", "mode", "method", "heal_minutes", "calibration_text")}
    return experiment.run(healing.recipes("head_pruning", options), args, parser=parser)


if __name__ == "__main__":
    raise SystemExit(main())
