"""Attention-head pruning: remove the query heads whose output weights are smallest.

Idea    Many heads matter little (Michel et al. 2019). A head's importance is taken as the L2 norm of its columns of
        o_proj; the least important share of each layer goes.
Helps   By the bytes that are gone, no more: 25 % of the query heads are 4.5 % of what TinyLlama streams per token, so
        decode gains at most 1.047x. `--mode mask`, the original's zeroing, removes nothing and gains nothing.
Loses   Quality. The L2 norm ignores what flows through a head; on a small model it is a poor guide (see the README).
Heads   Query heads that share a KV head form a group. Heads are removed evenly from every group where that comes within
        five points of the ratio asked for; otherwise an explicit map from query head to KV head is kept.
Paper   Michel, Levy, Neubig: Are Sixteen Heads Really Better than One? https://arxiv.org/abs/1905.10650
Writes  head_pruning_results.json beside the baseline's, and charts, in the results folder.

    python optimizations/head_pruning.py
    python optimizations/head_pruning.py --prune-ratio 0.15 --mode mask --model smollm2-135m
"""

from __future__ import annotations

import torch
from torch import nn

import cli
from inference import Inference
from kernels.attention import use_grouped_heads

EVENNESS_TOLERANCE = 0.05


def apply(model, *, prune_ratio: float = 0.25, mode: str = "structural"):
    """Remove (`structural`) or zero (`mask`) the least important query heads of every layer, in place.

    Raises ValueError if the ratio leaves no head or removes none, or if the projections are no longer nn.Linear.
    """
    if mode not in ("structural", "mask"):
        raise ValueError(f"--mode {mode}: choose structural or mask")
    attentions = [layer.self_attn for layer in model.model.layers]
    if any(type(attention.o_proj) is not nn.Linear for attention in attentions):
        raise ValueError("no nn.Linear left to prune: run head_pruning before precision and quantization")
    if any(hasattr(attention, "kv_of_head") for attention in attentions):
        raise ValueError("this model was pruned unevenly before: apply head_pruning once")
    removed = total = 0
    uneven = False
    for attention in attentions:
        kept = heads_to_keep(head_importance(attention), kv_heads=count_kv_heads(attention), prune_ratio=prune_ratio)
        total += count_query_heads(attention)
        removed += count_query_heads(attention) - len(kept)
        if mode == "mask":
            _mask_heads(attention, kept)
        else:
            uneven |= _keep_heads(attention, kept)
    if uneven:
        use_grouped_heads(model)
    verb = "zeroed" if mode == "mask" else "removed"
    note = f"{verb} {removed} of {total} query heads ({removed / total:.1%}; asked for {prune_ratio:.1%})"
    model.notes = [*getattr(model, "notes", []), note]
    return model


def check(config, *, prune_ratio: float = 0.25, mode: str = "structural") -> None:
    """What can be known before weights are loaded. Raises ValueError like `apply`."""
    heads = config.num_attention_heads
    heads_to_keep(torch.zeros(heads), kv_heads=config.num_key_value_heads, prune_ratio=prune_ratio)


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
        raise ValueError(f"--prune-ratio {prune_ratio}: rounds to no head at all of {heads}; choose {0.5 / heads:.3f} or more")
    if remove == heads:
        raise ValueError(f"--prune-ratio {prune_ratio}: leaves no head of {heads}; choose less than {1 - 0.5 / heads:.3f}")
    return sorted(importance.argsort(descending=True)[: heads - remove].tolist())


def count_query_heads(attention) -> int:
    return attention.q_proj.out_features // attention.head_dim


def count_kv_heads(attention) -> int:
    return attention.k_proj.out_features // attention.head_dim


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
    attention.q_proj = _cut(attention.q_proj, rows=rows)
    attention.o_proj = _cut(attention.o_proj, columns=rows)
    if len(kv_kept) < count_kv_heads(attention):
        kv_rows = _head_rows(kv_kept, attention.head_dim)
        attention.k_proj, attention.v_proj = _cut(attention.k_proj, rows=kv_rows), _cut(attention.v_proj, rows=kv_rows)
    readers = kv_of_head.bincount()
    even = bool((readers == readers[0]).all())
    attention.num_key_value_groups = int(readers[0]) if even else 1
    if not even:
        attention.register_buffer("kv_of_head", kv_of_head)
    return not even


def _head_rows(heads: torch.Tensor, head_dim: int) -> torch.Tensor:
    return (heads[:, None] * head_dim + torch.arange(head_dim, device=heads.device)).flatten()


def _cut(linear: nn.Linear, *, rows: torch.Tensor | None = None, columns: torch.Tensor | None = None) -> nn.Linear:
    weight = linear.weight.data if rows is None else linear.weight.data[rows]
    weight = weight if columns is None else weight[:, columns]
    bias = linear.bias if linear.bias is None or rows is None else nn.Parameter(linear.bias.data[rows])
    smaller = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    smaller.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    smaller.bias = bias
    return smaller


class PrunedInference(Inference):
    """`PrunedInference(prune_ratio=0.15).generate("Hello")`: load, prune, answer."""

    def __init__(self, model: str = "auto", *, device: str = "auto", **options):
        super().__init__(model, device=device)
        self.model = apply(self.model, **options)


def main(argv: list[str] | None = None) -> int:
    import experiment

    parser = cli.build_parser(__doc__)
    parser.add_argument("--prune-ratio", type=cli.ratio, default=apply.__kwdefaults__["prune_ratio"],
        help="share of each layer's query heads to remove (default: %(default)s)")  # fmt: skip
    parser.add_argument("--mode", choices=["structural", "mask"], default=apply.__kwdefaults__["mode"],
        help="structural: rows and columns are gone; mask: the original's zeroing (default: %(default)s)")  # fmt: skip
    args = cli.parse(parser, argv)
    steps = [("head_pruning", {"prune_ratio": args.prune_ratio, "mode": args.mode})]
    return experiment.run({"head_pruning": steps}, args, parser=parser)


if __name__ == "__main__":
    raise SystemExit(main())
