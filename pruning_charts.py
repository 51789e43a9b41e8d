"""Charts that have a results file of their own: what pruning costs at equal bytes, and where in the model rounding hurts."""

import math

from matplotlib.colors import LogNorm

from axis_charts import COLOURS, MARKERS
from chart_parts import finish, new_axes
from readings import amount, baseline_of, interval, number

# (technique, its `what`) -> how the kind is called
KINDS = {
    ("head_pruning", None): "query heads, the rest refitted",
    ("mlp_pruning", None): "MLP width, the rest refitted",
    ("layer_pruning", "attention"): "attention sublayers",
    ("layer_pruning", "blocks"): "whole blocks",
}


LOWEST = 70  # % of retention: what lies below would squeeze the kinds that keep something


def equal_bytes(content):
    """Retention against the share of a token's bytes removed, one line a kind of pruning; None without a point."""
    baseline = baseline_of(content)
    dense, perplexity = number(baseline, "bytes_per_token"), number(baseline, "perplexity")
    lines, drawn = {}, [baseline]
    for record in content["results"]:
        kept, streamed = number(record, "perplexity_retention"), number(record, "bytes_per_token")
        if record.get("status") == "ok" and record.get("steps") and None not in (kept, streamed, dense):
            step = record["steps"][0]
            kind = KINDS.get((step["technique"], step["options"].get("what")), step["technique"])
            ends = interval(record, "perplexity_retention_ci")
            lines.setdefault(kind, []).append((100 * (1 - streamed / dense), 100 * kept, [100 * end for end in ends or ()]))
            drawn.append(record)
    if not lines:
        return None
    axes = new_axes(5, width=9)[0]
    axes.grid(axis="y", color="#DDDDDD")
    axes.plot(0, 100, "s", color="black", markersize=8, label="baseline")
    for place, (kind, points) in enumerate(lines.items()):
        gone, kept, ends = zip(*sorted(points), strict=True)
        colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
        axes.plot([0, *gone], [100, *kept], color=colour, linewidth=1.5)
        axes.plot(gone, kept, marker, color=colour, markeredgecolor="black", markersize=8, label=kind)
        for x, each in zip(gone, kept, strict=True):
            if each < LOWEST:  # the line goes on below the axis
                axes.annotate(
                    f"{each:.0f} %", (x, LOWEST), (0, 22), textcoords="offset points", ha="center", fontsize=9,
                    arrowprops={"arrowstyle": "-|>", "color": colour},
                )  # fmt: skip
        for x, pair in zip(gone, ends, strict=True):
            if pair:
                axes.plot([x, x], pair, color=colour, linewidth=3, alpha=0.6)
    axes.set_ylabel("perplexity retention in % (higher is better)")
    axes.set_xlim(left=-0.3)
    lowest = min(kept for points in lines.values() for _, kept, _ in points)
    axes.set_ylim(max(LOWEST, lowest - 2), 102)
    notes = [
        "Vertical lines are intervals (95 %) of the retention. Retention = perplexity of the baseline / perplexity.",
        f"An arrow points to a retention below {LOWEST} %.",
    ]
    if perplexity:
        notes.append(f"The baseline's perplexity is {amount(perplexity, 2)}; it streams {amount(dense / 1e6)} MB a token.")
    xlabel = "share of the bytes a decoded token streams that was removed, in %"
    return finish(axes, content, drawn, "Which kind of pruning pays: quality at equal bytes", xlabel, notes)


def sensitivity(content):
    """A map, layers across and kinds of linear layer down, of what rounding each alone costs; None without a figure."""
    rows = {kind.removesuffix("_proj"): costs for kind, costs in (content.get("costs") or {}).items()}
    if content.get("heads"):
        rows["a quarter of\nthe heads"] = content["heads"]
    table = [[cost if isinstance(cost, int | float) and cost > 0 else math.nan for cost in costs] for costs in rows.values()]
    known = [cost for costs in table for cost in costs if not math.isnan(cost)]
    rounding = [cost for costs in table[: len(content.get("costs") or {})] for cost in costs if not math.isnan(cost)]
    if not rounding:
        return None
    width = max(7, 0.32 * len(table[0]))
    axes = new_axes(0.45 * len(table), width=width)[0]
    axes.grid(visible=False)
    axes.set_facecolor("white")
    # Cividis keeps its order of lightness under colour-vision deficiencies and in print.
    image = axes.imshow(table, aspect="auto", cmap="cividis", norm=LogNorm(min(known), max(known)), interpolation="nearest")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xticks(range(0, len(table[0]), 1 if len(table[0]) <= 24 else 2))
    worst = max(rounding)
    for row, costs in enumerate(table):
        for layer, cost in enumerate(costs):
            if cost == worst:
                axes.text(layer, row, "x", ha="center", va="center", fontsize=9, fontweight="bold")
    scale = axes.figure.colorbar(image, cax=axes.figure.add_axes([1.02, 0, 0.12 / width * 1.6, 1]))
    scale.ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    scale.set_label("nats per token, log scale\n(lower is better)", fontsize=9)
    head, total = number(content, "lm_head"), sum(rounding)
    notes = [
        f"Each linear layer alone rounded to nearest int4 in groups of {content.get('group_size')}: increase of the loss, "
        "estimated from gradients on calibration text.",
        f"x marks the dearest layer ({amount(worst, 4)} nats per token); all rounded cells together are {amount(total, 3)}.",
    ]
    notes += [f"lm_head, not in the map: {amount(head, 4)} nats per token."] if head is not None else []
    if content.get("heads"):
        notes.append(
            "Heads: a quarter of one layer's query heads, to the nearest whole one, removed and the others refitted; "
            "KL divergence, not rounding."
        )
    title = "Where rounding to int4 hurts"
    return finish(axes, content, content["results"], title, "decoder layer, the first is 0", notes)
