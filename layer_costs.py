"""Where rounding hurts: what each linear layer's rounding to int4 alone costs, in nats per token, as a map of the model.

The weights are rounded to nearest in groups of 64 and the increase of the loss is estimated from gradients on calibration text
(fitting/sensitivity.py); int4 chooses the layers that get int8 by a like ranking, on more kinds of text and per bit that it
costs. `--heads` adds what a quarter of each layer's heads costs where the others are refitted, which takes minutes the first
time (kept in ~/.cache/tinyllama-optimization).
Writes layer_costs_results.json and visualizations/sensitivity.png.

    python layer_costs.py --model smollm2-135m
    python layer_costs.py --model smollm2-135m --heads
"""

from __future__ import annotations

import functools
from pathlib import Path

from torch import nn

import charts
import cli
import experiment
import models
import records
import texts
from arguments import fail
from devices import Unsupported
from fitting import calibration, pruning_costs
from fitting.calibration_cache import show_progress
from fitting.sensitivity import loss_increases
from kernels.int4 import nearest_change
from measurement import console

RESULTS = "layer_costs_results.json"
GROUP_SIZE = 64
TOKENS = 2048
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 2 bad arguments, 130 interrupted."""
    parser = cli.build_parser(__doc__, without=cli.OF_RECIPES)
    parser.add_argument("--heads", action="store_true", help="also what a quarter of each layer's heads costs (minutes)")
    args = cli.parse(parser, argv)
    try:
        if args.source.random_weights:
            raise ValueError(f"--model {args.source.name}: random weights have no loss to raise; choose a real model")
        models.load_tokenizer(args.source)  # raises where there is none
        models.fetch_weights(args.source)
        texts.load_text("calibration")
    except ValueError as error:
        fail(parser, error)
    try:
        with console.status("loading"):
            model = models.load_model(args.source, device=args.torch_device)
        ids = calibration.calibration_ids(model, tokens=TOKENS)
        costs = rounding_costs(model, ids)
        heads = head_costs(model) if args.heads else None
    except Unsupported as error:  # of the heads alone, which come last
        console.print(str(error), markup=False)
        heads = None
    except ValueError as error:  # a damaged file
        fail(parser, error)
    except KeyboardInterrupt:
        console.print("interrupted: nothing was written", markup=False)
        return 130
    code = 0
    content = describe(args, ids) | {"group_size": GROUP_SIZE} | by_kind(costs, len(model.model.layers)) | {"heads": heads}
    try:
        records.save_json(Path(args.results_dir) / RESULTS, content)
        charts.draw_all_own(args.results_dir)
    except OSError as error:
        console.print(f"not written: {error}", markup=False)
        code = 1
    for name, cost in sorted(costs.items(), key=lambda pair: -pair[1])[:5]:
        print(f"{name.removeprefix('model.')}: {cost:.5f} nats per token")
    return code


def rounding_costs(model, ids) -> dict[str, float]:
    """Increase of the mean loss, nats per token, for each linear layer by name; ids int64 [windows, tokens]."""
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    changes = {name: functools.partial(nearest_change, module.weight.data, GROUP_SIZE) for name, module in linears.items()}
    totals = dict.fromkeys(linears, 0.0)
    for number, window in enumerate(ids, 1):  # one at a time, so that there is progress to show
        for name, cost in loss_increases(model, window[None], changes).items():
            totals[name] += cost / len(ids)
        show_progress("rounding, window", number, len(ids))
    return totals


def head_costs(model) -> list[float]:
    """KL divergence in nats per token when a quarter of one layer's heads is gone and the others refitted, by layer."""
    attention, windows = model.model.layers[0].self_attn, calibration.refit_windows(model)
    heads = attention.q_proj.out_features // attention.head_dim
    rankings = pruning_costs.cached_rankings(
        model, windows, part="attention", group=attention.head_dim, at_once=1, steps=heads - 1
    )
    return [ranking.costs[max(1, round(heads / 4)) - 1] for ranking in rankings]


def by_kind(costs: dict[str, float], layers: int) -> dict:
    """`costs`: kind -> one figure a layer, null where a layer has none; and `lm_head` apart."""
    table = {kind: [None] * layers for kind in KINDS}
    for name, cost in costs.items():
        parts = name.split(".")
        if parts[:2] == ["model", "layers"]:
            table[parts[-1]][int(parts[2])] = cost
    return {"costs": table, "lm_head": costs.get("lm_head")}


def describe(args, ids) -> dict:
    """Model, machine and text, under the keys that every results file has."""
    model = {"name": "baseline", "title": "Baseline (fp32)", "status": "ok", "model": args.source.name,
             "device": str(args.torch_device), "dtype": "float32", "random_weights": False}  # fmt: skip
    exam = {"text": texts.load_text("calibration").name, "windows": len(ids), "window": ids.shape[1]}
    return {
        "schema_version": 1, "environment": records.environment(device=args.torch_device, threads=args.threads),
        "workload": {"quality": exam}, "repro": experiment.repro("baseline"), "results": [model],
    }  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
