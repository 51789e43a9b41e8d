"""Report a results folder: table on the terminal, table in the README, charts. Reads JSON, measures nothing.

    python report.py [FOLDER ...]                 # default results/: print the tables, redraw the charts
    python report.py --readme README.md           # ... and rewrite the generated parts of the README
    python report.py --check                      # write nothing; exit 1 and name what has drifted

Generated parts of a README stand between a pair of HTML comments; FOLDER is relative to the README:

    results:FOLDER         both tables           <!-- results:results -->...<!-- /results:results -->
    row:FOLDER:RECIPE      one sentence          <!-- row:results:int8 -->...<!-- /row:results:int8 -->
"""

import re
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from arguments import Parser
from readings import (
    RANDOM,
    amount,
    baseline_of,
    describe,
    interval,
    label,
    load_results,
    noise_sentences,
    number,
    percent,
    ratio,
    share,
    speedup,
    times,
)

COLUMNS = ["Method", "Tokens/sec", "Memory (MB)", "Model size (MB)", "Perplexity"]
LEGEND = (
    "In brackets: change against the baseline with its interval; for perplexity, the share of quality kept. "
    "Changes are medians of runs taken in turns, so the column's own ratio may differ. "
    "Speed and memory pass by the value, retention by the lower end of its interval."
)
UNKNOWN = "not measured"
MARKER = re.compile(r"<!-- ((results|row):(\S+)) -->")


# Tables.
def cells(record, baseline):
    """One row of the results table. A recipe without a result has its status and reason in the second cell."""
    if record.get("status") != "ok":
        return [label(record), f"{record.get('status') or 'not run'}: {record.get('reason') or 'no reason recorded'}"]
    kept = number(record, "perplexity_retention")
    notes = {
        "decode_tokens_per_s": percent(*speedup(record, baseline)),
        "peak_memory_mb": percent(ratio(record, baseline, "peak_memory_mb")),
        "model_size_mb": percent(ratio(record, baseline, "model_size_mb")),
        "perplexity": f"{100 * kept:.1f} %" if kept is not None else "",
    }
    row = [label(record)]
    for key, note in notes.items():
        value = number(record, key)
        text = UNKNOWN if value is None else amount(value, 2 if key == "perplexity" else None)
        row.append(f"{text} ({note})" if note and record is not baseline else text)
    return row


def target_table(consolidated):
    """Header and rows of recipe x target, what the bytes read per token would allow at most, and the speed-up of prefill."""
    goals, baseline, rows = consolidated.get("targets") or {}, baseline_of(consolidated), []
    space, kept = number(goals, "memory_change"), number(goals, "perplexity_retention")
    header = [f"Decode {percent(number(goals, 'decode_speedup'))}", f"Memory {percent(space and 1 + space)}"]
    header += [f"Retention {100 * kept:.0f} %" if kept else "Retention", "All three", "By bytes alone", "Prefill"]
    for record in consolidated["results"]:
        if record is baseline or record.get("status") != "ok":
            continue
        met, kept = record.get("targets_met") or {}, number(record, "perplexity_retention")
        shown = {  # one digit more than in the first table, so that a near miss does not look like a pass
            "speed": percent(speedup(record, baseline)[0], places=1),
            "memory": percent(ratio(record, baseline, "peak_memory_mb"), places=1),
            "quality": share(kept, interval(record, "perplexity_retention_ci")) if kept is not None else "",
            "all": "",
        }
        row = [label(record)]
        for key, value in shown.items():
            verdict = {True: "pass", False: "miss"}.get(met.get(key), UNKNOWN)
            row.append(f"{verdict} ({value})" if value and verdict != UNKNOWN else verdict)
        ceiling, (prefill, ends) = number(record, "ceiling_speedup"), speedup(record, baseline, "prefill_")
        rows.append([*row, times(ceiling) if ceiling else UNKNOWN, times(prefill, ends) if prefill else UNKNOWN])
    return ["Recipe", *(column.strip() for column in header)], rows


def print_table(consolidated, console=None):
    """Both tables on the terminal, under the lines that say on which model, machine and workload."""
    # Not a terminal (a log, a pipe): wide enough that no row is folded.
    console = console or Console(width=None if sys.stdout.isatty() else 160)
    sentence, warning = noise_sentences(consolidated)
    for line in filter(None, [*describe(consolidated), sentence]):
        console.print(Text(line))
    if warning:
        console.print(Text(f"WARNING: {warning}", style="bold white on red"))
    rows = [cells(record, baseline_of(consolidated)) for record in consolidated["results"]]
    for title, (columns, body) in {"Results": (COLUMNS, rows), "Targets": target_table(consolidated)}.items():
        table = Table(title=title, title_justify="left")
        for place, column in enumerate(columns):
            table.add_column(column, justify="right" if place else "left")
        for row in body:  # of a recipe that failed, only the status fits into a cell: its reason follows below
            table.add_row(*map(Text, row if len(row) > 2 else [row[0], row[1].split(":")[0]]))
        if body:
            console.print(table)
        for row in (row for row in body if len(row) == 2):
            console.print(Text(" - ".join(row), style="yellow"))
    console.print(Text(LEGEND, style="dim"))
    for record in consolidated["results"]:
        if record.get("explanation"):
            console.print(Text(f"{label(record)}: {record['explanation']}."))


def escape(text):
    """Text for a Markdown table cell, as entities: they also work on lines that GitHub takes for HTML."""
    return re.sub(r"[&<>|`*]", lambda match: f"&#{ord(match[0])};", " ".join(str(text).split()))


def markdown_table(consolidated):
    """The same as GitHub Markdown."""
    sentence, warning = noise_sentences(consolidated)
    lines = ["<br>".join(escape(line) for line in describe(consolidated) if line)]
    lines += ["", f"**Warning: {warning}**"] if warning else []
    rows = [cells(record, baseline_of(consolidated)) for record in consolidated["results"]]
    for columns, body in [(COLUMNS, rows), target_table(consolidated)]:
        padded = [[escape(text) for text in row] + [""] * (len(columns) - len(row)) for row in body]
        table = [columns, [":--", *["--:"] * (len(columns) - 1)], *padded]
        lines += ["", *(f"| {' | '.join(row)} |" for row in table)] if body else []
    return "\n".join([*lines, "", " ".join(filter(None, [LEGEND, sentence]))])


def row_sentence(consolidated, name):
    """The measured row of one recipe in one line; ValueError if there is no such recipe."""
    record = next((r for r in consolidated["results"] if r.get("name") == name), None)
    if record is None:
        raise ValueError(f"no recipe is called {name!r}.")
    baseline = baseline_of(consolidated)
    row, (factor, ends) = cells(record, baseline), speedup(record, baseline)
    if len(row) == 2:
        return escape(f"No result - {row[1]}")
    speed = f"{times(factor, ends)}, " if factor is not None and record is not baseline else ""
    speed += f"{row[1].split(' (')[0]} tokens/s" + (f" ({record['verdict']})" if record.get("verdict") else "")
    quality = f"perplexity {row[4].replace('(', '(retention ')}" + (f" ({RANDOM})" if record.get("random_weights") else "")
    return escape(f"{label(record)}: decode {speed}; peak memory in MB {row[2]}; model size in MB {row[3]}; {quality}.")


# README and command line.
def update_readme(readme_path, folders=None, check=False):
    """Bring the generated parts of a README up to date and return the markers that had drifted.

    `folders` (relative to the README) limits this to the markers of some folders. With check=True nothing is
    written. A marker without its end, or of an unknown folder or recipe, is a ValueError that names it.
    """
    path = Path(readme_path)
    text, root = path.read_text(encoding="utf-8"), path.parent
    chosen = None if folders is None else {(root / folder).resolve() for folder in folders}
    pieces, position, drifted = [], 0, []
    for opening in MARKER.finditer(text):
        marker, kind, target = opening.groups()
        end = text.find(f"<!-- /{marker} -->", opening.end())
        old = text[opening.end() : end]
        if end < 0 or MARKER.search(old):
            raise ValueError(f"{path.name}: marker {marker} is not closed by <!-- /{marker} -->.")
        folder, _, name = target.rpartition(":") if kind == "row" else (target, "", "")
        try:
            consolidated = load_results(root / folder)
            new = f"\n{markdown_table(consolidated)}\n" if kind == "results" else row_sentence(consolidated, name)
        except ValueError as error:
            raise ValueError(f"{path.name}: marker {marker}: {error}") from error
        if old != new and (chosen is None or (root / folder).resolve() in chosen):
            drifted.append(marker)
            pieces += [text[position : opening.end()], new]
            position = end
    if drifted and not check:
        path.write_text("".join(pieces) + text[position:], encoding="utf-8")
    return drifted


def main(argv=None):
    """Exit codes: 0 done or nothing drifted, 1 drifted (--check), 2 a folder or marker that cannot be used."""
    parser = Parser(__doc__)
    parser.add_argument("folders", nargs="*", metavar="FOLDER", help="results folders (default: results)")
    parser.add_argument("--readme", help="rewrite the generated parts of this file (with --check: README.md)")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 naming what drifted")
    args = parser.parse_args(argv)
    readme = args.readme or ("README.md" if args.check else None)
    import charts  # here: `--help` need not wait for matplotlib

    try:
        loaded = {folder: load_results(folder) for folder in args.folders or ["results"]}
        limit = [Path(folder).resolve() for folder in args.folders] or None
        drifted = update_readme(readme, limit, check=args.check) if readme else []
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    if args.check:
        drifted += [str(path) for folder, consolidated in loaded.items() for path in charts.stale(consolidated, folder)]
        print(f"Drifted: {', '.join(drifted)}. Run report.py --readme {readme}." if drifted else "Nothing drifted.")
        return 1 if drifted else 0
    for folder, consolidated in loaded.items():
        print_table(consolidated)
        print(f"{len(charts.draw_all(consolidated, folder))} charts in {Path(folder) / 'visualizations'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
