"""Two runs of one experiment side by side: do their intervals overlap? Reads JSON, measures nothing.

An interval that a second run contradicts was too narrow. For every recipe that both folders hold: decode and prefill
speed-up and retention, each with its interval, and whether the two intervals share a point. Exit code 1 if some do not,
2 if there is nothing to compare.

    python run_optimization.py --model smollm2-135m -o results
    python run_optimization.py --model smollm2-135m -o results/repeat
    python compare_runs.py results results/repeat
"""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from arguments import Parser, fail
from readings import interval, label, load_results, number, share, times

QUANTITIES = {
    "Decode": ("speedup", "speedup_ci", times),
    "Prefill": ("prefill_speedup", "prefill_speedup_ci", times),
    "Retention": ("perplexity_retention", "perplexity_retention_ci", share),
}


def overlap(first, second):
    """Whether two intervals (low, high) share a point; None where either is missing."""
    return None if first is None or second is None else first[0] <= second[1] and second[0] <= first[1]


def compare(first: dict, second: dict) -> list[tuple]:
    """Rows (label, quantity, text of the first, text of the second, overlap or None) of recipes that are in both runs.

    `first` and `second` are consolidated results; ValueError if they measured different models or workloads.
    """
    for key in ("model", "device"):
        ours, theirs = first["results"][0].get(key), second["results"][0].get(key)
        if ours != theirs:
            raise ValueError(f"not the same experiment: {key} is {ours} in one run and {theirs} in the other")
    if first.get("workload") != second.get("workload"):
        raise ValueError("not the same experiment: the workloads differ")
    others = {record["name"]: record for record in second["results"]}
    rows = []
    for record in first["results"]:
        other = others.get(record["name"], {})
        for quantity, (key, ends, show) in QUANTITIES.items():
            pair = [(number(one, key), interval(one, ends)) for one in (record, other)]
            if record["name"] != "baseline" and all(ends is not None for _, ends in pair):
                rows.append((label(record), quantity, *(show(*one) for one in pair), overlap(pair[0][1], pair[1][1])))
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("folders", nargs=2, metavar="FOLDER", help="results folders of two runs")
    args = parser.parse_args(argv)
    try:
        rows = compare(*map(load_results, args.folders))
        if not rows:
            raise ValueError("no recipe has an interval in both runs: measure six pairs or more in each")
    except ValueError as error:
        fail(parser, error)
    table = Table("Recipe", "Quantity", *args.folders, "Intervals", title="Two runs of one experiment", title_justify="left")
    for *texts, shared in rows:
        table.add_row(*texts, "overlap" if shared else "APART", style=None if shared else "bold red")
    console = Console(width=None if Console().is_terminal else 130)
    console.print(table)
    apart = sum(not row[-1] for row in rows)
    console.print(f"{len(rows) - apart} of {len(rows)} pairs of intervals overlap")
    return 1 if apart else 0


if __name__ == "__main__":
    raise SystemExit(main())
