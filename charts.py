"""Draw the charts of a results folder from its consolidated JSON: reads numbers, measures nothing.

    draw_all(consolidated, folder)      writes folder/visualizations/*.png

Rules that every chart keeps: a quantity that was not measured is never drawn as zero but named in the
footnote; colour is never the only carrier of meaning; each picture states model, machine and workload, so
that it can be read on its own. A chart with nothing to show is not written, and a stale file of that name
is deleted. Each PNG carries a digest of the JSON it was drawn from, by which `stale()` finds old pictures.
"""

import hashlib
import json
import math
import os
import textwrap
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from report import amount, baseline_of, cells, describe, interval, label, noise_floor, number, percent, ratio, speedup
from report import times as factor_text

# Okabe and Ito's palette: distinguishable under the common colour-vision deficiencies.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#BBBBBB"
# Dollar signs in a title or a reason are not mathematics.
STYLE = {"text.parse_math": False, "axes.spines.top": False, "axes.spines.right": False, "hatch.linewidth": 0.7}
FACTORS = "Factors (1.23x): interleaved runs against the baseline, with interval; if none is shown, two separate runs."
MB = "MB = 10^6 bytes."


def draw_all(consolidated, folder):
    """Draw every chart that has something to show into folder/visualizations and return their paths."""
    target = Path(folder) / "visualizations"
    target.mkdir(parents=True, exist_ok=True)
    written = []
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE}):
        for name, draw in CHARTS.items():
            path, figure = target / f"{name}.png", draw(consolidated)
            if figure is None:
                path.unlink(missing_ok=True)
                continue
            origin = {"Source": digest(consolidated)}
            figure.savefig(path.with_suffix(".tmp"), format="png", bbox_inches="tight", pad_inches=0.2, metadata=origin)
            os.replace(path.with_suffix(".tmp"), path)
            written.append(path)
    return written


def digest(consolidated):
    """Names the content of a results file, however it is formatted."""
    return hashlib.sha256(json.dumps(consolidated, sort_keys=True).encode()).hexdigest()


def stale(consolidated, folder):
    """The charts in the folder that were drawn from other numbers."""
    pictures = [Path(folder) / "visualizations" / f"{name}.png" for name in CHARTS]
    return [path for path in pictures if path.exists() and digest(consolidated).encode() not in path.read_bytes()]


# The charts.
def decode_speed(consolidated):
    """Bars of decoded tokens per second, and what the measured memory bandwidth would allow."""
    return _speed(consolidated, "decode_tokens_per_s", "", "Decode speed: generating one token after another")


def prefill_speed(consolidated):
    """Bars of prompt tokens per second."""
    return _speed(consolidated, "prefill_tokens_per_s", "prefill_", "Prefill speed: reading the prompt")


def _speed(consolidated, key, kind, title):
    records, baseline = _measured(consolidated, key), baseline_of(consolidated)
    if not records:
        return None
    bandwidth = number(consolidated.get("environment"), "read_bandwidth_gb_per_s") if kind == "" else None
    batch = number(consolidated.get("workload"), "batch_size") or 1
    axes = _rows(records, baseline)[0]
    notes = [
        FACTORS,
        "Black line: slowest and fastest repeat, or the interval of the factor where repeats are missing.",
    ]
    for row, record in enumerate(records):
        speed, streamed = number(record, key), number(record, "bytes_per_token")
        (factor, ends), samples = speedup(record, baseline, kind), interval_of_samples(record, key)
        _bar(axes, row, speed, record is baseline)
        if samples is None and ends and number(baseline, key):
            samples = [end * number(baseline, key) for end in ends]
        axes.plot(samples or [], [row, row] if samples else [], color="black", marker="|", linewidth=1.5, markersize=8)
        if bandwidth and streamed:
            name = (
                None if axes.get_legend_handles_labels()[1] else "ceiling: what this machine's memory bandwidth allows"
            )
            limit = batch * bandwidth * 1e9 / streamed
            axes.plot(limit, row, "D", color=ORANGE, markeredgecolor="black", linestyle="", label=name)
        change = f"   {factor_text(factor, ends)}" if factor is not None and record is not baseline else ""
        _value(axes, row, amount(speed) + change)
    if axes.get_legend_handles_labels()[1]:
        notes.append(f"Ceiling: {amount(bandwidth)} GB/s of reading, measured on this machine, / bytes read per token.")
    return _finish(axes, consolidated, title, "tokens per second (higher is better)", notes, key)


def interval_of_samples(record, key):
    """(lowest, highest) of the raw repeats, or None where fewer than two were kept."""
    samples = dict(enumerate((record.get("samples") or {}).get(key) or ()))
    values = [number(samples, place) for place in samples]
    return (min(values), max(values)) if len(values) > 1 and None not in values else None


def memory(consolidated):
    """Stacked bars: weights, KV cache and everything else at the peak."""
    records, baseline = _measured(consolidated, "peak_memory_mb"), baseline_of(consolidated)
    if not records:
        return None
    axes = _rows(records, baseline)[0]
    for row, record in enumerate(records):
        peak, weights, cache = (number(record, key) for key in ("peak_memory_mb", "weights_mb", "kv_cache_mb"))
        known = [("weights", weights, BLUE, ""), ("KV cache", cache, ORANGE, "xxxx")]
        known = [part for part in known if part[1] is not None]
        rest = max(0, peak - sum(size for _, size, *_ in known))
        parts, left = [*known, ("other" if weights is not None else "not split further", rest, "#EEEEEE", "....")], 0
        for name, size, colour, hatch in parts:
            name = None if name in axes.get_legend_handles_labels()[1] else name
            axes.barh(row, size, 0.62, left, label=name, color=colour, hatch=hatch, edgecolor="black", linewidth=0.6)
            left += size
        name = None if "peak" in axes.get_legend_handles_labels()[1] else "peak"
        axes.plot([peak, peak], [row - 0.4, row + 0.4], color="black", linewidth=2.5, label=name)
        change = percent(ratio(record, baseline, "peak_memory_mb")) if record is not baseline else ""
        split = ", ".join(f"{name} {amount(size)}" for name, size, *_ in parts)
        _value(axes, row, f"{amount(peak)}   {change}\n{split}")
    notes = [f"Peak of prefill and decode, without the interpreter and its libraries. {MB}"]
    return _finish(axes, consolidated, "Peak memory while generating", "MB (lower is better)", notes, "peak_memory_mb")


def model_size(consolidated):
    """Bars of the bytes written to disk."""
    records, baseline = _measured(consolidated, "model_size_mb"), baseline_of(consolidated)
    if not records:
        return None
    axes = _rows(records, baseline)[0]
    for row, record in enumerate(records):
        _bar(axes, row, number(record, "model_size_mb"), record is baseline)
        change = percent(ratio(record, baseline, "model_size_mb")) if record is not baseline else ""
        _value(axes, row, f"{amount(number(record, 'model_size_mb'))}   {change}")
    notes = [f"Bytes of the files actually written. {MB}"]
    return _finish(axes, consolidated, "Model size on disk", "MB (lower is better)", notes, "model_size_mb")


def quality(consolidated):
    """Perplexity as bars, and beside it how much of the baseline's quality is kept."""
    records, baseline = _measured(consolidated, "perplexity"), baseline_of(consolidated)
    if not records:
        return None
    axes, kept = _rows(records, baseline, panels=2)
    values = [number(record, "perplexity") for record in records]
    for row, record in enumerate(records):
        _bar(axes, row, values[row], record is baseline)
        axes.text(values[row], row, f" {amount(values[row], 2)}", va="center", fontsize=9)
        share, ends = number(record, "perplexity_retention"), interval(record, "perplexity_retention_ci")
        if share is not None and record is not baseline:
            _dot(kept, 100 * share, row, x_ends=ends and [100 * end for end in ends])
            spread = f" [{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]" if ends else ""
            _value(kept, row, f"{100 * share:.2f} %{spread}")
    broken = max(values) > 20 * min(values) > 0  # one broken recipe would flatten all the others
    if broken:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlim(right=max(values) * (10 if broken else 1.35))
    axes.set_xlabel(f"perplexity{', log scale' if broken else ''} (lower is better)")
    kept.axvline(100, color="black", linewidth=1, label="baseline")
    target = number(consolidated.get("targets"), "perplexity_retention")
    if target:
        kept.axvline(100 * target, color=GREEN, linewidth=2, linestyle="--", label=f"target {100 * target:.0f} %")
    notes = ["Retention = perplexity of the baseline / perplexity; the line through a point is its interval."]
    title = "Quality: perplexity, and how much of the baseline's is kept"
    return _finish(kept, consolidated, title, "retention in % (higher is better)", notes, "perplexity")


def speed_vs_quality(consolidated):
    """The trade: decode speed-up to the right, quality upwards, the corner of both targets shaded."""
    baseline, targets = baseline_of(consolidated), consolidated.get("targets") or {}
    records = [r for r in _measured(consolidated, "perplexity_retention") if r is not baseline]
    records = [r for r in records if speedup(r, baseline)[0] is not None]
    if not records:
        return None
    axes = _axes(4.8)[0]
    axes.plot(1, 100, "s", color="black", markersize=9)
    places = [("Baseline", 1, 100)]
    for record in records:
        (factor, ends), kept = speedup(record, baseline), number(record, "perplexity_retention")
        kept_ends = interval(record, "perplexity_retention_ci")
        _dot(axes, factor, 100 * kept, x_ends=ends, y_ends=kept_ends and [100 * end for end in kept_ends])
        places.append((label(record), factor, 100 * kept))
    least, kept = number(targets, "decode_speedup"), number(targets, "perplexity_retention")
    if least and kept:
        axes.update_datalim([(least * 1.15, 100 * kept - 1)])
    axes.margins(0.14)
    axes.autoscale_view()
    (low, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    if least and kept:
        name = f"both targets met: at least {least:g}x and {100 * kept:g} %"
        box = {"facecolor": GREEN, "alpha": 0.2, "hatch": "//", "linewidth": 0, "zorder": 0, "label": name}
        axes.fill_between([least, right], 100 * kept, top, **box)
    axes.set(xlim=(low, right), ylim=(bottom, top), ylabel="perplexity retention in % (higher is better)")
    _place_labels(axes, places)
    notes = ["Lines through a point are its intervals. The memory target is not part of this picture."]
    title, xlabel = "What the speed costs", "decode speed-up against the baseline (higher is better)"
    return _finish(axes, consolidated, title, xlabel, notes, "perplexity_retention")


def noise_floor_chart(consolidated):
    """Forest plot: the baseline against itself first, then every speed-up beside it."""
    aa, baseline = consolidated.get("aa"), baseline_of(consolidated)
    if not aa:
        return None
    first = {"title": "A/A: baseline against itself", "status": "ok", **aa}
    records = [r for r in consolidated["results"] if r.get("status") == "ok" and number(r, "speedup") is not None]
    records = [first, *(record for record in records if record is not baseline)]
    axes = _rows(records, first)[0]
    for row, record in enumerate(records):
        lines = []
        for name, kind, shift, *look in [("decode", "", -0.14, BLUE, "o"), ("prefill", "prefill_", 0.14, ORANGE, "^")]:
            factor, ends = number(record, f"{kind}speedup"), interval(record, f"{kind}speedup_ci")
            if factor is not None:
                known = name in axes.get_legend_handles_labels()[1]
                _dot(axes, factor, row + shift, ends, look=look, name=None if known else name)
                lines.append(f"{name} {factor_text(factor, ends)}")
        _value(axes, row, "\n".join(lines))
    floor = interval(aa, "speedup_ci")
    if floor:
        axes.axvspan(*floor, color=GREY, alpha=0.6, linewidth=0, label="decode interval of A/A")
    axes.axvline(1, color="black", linewidth=1)
    notes = ["A line through a point is its interval. Where it includes 1, no difference was resolved."]
    xlabel = "speed-up against the baseline (1 = no difference)"
    return _finish(axes, consolidated, "Speed differences and the noise floor", xlabel, notes, "speedup")


CHARTS = {
    "decode_speed": decode_speed,
    "prefill_speed": prefill_speed,
    "memory": memory,
    "model_size": model_size,
    "quality": quality,
    "speed_vs_quality": speed_vs_quality,
    "noise_floor": noise_floor_chart,
}


# What the charts share.
def _measured(consolidated, key):
    return [r for r in consolidated["results"] if r.get("status") == "ok" and number(r, key) is not None]


def _axes(height, panels=1):
    """Axes that fill the figure: all texts stand outside and widen the picture when it is saved."""
    figure = Figure(figsize=(7, height), dpi=130)
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, sharey=True, squeeze=False)[0]
    figure.subplots_adjust(left=0, right=1, bottom=0, top=1, wspace=0.08)
    return axes


def _rows(records, reference, panels=1):
    """Horizontal rows, the first on top; the reference's name is bold."""
    axes = _axes(0.3 + 0.5 * len(records), panels)
    axes[0].set_yticks(range(len(records)), [textwrap.fill(label(record), 34) for record in records])
    axes[0].set_ylim(len(records) - 0.5, -0.5)
    for text, record in zip(axes[0].get_yticklabels(), records, strict=True):
        text.set_fontweight("bold" if record is reference else "normal")
    return axes


def _bar(axes, row, size, is_reference):
    axes.barh(
        row, size, 0.62, color=GREY if is_reference else BLUE, hatch="//" if is_reference else "", edgecolor="black"
    )


def _dot(axes, x, y, x_ends=None, y_ends=None, look=(BLUE, "o"), name=None):
    colour, marker = look
    axes.plot(x_ends or [], [y, y] if x_ends else [], color=colour, linewidth=1.8)
    axes.plot([x, x] if y_ends else [], y_ends or [], color=colour, linewidth=1.8)
    axes.plot(x, y, marker, color=colour, markeredgecolor="black", markersize=7, linestyle="", label=name)


def _value(axes, row, text):
    """The numbers of a row stand in a column beside the axes, where nothing can cover them."""
    axes.text(1.02, row, text.strip(), transform=axes.get_yaxis_transform(), va="center", fontsize=9)


def _place_labels(axes, places):
    """Put each name as near to its point as it fits without touching another name or point."""
    frame, points = axes.get_window_extent(), [axes.transData.transform(place[1:]) for place in places]
    taken = [Bbox.from_extents(x - 8, y - 8, x + 8, y + 8) for x, y in points]
    tries = [(radius, turn * math.pi / 8) for radius in range(14, 400, 14) for turn in range(16)]
    for (name, x, y), point in zip(places, points, strict=True):
        leader = {"arrowstyle": "-", "color": "#555555", "shrinkA": 0, "shrinkB": 4}
        style = {"ha": "center", "va": "center", "fontsize": 9, "textcoords": "offset pixels", "arrowprops": leader}
        text = axes.annotate(textwrap.fill(name, 28), (x, y), (0, 0), **style)
        size = Text.get_window_extent(text)
        for radius, angle in tries:
            shift = (radius + size.width / 2) * math.cos(angle), (radius + size.height / 2) * math.sin(angle)
            corner = point + shift - (size.width / 2, size.height / 2)
            box = Bbox.from_bounds(*corner, size.width, size.height)
            inside = frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 and box.y1 < frame.y1
            if inside and not box.count_overlaps(taken):
                break
        text.xyann = shift
        taken.append(box)


def _finish(axes, consolidated, title, xlabel, notes, key):
    """Add axis text, legend, title, subtitle and footnotes; return the figure."""
    figure, results = axes.figure, consolidated["results"]
    axes.set_xlabel(xlabel)
    for panel in figure.axes:
        panel.grid(axis="x", color="#DDDDDD")
        panel.set_axisbelow(True)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False, fontsize=9)
    missing = [label(r) for r in results if r.get("status") == "ok" and number(r, key) is None]
    notes = notes + ([f"Not measured: {', '.join(missing)}."] if missing else [])
    notes += [" - ".join(cells(r, {})) for r in results if r.get("status") != "ok"]
    notes += filter(None, noise_floor(consolidated)[1:] if "speed" in key else [])
    frame = figure.get_tightbbox()  # in inches
    width = int(13.5 * frame.width)
    above = [line for text in describe(consolidated) for line in textwrap.wrap(text, width)]
    below = [line for text in notes for line in textwrap.wrap(text, width)]
    inches = {"transform": figure.dpi_scale_trans, "fontsize": 9, "linespacing": 1.3}
    figure.text(frame.x0, frame.y0 - 0.12, "\n".join(below), va="top", color="#444444", **inches)
    figure.text(frame.x0, frame.y1 + 0.1, "\n".join(above), va="bottom", color="#444444", **inches)
    inches["fontsize"] = 14
    figure.text(frame.x0, frame.y1 + 0.2 + 0.165 * len(above), title, va="bottom", fontweight="bold", **inches)
    return figure
