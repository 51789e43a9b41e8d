"""What the charts share: axes, bars, labels that do not overlap, and the texts around a picture."""

import math
import textwrap
from functools import partial

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.path import Path as Line
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from readings import describe, label, noise_sentences

NEAR = 70  # pixels between a point and its name that nobody has to follow with a finger
# Okabe and Ito's palette: distinguishable under the common colour-vision deficiencies.
BLUE, ORANGE, GREEN, GREY, INK = "#0072B2", "#E69F00", "#009E73", "#BBBBBB", "#444444"


def new_axes(height, panels=1, width=7):
    """Axes that fill the figure: all texts stand outside and widen the picture when it is saved."""
    figure = Figure(figsize=(width, height), dpi=130)
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, sharey=True, squeeze=False)[0]
    figure.subplots_adjust(left=0, right=1, bottom=0, top=1, wspace=0.08)
    return axes


def rows_of(records, reference, panels=1):
    """Horizontal rows, the first on top; the reference's name is bold."""
    axes = new_axes(0.3 + 0.5 * len(records), panels)
    axes[0].set_yticks(range(len(records)), [textwrap.fill(label(record), 34) for record in records])
    axes[0].set_ylim(len(records) - 0.5, -0.5)
    for text, record in zip(axes[0].get_yticklabels(), records, strict=True):
        text.set_fontweight("bold" if record is reference else "normal")
    return axes


def bar(axes, row, size, is_reference):
    colour, hatch = (GREY, "//") if is_reference else (BLUE, "")
    axes.barh(row, size, 0.62, color=colour, hatch=hatch, edgecolor="black")


def dot(axes, x, y, x_ends=None, y_ends=None, look=(BLUE, "o"), name=None):
    for xs, ys in [(x_ends, [y, y]), ([x, x], y_ends)]:
        if xs and ys:
            axes.plot(xs, ys, color=look[0], linewidth=2)
    axes.plot(x, y, look[1], color=look[0], markeredgecolor="black", markersize=6, label=name)


def value_beside(axes, row, text):
    """The numbers of a row stand in a column beside the axes, where nothing can cover them."""
    axes.text(1.02, row, text.strip(), transform=axes.get_yaxis_transform(), va="center", fontsize=9)


def place_labels(axes, places):
    """Put each name as near to its point as it fits, its leader included, without touching anything else."""
    frame, taken = axes.get_window_extent(), [line.get_window_extent().padded(8) for line in axes.lines]
    tries = [(radius, turn * math.pi / 8) for radius in range(14, 400, 14) for turn in range(16)]
    spots = [Bbox.from_extents(*(point - 5), *(point + 5)) for point in axes.transData.transform([p for _, *p in places])]
    names, leaders = [], []
    style = {"ha": "center", "va": "center", "fontsize": 9, "textcoords": "offset pixels"}
    style["bbox"] = {"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.3}
    style["arrowprops"] = {"arrowstyle": "-", "color": INK, "shrinkA": 0, "shrinkB": 4}
    for name, *place in places:
        text = axes.annotate(textwrap.fill(name, 28), place, (0, 0), **style)
        point, size = axes.transData.transform(place), Text.get_window_extent(text)
        others = [spot for spot in spots if not spot.padded(2).contains(*point)]
        strict = [(names + others, *near) for near in tries if near[0] <= NEAR]  # a long leader is worse than one over a point
        for avoided, radius, angle in [*strict, *((names, *any_distance) for any_distance in tries)]:
            shift = (radius + size.width / 2) * math.cos(angle), (radius + size.height / 2) * math.sin(angle)
            box = Bbox.from_bounds(*(point + shift - size.size / 2), *size.size)
            leader = Line([point, point + shift])
            inside = frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 and box.y1 < frame.y1
            crossing = any(map(leader.intersects_bbox, avoided)) or any(old.intersects_bbox(box) for old in leaders)
            if inside and not crossing and not box.count_overlaps(taken + names):
                break
        text.xyann = shift
        names.append(box)
        leaders.append(leader)


def add_legend(axes):
    """One entry a name, above the axes; nothing where nothing has a name."""
    entries = {name: handle for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    if entries:
        style = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 4, "frameon": False, "fontsize": 9}
        axes.legend(entries.values(), entries.keys(), **style)


def finish(axes, consolidated, drawn, title, xlabel, notes):
    """Add axis text, legend, title, subtitle and footnotes; return the figure."""
    figure, results = axes.figure, consolidated["results"]
    axes.set_xlabel(xlabel)
    add_legend(axes)
    missing = [label(r) for r in results if r.get("status") == "ok" and r not in drawn]
    notes = [*notes, f"Not measured: {', '.join(missing)}." if missing else "", noise_sentences(consolidated)[1] or ""]
    bad = [r for r in results if r.get("status") != "ok"]
    notes += [f"{label(r)} - {r.get('status') or 'not run'}: {r.get('reason') or 'no reason recorded'}" for r in bad]
    frame, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    wrap = partial(textwrap.fill, width=int(13.5 * frame.width))
    above, below = ("\n".join(map(wrap, filter(None, texts))) for texts in (describe(consolidated), notes))
    place = frame.x0 / width  # the frame is in inches, texts are placed in fractions of the figure
    style = {"fontsize": 9, "linespacing": 1.3, "color": INK}
    figure.text(place, (frame.y0 - 0.12) / height, below, va="top", **style)
    subtitle = figure.text(place, (frame.y1 + 0.1) / height, above, va="bottom", **style).get_window_extent()
    figure.text(place, (subtitle.y1 / figure.dpi + 0.08) / height, title, va="bottom", fontsize=14, fontweight="bold")
    return figure
