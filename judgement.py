"""What the readings mean: ratios with their intervals, ceilings, verdicts, and one plain sentence for each recipe."""

from __future__ import annotations

import math
import statistics

import interleave
import readings
from records import TARGETS

SPEED_QUANTITIES = ("decode_tokens_per_s", "prefill_tokens_per_s", "ttft_ms", "tpot_ms")
RETENTION_LEVELS = (0.97, 0.99, 0.999)  # the original's promise; MLPerf's two levels, applied to perplexity


def judge(record: dict, baseline: dict, comparison: interleave.Comparison) -> None:
    """Fill in the fields that compare `record` with `baseline`, and its verdicts."""
    if record["quality_protocol"] != baseline["quality_protocol"]:
        raise ValueError(f"{record['name']} and the baseline were scored by different protocols: not comparable")
    fill_ratios(record, comparison)
    record["ceiling_speedup"] = baseline["bytes_per_token"] / record["bytes_per_token"]
    record["retention_verdicts"] = retention_verdicts(record["perplexity_retention_ci"])
    record["targets_met"] = judge_targets(record, baseline)
    record["explanation"] = explain(record)
    if record["explanation"] and record["speculation"]:
        record["explanation"] += f"; {explain_drafts(record['speculation'])}"


def fill_ratios(record: dict, comparison: interleave.Comparison) -> None:
    """Speed-ups over the baseline, pair by pair, with their intervals and verdicts."""
    decode, prefill = comparison.ratio("decode_tokens_per_s"), comparison.ratio("prefill_tokens_per_s")
    if decode is not None:
        record.update(speedup=decode.median, speedup_ci=decode.interval, verdict=decode.verdict)
        record["smallest_resolved"] = decode.half_width if decode.interval else None
    record.update(prefill_speedup=prefill.median, prefill_speedup_ci=prefill.interval, prefill_verdict=prefill.verdict)


def fill_medians(record: dict, samples: list[dict]) -> None:
    """The raw samples of each speed quantity, and their medians."""
    record["samples"] = {key: [sample[key] for sample in samples if key in sample] for key in SPEED_QUANTITIES}
    for key, values in record["samples"].items():
        record[key] = statistics.median(values) if values else None


def explain_speed(record: dict, bandwidth_gb_per_s: float | None) -> None:
    """`mbu`, the share of read bandwidth used, and `overhead_ms`, what a token takes beyond reading its bytes."""
    if record["tpot_ms"] and bandwidth_gb_per_s:
        reading_ms = record["bytes_per_token"] / (bandwidth_gb_per_s * 1e9) * 1e3
        record["mbu"] = reading_ms / record["tpot_ms"]
        record["overhead_ms"] = record["tpot_ms"] - reading_ms


def judge_targets(record: dict, baseline: dict) -> dict:
    """Pass (True), miss (False) or not measured (None) for each promise of the original, and for all three at once.

    Quality passes only if the lower bound of its interval does; two windows have no interval, and there the value counts.
    """
    memory = _ratio(record["peak_memory_mb"], baseline["peak_memory_mb"])
    interval = record["perplexity_retention_ci"]
    retention = interval[0] if interval else record["perplexity_retention"]
    met = {
        "speed": None if record["speedup"] is None else record["speedup"] >= TARGETS["decode_speedup"],
        "memory": None if memory is None else memory - 1 <= TARGETS["memory_change"],
        "quality": None if retention is None else retention >= TARGETS["perplexity_retention"],
    }
    if False in met.values():
        return met | {"all": False}
    return met | {"all": None if None in met.values() else True}


def retention_verdicts(interval: list[float] | None) -> dict | None:
    """For each level: `kept` or `lost` where the whole interval says so, else `not resolved`."""
    if interval is None:
        return None
    low, high = interval
    return {
        f"{level:.1%}": "kept" if low >= level else "lost" if high < level else "not resolved" for level in RETENTION_LEVELS
    }


def noise_floor(comparison: interleave.Comparison) -> dict:
    """The A/A entry: ratios of the baseline against itself; trustworthy if neither interval excludes 1."""
    decode, prefill = comparison.ratio("decode_tokens_per_s"), comparison.ratio("prefill_tokens_per_s")
    excluded = [ratio.verdict in ("faster", "slower") for ratio in (decode, prefill) if ratio is not None]
    return {
        "speedup": decode and decode.median, "speedup_ci": decode and decode.interval, "prefill_speedup": prefill.median,
        "prefill_speedup_ci": prefill.interval, "pairs": len(comparison.baseline), "trustworthy": not any(excluded),
    }  # fmt: skip


def noisier(one: dict, other: dict) -> dict:
    """Which of two A/A entries says less for its run: the one that is not trustworthy, else the one with the wider interval."""

    def doubt(aa: dict) -> tuple[bool, float]:
        low, high = aa["speedup_ci"] or aa["prefill_speedup_ci"] or (0.0, math.inf)
        return not aa["trustworthy"], high - low

    return max(one, other, key=doubt)


def explain(record: dict) -> str | None:
    """One sentence on why the speed-up is what it is; None where decode was not measured. Fills in `captured`."""
    if record["speedup"] is None:
        return None
    ceiling = record["ceiling_speedup"]
    if ceiling > 1.005:
        record["captured"] = (record["speedup"] - 1) / (ceiling - 1)
    streamed_mb = record["bytes_per_token"] / 1e6
    sentence = f"{record['speedup']:.2f}x, where its bytes alone ({streamed_mb:.0f} MB a token) give {ceiling:.2f}x"
    if record["mbu"] is None:
        return sentence
    reason = " (the baseline leaves more of the bandwidth unused)" if record["speedup"] > ceiling else ""
    sentence = f"{sentence}{reason}; it uses {record['mbu']:.0%} of the measured read bandwidth"
    if record["overhead_ms"] <= 0:
        return f"{sentence}, which was measured at a bad moment"
    spent = f"{record['overhead_ms']:.1f} of its {record['tpot_ms']:.1f} ms a token"
    return f"{sentence}; {spent} go elsewhere (arithmetic, Python, attention)"


def explain_drafts(speculation: dict) -> str:
    """How often drafts were right and what that gave, for each kind of prompts."""
    parts = []
    for kind, figures in speculation.items():
        rate = "nothing drafted" if figures["acceptance_rate"] is None else f"{figures['acceptance_rate']:.0%} accepted"
        parts.append(f"{kind}: {rate}, {figures['tokens_per_pass']:.2f} tokens a pass, {figures['speedup']:.2f}x")
    return f"drafts against plain decoding of the same recipe: {'; '.join(parts)}"


def one_line(record: dict) -> str:
    """The line printed when a recipe is done."""
    parts = [f"peak {record['peak_memory_mb']:.0f} MB"]
    if record["decode_tokens_per_s"]:
        parts.insert(0, f"decode {record['decode_tokens_per_s']:.1f} tokens/s")
    if record["speedup_ci"]:
        parts.insert(1, readings.times(record["speedup"], record["speedup_ci"]))
    if record["perplexity"]:
        parts.append(f"perplexity {record['perplexity']:.2f} ({record['perplexity_retention']:.2%} kept)")
    return f"{record['name']}: " + ", ".join(parts)


def _ratio(value: float | None, baseline: float | None) -> float | None:
    return value / baseline if value and baseline else None
