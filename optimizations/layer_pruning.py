"""Layer pruning: remove whole attention sublayers, or whole blocks, that the model misses least.

Idea    A residual network still works when a sublayer's contribution is left out; for some it hardly changes the answer. One
        after another, the sublayer (or block) goes whose removal, measured with those that went before, costs the least
        KL divergence to the dense model on calibration text.
Helps   An attention sublayer takes its weights and its share of the KV cache with it, and its time: 5 of TinyLlama's 22
        are 4.6 % of the bytes of a token and 23 % of the cache. A block takes its MLP as well.
Loses   Quality, in large steps: nothing smaller than a sublayer can go, and nothing is refitted.
Papers  Men et al. 2024, ShortGPT (blocks): https://arxiv.org/abs/2403.03853
        He et al. 2024, What Matters in Transformers? Not All Attention is Needed: https://arxiv.org/abs/2406.15786
Writes  layer_pruning_results.json beside the baseline's, and charts, in the results folder.

    python optimizations/layer_pruning.py
    python optimizations/layer_pruning.py --what blocks --count 2 --model smollm2-135m
"""

from __future__ import annotations

import torch
from torch import nn

import cli
from fitting import calibration
from fitting.calibration_cache import CalibrationCache, show_progress
from fitting.divergence import Divergence, probe_windows
from inference import Inference
from kernels.modules import add_notes, check_not_lean

WHAT = ("attention", "blocks")


def apply(model, *, what: str = "attention", count: int = 2):
    """Remove `count` attention sublayers or blocks, in place; the other layers' weights do not change.

    Raises ValueError for options that leave no attention at all.
    """
    check_not_lean(model)
    layers = model.model.layers
    present = sum(hasattr(layer, "self_attn") for layer in layers)
    check(model.config, what=what, count=count)
    if count >= present:
        raise ValueError(f"--count {count}: leaves no attention of {present} sublayers; choose less")
    windows = probe_windows(calibration.refit_windows(model))
    gone, costs = choose(model, windows, what=what, count=count)
    remove = _remove_attention if what == "attention" else _remove_blocks
    remove(model, gone)
    numbered = [layer.self_attn for layer in model.model.layers if hasattr(layer, "self_attn")]
    for index, attention in enumerate(numbered):
        attention.layer_idx = index  # which layer of the KV cache is its own
    name = ("attention sublayer" if what == "attention" else "block") + ("s" if count > 1 else "")
    which = ", ".join(map(str, sorted(gone)))
    note = f"removed {count} {name} ({which}): KL on calibration text about {costs[-1]:.4f} nats per token"
    add_notes(model, note)
    return model


def check(config, *, what: str, count: int) -> None:
    """What can be known before weights are loaded. Raises ValueError like `apply`."""
    if what not in WHAT:
        raise ValueError(f"--what {what}: choose {' or '.join(WHAT)}")
    if not 1 <= count < config.num_hidden_layers:
        raise ValueError(f"--count {count}: choose 1 to {config.num_hidden_layers - 1}, one layer must stay")


@torch.no_grad()
def choose(model, windows: torch.Tensor, *, what: str, count: int) -> tuple[list[int], list[float]]:
    """Indices in the order they go, and the divergence after each in nats per token; windows int64 [P, T].

    Every step is kept on disk: a longer list continues a shorter one.
    """
    cache = CalibrationCache.of(model, windows, code=("divergence.py",), what=what)
    known = cache.json("removed") or {"gone": [], "costs": []}
    gone, costs = known["gone"], known["costs"]
    if len(gone) < count:
        dense = model.model.layers
        divergence = Divergence(model, windows)
        current = nn.ModuleList([_without(layer, what) if index in gone else layer for index, layer in enumerate(dense)])
        try:
            model.model.layers = current
            while len(gone) < count:
                divergence.follow()
                trials = {}
                for index, layer in enumerate(dense):
                    if index not in gone and hasattr(layer, "self_attn"):
                        trials[index] = divergence.after(index, _without(layer, what))
                    show_progress(f"removal {len(gone) + 1} of {count}, layer", index + 1, len(dense))
                best = min(trials, key=trials.get)
                current[best] = _without(dense[best], what)
                gone, costs = [*gone, best], [*costs, trials[best]]
                cache.save_json("removed", {"gone": gone, "costs": costs})
        finally:
            model.model.layers = dense
    return gone[:count], costs[:count]


class MLPOnlyLayer(nn.Module):
    """A decoder layer without attention: x + mlp(norm(x)). It owns no layer of the KV cache."""

    def __init__(self, layer):
        super().__init__()
        self.mlp, self.post_attention_layernorm = layer.mlp, layer.post_attention_layernorm

    def forward(self, hidden_states: torch.Tensor, **_) -> torch.Tensor:
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class _Skip(nn.Module):
    """Stands for a removed block while others are tried."""

    def forward(self, hidden_states: torch.Tensor, **_) -> torch.Tensor:
        return hidden_states


def _without(layer, what: str) -> nn.Module:
    return MLPOnlyLayer(layer) if what == "attention" else _Skip()


def _remove_attention(model, gone: list[int]) -> None:
    for index in gone:
        model.model.layers[index] = MLPOnlyLayer(model.model.layers[index])


def _remove_blocks(model, gone: list[int]) -> None:
    kept = [index for index in range(len(model.model.layers)) if index not in gone]
    model.model.layers = nn.ModuleList([model.model.layers[index] for index in kept])
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[index] for index in kept]


class LayerPrunedInference(Inference):
    """`LayerPrunedInference(what="blocks", count=1).generate("Hello")`: load, prune, answer."""

    apply = staticmethod(apply)


def main(argv: list[str] | None = None) -> int:
    import experiment

    parser = cli.build_parser(__doc__)
    defaults = apply.__kwdefaults__
    parser.add_argument("--what", choices=WHAT, default=defaults["what"],
        help="attention sublayers or whole blocks (default: %(default)s)")  # fmt: skip
    parser.add_argument("--count", type=int, default=defaults["count"], metavar="N", help="how many go (default: %(default)s)")
    args = cli.parse(parser, argv)
    options = {"what": args.what, "count": args.count}
    return experiment.run({"layer_pruning": [("layer_pruning", options)]}, args, parser=parser)


if __name__ == "__main__":
    raise SystemExit(main())
