"""Our recipes and other engines in the same run on the same machine: one process at a time, in turns.

What    TinyLlama's architecture with seeded random weights; decode and prefill as `benchmark.py` defines them, for the float32
        baseline, some of our recipes and each peer at those of 4, 8 and 16 bits that it has.
How     Contenders of one width of weights (by their names) are alive together, as many as memory holds, idle on a pipe between
        turns. Each round runs every one of them once, the baseline twice, in an order drawn at random: a ratio of one
        round shares the machine's mood. Medians and bootstrap intervals over rounds come from interleave.py.
Best    "best of ours / best peer" at each width: the medians of the ratios of rounds, where both were in one group.
Writes  DIR/<contender>_results.json, DIR/peers_results.json, DIR/visualizations/peers.png

Our recipes run in this Python, the peers in --peers-python (peers/README.md). About 25 minutes on two cores with the defaults:

    python peers/compare.py
    python peers/compare.py --recipes int8+lean,int8 --peers llama_cpp_q8_0,openvino_int8,ctranslate2_int8 --repeats 15
    python peers/compare.py --new-tokens 8 --repeats 2         # does everything run? No figure of this means anything
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

import interleave
import judgement
import records
from arguments import fail
from bandwidth import read_bandwidth
from measurement import console
from peers import chart, standalone
from peers.contenders import PEERS
from peers.rounds import BASELINE, Turns
from readings import times
from run_optimization import NEED_WORDS, RECIPES
from store import read_json, validate

DEFAULT_RECIPES = ("half+lean", "int8+lean", "int4+lean")  # the fastest of ours at each width
STREAMED_WEIGHTS = 1_034_512_384  # read for each token: all but the embedding table
QUANTITIES = {"decode": "decode_tokens_per_s", "prefill": "prefill_tokens_per_s"}


def main(argv: list[str] | None = None) -> int:
    parser = standalone.build_parser(__doc__)
    parser.add_argument("--recipes", metavar="A,B", default=",".join(DEFAULT_RECIPES), help="of ours (default: %(default)s)")
    parser.add_argument("--peers", metavar="A,B", default=",".join(PEERS), help="default: all of %(default)s")
    parser.add_argument("--repeats", "-r", type=int, default=9, help="rounds of each group (default: %(default)s)")
    args = standalone.parse(parser, argv)
    names = []
    for flag, known in (("recipes", [name for name in RECIPES if name not in NEED_WORDS]), ("peers", PEERS)):
        chosen = [name for name in getattr(args, flag).split(",") if name]
        for name in chosen:
            if name not in known:
                fail(parser, ValueError(f"--{flag} {name!r}: choose from {', '.join(known)}"))
        names += chosen
    if not names:
        fail(parser, ValueError(f"--recipes and --peers are both empty: choose from {', '.join([*RECIPES, *PEERS])}"))
    args.torch_device = torch.device("cpu")
    torch.set_num_threads(args.threads)
    environment = records.environment(device=args.torch_device, threads=args.threads)
    cache = args.results_dir / ".cache"
    cache.mkdir(exist_ok=True)
    environment |= read_bandwidth(args.torch_device, cache=cache, threads=args.threads)
    args.bandwidth_gb_per_s = environment["read_bandwidth_gb_per_s"]
    if notice := records.busy_notice(environment):
        console.print(f"NOTE  {notice}", markup=False)
    code = 0
    with tempfile.TemporaryDirectory(dir=args.results_dir, prefix=".scratch-") as scratch:
        comparison = Turns(args, Path(scratch))
        try:
            comparison.run(names)
        except KeyboardInterrupt:
            code = 130
    content = gather(comparison, environment)
    write(content, args.results_dir)
    for line in content["best"]:
        console.print(sentence(line), markup=False)
    statuses = {record["status"] for record in content["results"]}
    return code or (1 if {"failed", "oom"} & statuses else 0)


def gather(comparison: Turns, environment: dict) -> dict:
    """Everything of the run as one object, in the shape of a consolidated results file, with `bits` and `best` added."""
    results = list(comparison.records.values())
    noise = comparison.noise
    again = interleave.Comparison(
        [sample for each in noise for sample in each.baseline], [sample for each in noise for sample in each.variant]
    )
    return {
        "schema_version": records.SCHEMA_VERSION,
        "environment": environment,
        "workload": comparison.args.workload.as_dict(),
        "aa": judgement.noise_floor(again) if noise else None,
        "bits": {record["name"]: bits_of(record) for record in results},
        "best": best_of_each(comparison),
        "results": results,
    }


def bits_of(record: dict) -> int | None:
    """Bits of a weight: a peer's by the name of its quantisation, ours by the bytes that are really read for a token."""
    if record["name"] in PEERS:
        return PEERS[record["name"]].bits
    if record["bytes_per_token"] is None:
        return None
    bits = 8 * record["bytes_per_token"] / STREAMED_WEIGHTS
    nearest = min((4, 8, 16, 32), key=lambda width: abs(width - bits))
    return nearest if abs(nearest - bits) <= 0.1 * nearest + 0.5 else None  # six bits have no peer


def best_of_each(comparison: Turns) -> list[dict]:
    """At each width, for decode and for prefill: our fastest recipe over the fastest peer."""
    found = []
    measured = [record for record in comparison.records.values() if record["status"] == "ok" and record["name"] != BASELINE]
    for bits in (4, 8, 16):
        at_width = [record for record in measured if bits_of(record) == bits]
        for kind, key in QUANTITIES.items():
            sides = [[r for r in at_width if (r["name"] in PEERS) is theirs and r[key]] for theirs in (False, True)]
            if all(sides):
                ours, peer = (max(side, key=lambda record, key=key: record[key])["name"] for side in sides)
                found.append({"bits": bits, "kind": kind, "ours": ours, "peer": peer} | ratio(comparison, ours, peer, key))
    return found


def ratio(comparison: Turns, ours: str, peer: str, key: str) -> dict:
    """Round by round where both took turns in one group; else the ratio of their speed-ups, which has no interval."""
    samples, rounds = comparison.samples, comparison.rounds
    if rounds[ours] is rounds[peer]:
        paired = interleave.Comparison(samples[peer], samples[ours]).ratio(key)
        return {"ratio": paired.median, "ratio_ci": paired.interval, "verdict": paired.verdict}
    speedup = "speedup" if key == QUANTITIES["decode"] else "prefill_speedup"
    ratio = comparison.records[ours][speedup] / comparison.records[peer][speedup]
    return {"ratio": ratio, "ratio_ci": None, "verdict": None}


def sentence(best: dict) -> str:
    ratio = times(best["ratio"], best["ratio_ci"])
    return f"{best['bits']} bits, {best['kind']}: {best['ours']} is {ratio} of {best['peer']}"


def write(content: dict, folder: Path) -> None:
    """One file a record, one that gathers them, the chart."""
    for record in content["results"]:
        validate(record)
        records.save_json(folder / f"{record['name']}_results.json", record)
    records.save_json(folder / "peers_results.json", content)
    path = chart.draw(read_json(folder / "peers_results.json"), folder)  # as it was rounded: the picture names its source
    console.print(f"results: {folder}/peers_results.json" + (f", chart: {path}" if path else ""), markup=False)


if __name__ == "__main__":
    sys.exit(main())
