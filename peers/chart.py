"""The chart of a comparison: decode and prefill side by side, ours and the peers' in one list. Reads JSON, measures nothing.

python -m peers.chart results/peers        # draw again from peers_results.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

from chart_parts import BLUE, GREY, ORANGE, finish, rows_of
from charts import STYLE, write
from readings import amount, interval, noise_sentences, number, times

PANELS = (("decode", "decode_tokens_per_s", ""), ("prefill", "prefill_tokens_per_s", "prefill_"))
LOOKS = {"float32 baseline": (GREY, "//"), "ours": (BLUE, ""), "peer": (ORANGE, "xx")}


def draw(content: dict, folder: Path) -> Path | None:
    """folder/visualizations/peers.png; None, and a stale picture is deleted, where nothing was measured."""
    shown = [record for record in content["results"] if record["status"] == "ok"]
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE}):
        figure = panels(content, by_width(shown, content.get("bits") or {})) if shown else None
        return next(iter(write(folder, "peers", figure, content)), None)


def by_width(shown: list[dict], bits: dict) -> list[dict]:
    """The baseline first, then 16, 8 and 4 bits; within a width ours before the peers."""
    return sorted(shown, key=lambda record: (record["name"] != "baseline", -(bits.get(record["name"]) or 0), kind_of(record)))


def kind_of(record: dict) -> str:
    if record["name"] == "baseline":
        return "float32 baseline"
    return "peer" if (record.get("evidence") or {}).get("engine") else "ours"


def panels(content: dict, shown: list[dict]):
    """Two panels of bars on shared rows; black lines are the slowest and the fastest round."""
    both = rows_of(shown, shown[0], panels=2)
    for axes, (kind, key, prefix) in zip(both, PANELS, strict=True):
        for row, record in enumerate(shown):
            value = number(record, key)
            if value is None:
                axes.text(0, row, " not measured", va="center", fontsize=9)
                continue
            colour, hatch = LOOKS[kind_of(record)]
            axes.barh(row, value, 0.62, color=colour, hatch=hatch, edgecolor="black", label=kind_of(record))
            samples = [sample for sample in (record.get("samples") or {}).get(key) or () if sample is not None]
            right = max([value, *samples])
            if len(samples) > 1:
                axes.plot([min(samples), right], [row, row], "k|-", markersize=8)
            factor = number(record, f"{prefix}speedup")
            change = f" ({times(factor, interval(record, f'{prefix}speedup_ci'))})" if factor and row else ""
            axes.text(right, row, f" {amount(value)}{change}", va="center", fontsize=8)
        axes.set_xlabel(f"{kind}, tokens per second (higher is better)")
        axes.set_xlim(left=0, right=1.6 * axes.get_xlim()[1])
    notes = [
        "Factors: ratios of the same rounds to the float32 baseline, with interval (99 %). "
        "Black line: slowest and fastest round."
    ]
    notes += ["Peers as their authors ship them, all in the same run, one process at a time; "
              "first token counted with prefill."]  # fmt: skip
    notes += [noise_sentences(content)[0] or ""]
    xlabel = f"{PANELS[1][0]}, tokens per second (higher is better)"
    return finish(both[1], content, shown, "Our recipes and other engines, same machine, same run", xlabel, notes)


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "results/peers")
    print(draw(json.loads((target / "peers_results.json").read_text(encoding="utf-8")), target))
