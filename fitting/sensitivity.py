"""How much each layer's rounding costs: the loss, not the layer's own error, decides where more bits pay.

To second order the loss grows by half the mean of (g . dy)^2, with dy = (W' - W) x the change of a layer's output at a
token and g the gradient of that sequence's loss at the same place: the Fisher information stands for the Hessian (as in
HAWQ-V2, Dong et al. 2020: https://arxiv.org/abs/1911.03852, and SqueezeLLM, Kim et al. 2023:
https://arxiv.org/abs/2306.07629). One forward and one backward pass of the float model serve all layers at once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from fitting.blockwise import STAGES


def loss_increases(model, ids: torch.Tensor, changes: dict[str, Callable[[], torch.Tensor]]) -> dict[str, float]:
    """Estimated increase of the mean loss, in nats per token, for each layer if it alone were rounded.

    Args:
        model: a LlamaForCausalLM in floating point.
        ids: int64 [windows, tokens] of calibration text.
        changes: by name of an nn.Linear or of the nn.Embedding, a function that gives W' - W, float32 [N, K].
    """
    totals = {name: 0.0 for name in changes}
    embedding = model.get_input_embeddings()

    def watch(name: str):
        def hook(module, inputs, output):
            with torch.no_grad():
                change = changes[name]()
                moved = F.embedding(inputs[0], change) if module is embedding else F.linear(inputs[0], change)

            def collect(gradient):
                totals[name] += 0.5 * (gradient * moved).sum(-1).square().sum().item()

            output.register_hook(collect)

        return hook

    # The embedding comes first: with its output requiring gradients, every later one does.
    handles = [embedding.register_forward_hook(lambda _module, _inputs, output: output.requires_grad_(True))]
    handles += [model.get_submodule(name).register_forward_hook(watch(name)) for name in changes]
    try:
        with torch.enable_grad():
            for window in ids:
                logits = model(input_ids=window[None], use_cache=False).logits[0, :-1].float()
                F.cross_entropy(logits, window[1:], reduction="sum").backward()
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / (ids.numel() - len(ids)) for name, total in totals.items()}


def choose_upgrades(costs: dict[str, float], added_bits: dict[str, float], budget_bits: float) -> list[str]:
    """Names to give more bits, by falling cost per added bit, each only if it still fits the budget; in that order.

    Layers that run as one product (q, k and v; gate and up) count as one: of mixed precision they could not be fused, and
    single layers in int8 cost more time than their bytes.
    """
    products: dict[str, list[str]] = {}
    for name in costs:
        products.setdefault(_product_of(name), []).append(name)
    added = {product: sum(added_bits[name] for name in names) for product, names in products.items()}
    gain = {product: sum(costs[name] for name in names) / added[product] for product, names in products.items()}
    chosen = []
    for product in sorted(products, key=lambda product: -gain[product]):
        if added[product] <= budget_bits:
            chosen += products[product]
            budget_bits -= added[product]
    return chosen


def _product_of(name: str) -> str:
    """The first layer of those that share this one's input, in the same block: what names their common product."""
    for first, *others in STAGES:
        for other in others:
            if name.endswith(f".{other}"):
                return name.removesuffix(other) + first
    return name


def added_bits(shapes: dict[str, tuple[int, int]], group_size: int) -> tuple[dict[str, float], int]:
    """What int8 instead of int4 adds to each layer [N, K], scales included, and the bits of all layers in int4."""
    added, spent = {}, 0
    for name, (n, k) in shapes.items():
        groups = -(-k // group_size)
        int4, int8 = n * (8 * -(-k // 2) + 32 * groups), n * (8 * k + 16 * groups)  # scale and minimum; scale; bfloat16
        added[name], spent = int8 - int4, spent + int4
    return added, spent


def costs_by_position(added: dict[str, float], blocks: int) -> dict[str, float]:
    """A rule instead of a measurement, for weights without meaning: lm_head first, then from both ends inwards, down_proj
    before q, k and v, these before o_proj, gate and up last; never the input embedding."""
    ranks = {"lm_head": 2.0}
    for index in range(blocks):
        inwards = 1 + min(index, blocks - 1 - index)
        for stage, weight in zip(reversed(STAGES), (1.0, 0.125, 0.25, 0.5), strict=True):
            ranks |= {f"model.layers.{index}.{name}": weight / inwards for name in stage}
    return {name: ranks[name] * bits for name, bits in added.items() if name in ranks}
