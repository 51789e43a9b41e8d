"""Draw the charts of a results folder from its consolidated JSON: reads numbers, measures nothing.

Rules that every chart keeps: a quantity that was not measured is never drawn as zero but named in the
footnote; colour is never the only carrier of meaning; each picture states model, machine and workload. A
chart with nothing to show is not written, and a stale file of that name is deleted. Each PNG carries a
digest of the JSON it was drawn from, by which `stale()` finds old pictures.
"""

import hashlib
import json
import os
from functools import partial
from pathlib import Path

import matplotlib

from axis_charts import cache_memory, depth_speed
from chart_parts import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    add_legend,
    bar,
    dot,
    finish,
    new_axes,
    place_labels,
    rows_of,
    value_beside,
)
from pruning_charts import equal_bytes, sensitivity
from readings import amount, baseline_of, interval, label, number, percent, ratio, speedup, times
from search import front

STYLE = {"text.parse_math": False, "axes.spines.top": False, "axes.spines.right": False, "hatch.linewidth": 0.7}
STYLE |= {"axes.grid": True, "axes.grid.axis": "x", "grid.color": "#DDDDDD", "axes.axisbelow": True}
FACTORS = "Factors (1.23x): interleaved runs against the baseline, with interval (99 %); if none is shown, two separate runs."
LOWEST = 88  # % of retention: what lies below would squeeze the recipes that matter into one line
CUT = f"An arrow points to a retention below {LOWEST} %."
SPREAD = (
    "Black line: slowest and fastest repeat (the baseline's: of all its runs), or the interval of the factor where the repeats "
    "are missing."
)


def draw_all(consolidated, folder):
    """Draw every chart that has something to show into folder/visualizations and return their paths."""
    written = []
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE}):
        for name, (draw, key) in CHARTS.items():
            records = [r for r in consolidated["results"] if r.get("status") == "ok" and number(r, key) is not None]
            written += write(folder, name, draw(consolidated, records) if records else None, consolidated)
    return written + draw_all_own(folder)


def draw_all_own(folder):
    """Draw the charts that have a results file of their own, where it is there and readable."""
    written = []
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE}):
        for name, (draw, file) in OWN_CHARTS.items():
            content = _content(folder, file)
            written += write(folder, name, draw(content) if content else None, content)
    return written


def write(folder, name, figure, source):
    """The figure as a list of one path; [] where there is none, and then an old picture goes too."""
    path = Path(folder) / "visualizations" / f"{name}.png"
    if figure is None:
        path.unlink(missing_ok=True)
        return []
    path.parent.mkdir(parents=True, exist_ok=True)
    origin = {"Source": digest(source)}
    figure.savefig(path.with_suffix(".tmp"), format="png", bbox_inches="tight", pad_inches=0.2, metadata=origin)
    os.replace(path.with_suffix(".tmp"), path)
    return [path]


def _content(folder, file):
    try:
        content = json.loads((Path(folder) / file).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and content.get("results") else None


def digest(consolidated):
    """Names the content of a results file, however it is formatted."""
    return hashlib.sha256(json.dumps(consolidated, sort_keys=True).encode()).hexdigest()


def stale(consolidated, folder):
    """The charts in the folder that were drawn from other numbers."""
    sources = dict.fromkeys(CHARTS, consolidated) | {name: _content(folder, file) for name, (_, file) in OWN_CHARTS.items()}
    pictures = {Path(folder) / "visualizations" / f"{name}.png": source for name, source in sources.items()}
    return [path for path, source in pictures.items() if path.exists() and digest(source).encode() not in path.read_bytes()]


# The charts: each takes the records in which its quantity was measured, and may still decline.
def speed(consolidated, records, kind=""):
    """Bars of tokens per second; for decode, also what the measured memory bandwidth would allow."""
    key, baseline = f"{kind or 'decode_'}tokens_per_s", baseline_of(consolidated)
    axes = rows_of(records, baseline)[0]
    for row, record in enumerate(records):
        factor, ends = speedup(record, baseline, kind)
        bar(axes, row, record[key], record is baseline)
        samples = [value for value in (record.get("samples") or {}).get(key) or () if value is not None]
        if len(samples) < 2:
            samples = [end / factor * record[key] for end in ends or () if factor]
        if samples:
            axes.plot([min(samples), max(samples)], [row, row], "k|-", markersize=8)
        change = f"   {times(factor, ends)}" if factor is not None and record is not baseline else ""
        value_beside(axes, row, amount(record[key]) + change)
    bandwidth = number(consolidated.get("environment"), "read_bandwidth_gb_per_s")
    batch, notes = number(consolidated.get("workload"), "batch_size") or 1, [FACTORS, SPREAD]
    streamed = {row: number(record, "bytes_per_token") for row, record in enumerate(records)}
    limits = {row: batch * bandwidth * 1e9 / size for row, size in streamed.items() if size and bandwidth and not kind}
    if limits:
        name = "ceiling: what this machine's memory bandwidth allows"
        axes.plot([*limits.values()], [*limits], "D", color=ORANGE, markeredgecolor="black", label=name)
        notes.append(f"Ceiling: {amount(bandwidth)} GB/s of reading, measured on this machine, / bytes read per token.")
    title = "Prefill speed: reading the prompt" if kind else "Decode speed: generating one token after another"
    return finish(axes, consolidated, records, title, "tokens per second (higher is better)", notes)


def memory(consolidated, records):
    """Stacked bars: weights, KV cache and everything else at the peak."""
    baseline = baseline_of(consolidated)
    axes = rows_of(records, baseline)[0]
    for row, record in enumerate(records):
        peak, weights, cache = (number(record, key) for key in ("peak_memory_mb", "weights_mb", "kv_cache_mb"))
        parts = [("weights", weights, BLUE, ""), ("KV cache", cache, ORANGE, "xxxx")]
        parts, left = [part for part in parts if part[1] is not None], 0
        rest = max(0, peak - sum(size for _, size, *_ in parts))
        parts.append(("other" if weights is not None else "not split further", rest, "#EEEEEE", "...."))
        for name, size, colour, hatch in parts:
            axes.barh(row, size, 0.62, left, label=name, color=colour, hatch=hatch, edgecolor="black", linewidth=0.6)
            left += size
        axes.plot([peak, peak], [row - 0.4, row + 0.4], color="black", linewidth=2.5, label="peak")
        change = percent(ratio(record, baseline, "peak_memory_mb")) if record is not baseline else ""
        split = ", ".join(f"{name} {amount(size)}" for name, size, *_ in parts)
        value_beside(axes, row, f"{amount(peak)}   {change}\n{split}")
    notes = ["Peak of prefill and decode, without the interpreter and its libraries. MB = 10^6 bytes."]
    return finish(axes, consolidated, records, "Peak memory while generating", "MB (lower is better)", notes)


def model_size(consolidated, records):
    """Bars of the bytes written to disk."""
    baseline = baseline_of(consolidated)
    axes = rows_of(records, baseline)[0]
    for row, record in enumerate(records):
        bar(axes, row, record["model_size_mb"], record is baseline)
        change = percent(ratio(record, baseline, "model_size_mb")) if record is not baseline else ""
        value_beside(axes, row, f"{amount(record['model_size_mb'])}   {change}")
    return finish(axes, consolidated, records, "Size of the files written", "MB = 10^6 bytes (lower is better)", [])


def quality(consolidated, records):
    """Perplexity as bars, and beside it how much of the baseline's quality is kept."""
    baseline, values = baseline_of(consolidated), [record["perplexity"] for record in records]
    axes, kept = rows_of(records, baseline, panels=2)
    for row, record in enumerate(records):
        bar(axes, row, values[row], record is baseline)
        axes.text(values[row], row, f" {amount(values[row], 2)}", va="center", fontsize=9)
        place, ends, text = _retention(record)
        if text and record is not baseline:
            dot(kept, place, row, x_ends=ends, look=(BLUE, "<" if place == LOWEST else "o"))
            value_beside(kept, row, text)
    broken = max(values) > 20 * min(values) > 0  # one broken recipe would flatten all the others
    if broken:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("perplexity" + ", log scale" * broken + " (lower is better)")
    axes.set_xlim(right=max(values) * (10 if broken else 1.35))
    kept.axvline(100, color="black", linewidth=1, label="baseline")
    if target := number(consolidated.get("targets"), "perplexity_retention"):
        kept.axvline(100 * target, color=GREEN, linewidth=2, linestyle="--", label=f"target {100 * target:.0f} %")
    notes = [f"Retention = perplexity of the baseline / perplexity; lines are intervals (95 %). {CUT}"]
    return finish(kept, consolidated, records, "Quality and what is kept", "retention in % (higher is better)", notes)


def _retention(record):
    """(where to draw it, its interval, the true value as text); a broken recipe must not squeeze all others."""
    share, ends = number(record, "perplexity_retention"), interval(record, "perplexity_retention_ci") or ()
    if share is None:
        return None, None, ""
    text = f"{100 * share:.2f} %" + (f" [{100 * ends[0]:.2f}, {100 * ends[1]:.2f}]" if ends else "")
    return max(100 * share, LOWEST), [max(100 * end, LOWEST) for end in ends], text


def pareto(consolidated, records):
    """The trades: retention against decode speed-up, and against model size, with the front of each."""
    baseline, targets = baseline_of(consolidated), consolidated.get("targets")
    records = [r for r in records if r is not baseline and speedup(r, baseline)[0] is not None]
    if not records:
        return None
    panels = new_axes(6.5, panels=2, width=17)
    speeds = [(record, *speedup(record, baseline)) for record in records]
    sizes = [(r, number(r, "model_size_mb"), None) for r in records if number(r, "model_size_mb") is not None]
    places = [
        _trade(panels[0], speeds, start=1, better=1),
        _trade(panels[1], sizes, start=number(baseline, "model_size_mb"), better=-1),
    ]
    _shade_targets(panels[0], targets)
    panels[0].set(xlabel="decode speed-up (higher is better)", ylabel="perplexity retention in % (higher is better)")
    for axes, (names, draw_front) in zip(panels, places, strict=True):
        place_labels(axes, names)
        draw_front(color=ORANGE, linestyle="--", label="front", zorder=0.5)
    add_legend(panels[0])
    notes = [
        "Lines through a point are its intervals (speed 99 %, retention 95 %). Front: nothing, the baseline included, keeps "
        "more and is faster or smaller. It goes by the figures; a promise is kept where the lower end of the interval keeps "
        f"it. {CUT}"
    ]
    xlabel, drawn = "model size in MB = 10^6 bytes (lower is better)", [baseline, *records]
    return finish(panels[1], consolidated, drawn, "What speed and size cost", xlabel, notes)


def _trade(axes, rows, start, better):
    """Draw (record, x, interval of x) against retention and the front, where `better` * x counts; return names with places,
    and what draws the front: a line that names may cross, so they are placed before it is there.
    """
    axes.grid(axis="both", color="#DDDDDD")
    names = []
    if start is not None:
        axes.plot(start, 100, "s", color="black", markersize=9, label="baseline")
        names.append(("Baseline", start, 100))
    beside = [({"perplexity_retention": 1.0}, start, None)] if start is not None else []  # what only loses is on no front
    best = front([*beside, *rows], lambda row: (better * row[1], row[0]["perplexity_retention"]))
    for record, x, ends in rows:
        kept, kept_ends, text = _retention(record)
        on_front = any(record is row[0] for row in best)
        colour, marker, name = (
            (ORANGE, "D", "recipe on the front") if on_front else (BLUE, "o", "recipe beaten or equalled in both")
        )
        if cut := kept == LOWEST:
            marker, name = "v", None
        dot(axes, x, kept, ends, kept_ends, look=(colour, marker), name=name)
        names.append((label(record) + (f" ({text.split(' [')[0]})" if cut else ""), x, kept))
    axes.margins(0.1)
    if not best:
        return names, lambda **_: None
    steps = sorted((x, _retention(record)[0]) for record, x, _ in best)
    return names, partial(axes.step, *zip(*steps, strict=True), where="pre" if better > 0 else "post")


def _shade_targets(axes, targets):
    least, kept = number(targets, "decode_speedup"), number(targets, "perplexity_retention")
    if not (least and kept):
        return
    axes.update_datalim([(least * 1.15, 100 * kept - 1)])
    axes.autoscale_view()
    (low, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    name = f"both targets met: at least {least:g}x and {100 * kept:g} %"
    box = {"facecolor": GREEN, "alpha": 0.2, "hatch": "//", "linewidth": 0, "zorder": 0, "label": name}
    axes.fill_between([least, right], 100 * kept, top, **box)
    axes.set(xlim=(low, right), ylim=(bottom, top))


def noise_floor_chart(consolidated, records):
    """Forest plot: the baseline against itself first, then every speed-up beside it."""
    aa, baseline = consolidated.get("aa"), baseline_of(consolidated)
    if not aa:
        return None
    first = {"title": "A/A: baseline against itself", **aa}
    records = [first, *(r for r in records if number(r, "speedup") is not None and r is not baseline)]
    axes = rows_of(records, first)[0]
    for row, record in enumerate(records):
        lines = []
        for name, kind, shift, *look in [("decode", "", -0.14, BLUE, "o"), ("prefill", "prefill_", 0.14, ORANGE, "^")]:
            factor, ends = speedup(record, {}, kind)
            if factor is not None:
                dot(axes, factor, row + shift, ends, look=look, name=name)
                lines.append(f"{name} {times(factor, ends)}")
        value_beside(axes, row, "\n".join(lines))
    if floor := interval(aa, "speedup_ci"):
        axes.axvspan(*floor, color=GREY, alpha=0.6, linewidth=0, label="decode interval of A/A")
    axes.axvline(1, color="black", linewidth=1)
    notes = ["A line through a point is its interval (99 %). Where it includes 1, no difference was resolved."]
    title, xlabel = "Speed differences and the noise floor", "speed-up against the baseline (1 = no difference)"
    return finish(axes, consolidated, [baseline, *records], title, xlabel, notes)


CHARTS = {
    "decode_speed": (speed, "decode_tokens_per_s"),
    "prefill_speed": (partial(speed, kind="prefill_"), "prefill_tokens_per_s"),
    "memory": (memory, "peak_memory_mb"),
    "model_size": (model_size, "model_size_mb"),
    "quality": (quality, "perplexity"),
    "pareto": (pareto, "perplexity_retention"),
    "noise_floor": (noise_floor_chart, "decode_tokens_per_s"),
    "decode_speed_by_depth": (depth_speed, "decode_tokens_per_s"),
    "kv_cache_memory": (cache_memory, "kv_cache_mb"),
}
OWN_CHARTS = {
    "equal_bytes": (equal_bytes, "equal_bytes_results.json"),
    "sensitivity": (sensitivity, "layer_costs_results.json"),
}
