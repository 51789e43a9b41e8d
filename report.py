"""Report a results folder: table on the terminal, table in the README, charts. Reads JSON, measures nothing.

    python report.py [FOLDER ...]                 # default results/: print the tables, redraw the charts
    python report.py --readme README.md           # ... and rewrite the generated parts of the README
    python report.py --check                      # write nothing; exit 1 and name what has drifted

Generated parts of a README stand between a pair of HTML comments; FOLDER is relative to the README:

    results:FOLDER         both tables           <!-- results:results -->...<!-- /results:results -->
    row:FOLDER:RECIPE      one sentence          <!-- row:results:int8 -->...<!-- /row:results:int8 -->
"""

import argparse
import json
import math
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

COLUMNS = ["Method", "Tokens/sec", "Memory (MB)", "Model size (MB)", "Perplexity"]
LEGEND = "In brackets: change against the baseline with its interval; for perplexity, the share of quality kept."
RANDOM = "random weights: speed, memory and size only"
UNKNOWN = "not measured"
MACHINE = {"threads": "{} threads", "cores": "{} cores", "ram_gb": "{:.0f} GB RAM", "os": "{}"}
MACHINE |= {"torch": "torch {}", "transformers": "transformers {}", "time": "{:.10}"}
WORKLOAD = {"prompt_tokens": "{} prompt tokens", "new_tokens": "{} new tokens", "depth": "depth {}"}
WORKLOAD |= {"batch_size": "batch size {}", "repeats": "{} repeats"}
MARKER = re.compile(r"<!-- ((results|row):(\S+)) -->")


# Questions to the JSON; charts.py asks them too.
def load_results(folder):
    """The content of folder/consolidated_results.json; ValueError with one sentence if that cannot be had."""
    path = Path(folder) / "consolidated_results.json"
    try:
        consolidated = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {getattr(error, 'strerror', error)}.") from error
    results = consolidated.get("results") if isinstance(consolidated, dict) else None
    if not isinstance(results, list) or not results or not isinstance(results[0], dict):
        raise ValueError(f'{path} holds no list of records under "results".')
    return consolidated


def number(record, key):
    """The value as a number, or None where it was not measured (null, missing, NaN or infinite)."""
    value = (record or {}).get(key)
    return value if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None


def interval(record, key):
    """(low, high), or None where either end is missing."""
    ends = dict(enumerate((record or {}).get(key) or ()))
    numbers = tuple(number(ends, place) for place in ends)
    return numbers if len(numbers) == 2 and None not in numbers else None


def label(record):
    """The recipe's human name."""
    return str(record.get("title") or record.get("name") or "unnamed")


def baseline_of(consolidated):
    """The record that all others are compared with, or {} where it did not run: then no change is shown."""
    return next((r for r in consolidated["results"] if r.get("name") == "baseline" and r.get("status") == "ok"), {})


def ratio(record, baseline, key):
    """record / baseline of one quantity, or None where one of them was not measured."""
    ours, theirs = number(record, key), number(baseline, key)
    return ours / theirs if ours is not None and theirs else None


def speedup(record, baseline, kind=""):
    """(ratio, interval or None); `kind` is "" for decode or "prefill_"."""
    measured = number(record, f"{kind}speedup")
    if measured is not None:
        return measured, interval(record, f"{kind}speedup_ci")
    # Not interleaved: the ratio of two separate runs, which has no interval.
    return ratio(record, baseline, f"{kind or 'decode_'}tokens_per_s"), None


def amount(value, places=None):
    """A number at reading precision: three digits below 100, whole above; `places` asks for other decimals."""
    if places is None or abs(value) >= 1000:
        places = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:.{places}f}" if abs(value) < 1e6 else f"{value:.2e}"


def percent(factor, ends=None, places=None):
    """A ratio as a change: 1.47 is +47 %, and 1.047 +4.7 %, with its interval where there is one; None is ""."""
    if factor is None:
        return ""
    places = (1 if abs(factor - 1) < 0.0995 else 0) if places is None else places
    texts = [f"{100 * (each - 1):+.{places}f}" for each in (factor, *(ends or ()))]
    texts = [text.lstrip("+-") if float(text) == 0 else text for text in texts]
    return f"{texts[0]} %" + (f" [{', '.join(texts[1:])}]" if ends else "")


def times(value, ends=None):
    """A speed-up as 1.47x, near 1 as 1.047x, with its interval where there is one."""
    places = 3 if abs(value - 1) < 0.0995 else 2
    return f"{value:.{places}f}x" + (f" [{ends[0]:.{places}f}, {ends[1]:.{places}f}]" if ends else "")


def describe(consolidated):
    """Model, machine and workload as three lines; what is unknown is left out."""
    env, work = consolidated.get("environment") or {}, consolidated.get("workload") or {}
    exam = work.get("quality") or {}
    first = baseline_of(consolidated) or consolidated["results"][0]
    gpu = env.get("gpu") if first.get("device") == "cuda" else None
    is_random = any(record.get("random_weights") for record in consolidated["results"])
    model = [first.get("model") or "model not recorded", first.get("dtype"), is_random and RANDOM]
    machine = [f"{first.get('device') or 'device'}: {gpu or env.get('cpu') or 'not recorded'}", gpu and env.get("cpu")]
    machine += [form.format(env[key]) for key, form in MACHINE.items() if env.get(key)]
    workload = [form.format(work[key]) for key, form in WORKLOAD.items() if work.get(key) is not None]
    if exam.get("windows"):
        workload.append(f"quality on {exam['windows']} x {exam.get('window')} tokens of {exam.get('text') or 'text'}")
    return [", ".join(str(part) for part in line if part) for line in (model, machine, workload)]


def noise_floor(consolidated):
    """(sentence or None, warning or None): how far the baseline differs from itself."""
    aa = consolidated.get("aa") or {}
    kinds = [("decode", ""), ("prefill", "prefill_")]
    known = [f"{name} {times(*speedup(aa, {}, kind))}" for name, kind in kinds if speedup(aa, {}, kind)[0]]
    sentence = f"Noise floor, the baseline against itself: {', '.join(known)}." if known else None
    ends = [end for _, kind in kinds for end in interval(aa, f"{kind}speedup_ci") or ()]
    floor = max((abs(end - 1) for end in ends), default=0)
    warning = f"Untrustworthy run: the baseline differs from itself. Speed differences up to {floor:.0%} mean nothing here."
    return sentence, warning if aa.get("trustworthy") is False else None


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
    """Header and rows of recipe x target, with what the bytes read per token would allow at most."""
    goals, baseline, rows = consolidated.get("targets") or {}, baseline_of(consolidated), []
    space, kept = number(goals, "memory_change"), number(goals, "perplexity_retention")
    header = [f"Decode {percent(number(goals, 'decode_speedup'))}", f"Memory {percent(space and 1 + space)}"]
    header += [f"Retention {100 * kept:.0f} %" if kept else "Retention", "All three", "By bytes alone"]
    for record in consolidated["results"]:
        if record is baseline or record.get("status") != "ok":
            continue
        met, kept = record.get("targets_met") or {}, number(record, "perplexity_retention")
        shown = {  # one digit more than in the first table, so that a near miss does not look like a pass
            "speed": percent(speedup(record, baseline)[0], places=1),
            "memory": percent(ratio(record, baseline, "peak_memory_mb"), places=1),
            "quality": f"{100 * kept:.2f} %" if kept is not None else "",
            "all": "",
        }
        row = [label(record)]
        for key, value in shown.items():
            verdict = {True: "pass", False: "miss"}.get(met.get(key), UNKNOWN)
            row.append(f"{verdict} ({value})" if value and verdict != UNKNOWN else verdict)
        ceiling = number(record, "ceiling_speedup")
        rows.append([*row, times(ceiling) if ceiling else UNKNOWN])
    return ["Recipe", *(column.strip() for column in header)], rows


def print_table(consolidated, console=None):
    """Both tables on the terminal, under the lines that say on which model, machine and workload."""
    # Not a terminal (a log, a pipe): wide enough that no row is folded.
    console = console or Console(width=None if sys.stdout.isatty() else 130)
    sentence, warning = noise_floor(consolidated)
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
    sentence, warning = noise_floor(consolidated)
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", metavar="FOLDER", help="results folders (default: results)")
    parser.add_argument("--readme", help="rewrite the generated parts of this file (with --check: README.md)")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 naming what drifted")
    args = parser.parse_args(argv)
    readme = args.readme or ("README.md" if args.check else None)
    import charts  # here, because charts.py asks this file its questions

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
