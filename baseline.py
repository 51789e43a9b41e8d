"""The baseline: the model as it comes, in float32 as in the original. Everything else is measured against it.

Loads the model, times prefill and decode, takes the peak of memory and the perplexity, writes baseline_results.json.
Decode reads every weight once per token, so on any machine it can go no faster than read bandwidth / bytes of weights:
the table and the charts show what share of that the baseline reaches.

    python baseline.py
    python baseline.py --model smollm2-135m --prompt-tokens 256 --new-tokens 64
    python baseline.py --model tinyllama-random --quick -o results/tinyllama-random
"""

from __future__ import annotations

import cli
import experiment
from inference import Inference
from models import load_model
from texts import load_text

__all__ = ["Inference", "load_model", "load_text", "main"]


def main(argv: list[str] | None = None) -> int:
    parser = cli.build_parser(__doc__)
    args = cli.parse(parser, argv)
    return experiment.run({}, args, parser=parser)


if __name__ == "__main__":
    raise SystemExit(main())
