"""The whole experiment: the baseline, every technique alone, and stacks of them, one process a recipe.

Prints the table of the original (speed, memory, size, perplexity, each with its change), then which recipes keep its three
promises: +60 % decode speed, -35 % memory, 97 % retention. Writes <recipe>_results.json, consolidated_results.json and
visualizations/*.png into the results folder. A recipe that fails is recorded with its reason; the others go on.

    python run_optimization.py                              # TinyLlama if it can be had, else the embedded model
    python run_optimization.py --model smollm2-135m --quick
    python run_optimization.py --model tinyllama-random --recipes mixed_precision,int8
    python run_optimization.py --stack "head_pruning:method=calibrated,prune_ratio=0.1 + int4:max_bits=6 + lean_decode"
    python run_optimization.py --find --min-retention 0.97 --max-memory-mb 200      # the best stack for this machine
"""

from __future__ import annotations

import cli
import experiment
import find
import stacks
from arguments import fail

# The experiment on one screen: recipe -> (label, steps in order). The order of steps has a meaning: prune -> precision ->
# weights -> cache. That of recipes says what a run that ends early still shows: the four techniques, then the best stack.
LEAN, INT8, CALIBRATED = ("lean_decode", {}), ("quantization", {}), {"method": "calibrated"}
RECIPES = {
    "mixed_precision": ("Mixed precision", [("mixed_precision", {})]),
    "int8": ("Int8", [INT8]),
    "int8_dynamic": ("Int8, per token, smoothed", [("quantization", {"scheme": "dynamic"})]),
    "int8_original": ("Int8, per token", [("quantization", {"scheme": "dynamic", "smoothing": 0.0})]),
    "int8_weight_only": ("Int8, weights only", [("quantization", {"scheme": "weight-only"})]),
    "int8_classic": ("Int8, torch's own (classic)", [("quantization", {"scheme": "classic"})]),
    "head_pruning": ("Head pruning by L2 norm", [("head_pruning", {})]),
    "kv_cache_int8": ("Int8 KV cache", [("kv_cache_quant", {})]),
    "int8+lean": ("Int8 + lean", [INT8, LEAN]),
    "lean": ("Lean decode", [LEAN]),
    "half+kv8": ("Mixed precision + int8 KV", [("mixed_precision", {}), ("kv_cache_quant", {})]),
    "prune+int8+kv8": ("Pruning + int8 + int8 KV", [("head_pruning", {}), INT8, ("kv_cache_quant", {})]),
    "half+lean": ("Mixed precision + lean", [("mixed_precision", {}), LEAN]),
    "int8+lean+lookup": ("Int8 + lean + prompt lookup", [INT8, LEAN, ("prompt_lookup", {})]),
    "int8+kv8+lean": ("Int8 + int8 KV + lean", [INT8, ("kv_cache_quant", {}), LEAN]),
    "int4+lean": ("Int4 + lean", [("int4", {}), LEAN]),
    "int4x6+lean": ("Int4 and int8, 6 bits + lean", [("int4", {"max_bits": 6.0}), LEAN]),
    "int4x7+lean": ("Int4 and int8, 7 bits + lean", [("int4", {"max_bits": 7.0}), LEAN]),
    "heads+int8+lean": (
        "Heads 25 %, calibrated, + int8 + lean",
        [("head_pruning", CALIBRATED), INT8, LEAN],
    ),
    "width+int8+lean": ("MLP width 10 % + int8 + lean", [("mlp_pruning", {}), INT8, LEAN]),
}
# Measured only where asked for, by name or with `--recipes all`: they show why the others are as they are, or (GPTQ, smoothing,
# pruning) calibrate for minutes.
ASKED_FOR = {
    "int8_dynamic", "int8_original", "int8_weight_only", "int8_classic", "lean", "int8+kv8+lean", "int4+lean", "int4x6+lean",
    "int4x7+lean", "heads+int8+lean", "width+int8+lean",
}  # fmt: skip

NEED_WORDS = {"int8_dynamic": "int8_original"}  # with random weights it would be the other under a false name


def main(argv: list[str] | None = None) -> int:
    parser = cli.build_parser(__doc__)
    parser.add_argument("--recipes", metavar="A,B,C",
        help=f"all, or some of {', '.join(RECIPES)} (default: all but {', '.join(sorted(ASKED_FOR))})")  # fmt: skip
    parser.add_argument("--dtype", choices=["auto", "fp16", "bf16"], default="auto",
        help="half precision of the recipes that use it (default: fp16 on CUDA and MPS, bf16 on CPU)")  # fmt: skip
    parser.add_argument("--stack", action="append", default=[], metavar="T:OPTION=VALUE,... + T",
        help="a stack of your own: techniques in order, with options of their apply; may be given several times")  # fmt: skip
    parser.add_argument("--minutes", type=float, metavar="M",
        help="end by then and name what was not reached; the same command goes on from there (default: no limit)")  # fmt: skip
    find.add_flags(parser)
    args = cli.parse(parser, argv)
    try:
        names = recipe_names(args)
        own = {stacks.file_name(text): stacks.parse_stack(text) for text in args.stack}
        if own and args.recipes is None and args.dtype != "auto":
            raise ValueError(f"--dtype {args.dtype}: write it into the stack, --stack mixed_precision:dtype={args.dtype}")
        if args.dtype != "auto" and not args.find and not any("mixed_precision" in dict(RECIPES[name][1]) for name in names):
            raise ValueError(f"--dtype {args.dtype}: none of the recipes chosen has mixed precision")
        if args.minutes is not None and not 0 < args.minutes < float("inf"):
            raise ValueError(f"--minutes {args.minutes:g}: choose a number above 0")
        if args.minutes is not None and args.find:
            raise ValueError("--minutes: a search takes --find-minutes")
        limits = find.check(args)
    except ValueError as error:
        fail(parser, error)
    if args.find:
        return find.run(args, limits, parser=parser)
    steps = {name: with_options(RECIPES[name][1], dtype=args.dtype, quick=args.quick) for name in names} | own
    titles = {name: RECIPES[name][0] for name in names} | {name: stacks.spell(stack) for name, stack in own.items()}
    return experiment.run(steps, args, parser=parser, titles=titles, aa=True)


def recipe_names(args) -> list[str]:
    """Those of `--recipes`; without it those that need not be asked for, or none where stacks of the user's own are given."""
    if args.recipes is None:
        return [] if args.stack else [name for name in RECIPES if name not in ASKED_FOR]
    if args.recipes == "all":
        return [name for name in RECIPES if not (name in NEED_WORDS and args.source.random_weights)]
    names = [name.strip() for name in args.recipes.split(",")]
    unknown = [name for name in names if name not in RECIPES]
    if unknown:
        raise ValueError(f"--recipes {unknown[0]!r}: choose from all, {', '.join(RECIPES)}")
    if args.source.random_weights and (wordless := NEED_WORDS.keys() & set(names)):
        name = min(wordless)
        raise ValueError(f"--recipes {name!r}: random weights have no words to smooth by; choose {NEED_WORDS[name]}")
    return names


def with_options(steps, *, dtype: str, quick: bool):
    """The same steps, mixed precision in `dtype`; in a quick run int4 is rounded to nearest, for GPTQ takes minutes."""
    changes = {"mixed_precision": {"dtype": dtype}, "int4": {"rounding": "nearest"} if quick else {}}
    return [(technique, options | changes.get(technique, {})) for technique, options in steps]


if __name__ == "__main__":
    raise SystemExit(main())
