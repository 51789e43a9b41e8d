"""Smoothing: move outliers from activations, where they coarsen int8, into weights, where there is room for them.

Idea    A few channels of a layer's input are tens of times larger than the rest, in every token. One int8 scale per token
        then leaves the other channels few levels. Dividing those channels by a factor and multiplying the weights that
        read them by the same factor changes nothing in exact arithmetic, and the division costs nothing: it folds into
        the RMSNorm before q/k/v and gate/up, into v_proj's rows before o_proj and up_proj's rows before down_proj.
        Factors are absmax(activations)^strength / absmax(weights)^(1 - strength), from calibration text.
Helps   Int8 with one scale per token (quantization --scheme dynamic), which loses least with it. By itself it changes
        neither speed nor size nor quality: it is a step before quantization.
Loses   Groups of 64 isolate outliers already, so the grouped scheme gains little. Too high a strength moves the problem
        into the weights. A tied lm_head (SmolLM2) keeps its outliers: its table is the input embedding too.
Papers  Xiao et al. 2022: https://arxiv.org/abs/2211.10438
Writes  smoothing_results.json beside the baseline's, and charts, in the results folder.

    python optimizations/smoothing.py --then dynamic
    python optimizations/smoothing.py --strength 0.5 --then grouped --model smollm2-135m
"""

from __future__ import annotations

from torch import nn

import cli
from fitting import calibration
from fitting.smoothing import CALIBRATION_TOKENS, STRENGTH, smooth
from inference import Inference
from kernels.modules import add_notes, check_not_lean


def apply(model, *, strength: float = STRENGTH, calibration_tokens: int = CALIBRATION_TOKENS):
    """Migrate outliers in place; every weight keeps its shape and dtype.

    `strength` 0 to 1 is the share of an outlier that moves. With random weights the factors come from random ids.
    Raises ValueError for a model whose linear layers are no longer nn.Linear, and for strength 0, which changes nothing.
    """
    check_not_lean(model)
    check(model.config, strength=strength, calibration_tokens=calibration_tokens)
    linears = [module for name, module in model.named_modules() if name.endswith(("_proj", "lm_head"))]
    if any(type(linear) is not nn.Linear for linear in linears):
        raise ValueError("no factor folds into quantized or half-precision layers: run smoothing before them")
    note = smooth(model, calibration.calibration_ids(model, tokens=calibration_tokens), strength)
    add_notes(model, note)
    model.smoothed = True  # quantization would do it again, at its own strength, and undo this one
    return model


def check(config, *, strength: float, calibration_tokens: int) -> None:
    """What can be known before weights are loaded. Raises ValueError naming the flag."""
    if not 0 < strength <= 1:
        raise ValueError(f"--strength {strength:g}: choose a number above 0, which would change nothing, and up to 1")
    if calibration_tokens < 512:
        raise ValueError(f"--calibration-tokens {calibration_tokens}: choose 512 or more")


class SmoothedInference(Inference):
    """`SmoothedInference(strength=0.7).generate("Hello")`: load, migrate outliers, answer."""

    apply = staticmethod(apply)


def main(argv: list[str] | None = None) -> int:
    import experiment

    parser = cli.build_parser(__doc__)
    defaults = apply.__kwdefaults__
    parser.add_argument("--strength", type=float, default=defaults["strength"],
        help="share of an outlier that moves into the weights, above 0 and up to 1 (default: %(default)s)")  # fmt: skip
    parser.add_argument("--calibration-tokens", type=int, default=defaults["calibration_tokens"],
        help="of calibration text, to find outliers in (default: %(default)s)")  # fmt: skip
    parser.add_argument("--then", choices=["nothing", "dynamic", "grouped"], default="nothing",
        help="int8 scheme of the quantization that follows, which shows what it gains (default: %(default)s)")  # fmt: skip
    args = cli.parse(parser, argv)
    steps = [("smoothing", {name: getattr(args, name) for name in defaults})]
    if args.then != "nothing":
        steps.append(("quantization", {"scheme": args.then}))
    return experiment.run({"smoothing": steps}, args, parser=parser)


if __name__ == "__main__":
    raise SystemExit(main())
