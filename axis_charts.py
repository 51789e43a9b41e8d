"""Charts over context depth and batch size, from the points that `-d 0,512,1536 -b 1,8` adds to each record."""

from chart_parts import finish, new_axes
from report import amount, baseline_of, label, number

MARKERS = "osD^vP*X<>"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def depth_speed(consolidated, records):
    """Decode speed against tokens in the cache, at the main batch size; names where a recipe overtakes the baseline."""
    batch_size = number(consolidated.get("workload"), "batch_size") or 1
    lines = {id(r): _by_depth(consolidated, r, batch_size) for r in records}
    records = [r for r in records if len(lines[id(r)]) > 1]
    if not records:
        return None
    axes = new_axes(4)[0]
    longest = max(records, key=lambda r: len(lines[id(r)]))
    reference = [(depth, base) for depth, (base, _) in lines[id(longest)].items() if base is not None]
    axes.plot(*zip(*reference, strict=True), "k--", marker=".", label="baseline")
    for place, record in enumerate(records):
        points = [(depth, speed) for depth, (_, speed) in lines[id(record)].items() if speed is not None]
        _line(axes, place, points, label(record))
    axes.set_ylabel("decode tokens per second (higher is better)")
    axes.set_ylim(bottom=0)
    notes = [
        _crossover(label(r), lines[id(r)])
        for r in records
        if any(s["technique"] == "kv_cache_quant" for s in r.get("steps") or [])
    ]
    return finish(
        axes,
        consolidated,
        [*records, baseline_of(consolidated)],
        "Decode speed by context depth",
        "tokens before the prompt",
        notes,
    )


def cache_memory(consolidated, records):
    """KV-cache memory against depth x batch size, for every recipe whose cache differs from the baseline's."""
    chosen = [r for r in records if r.get("axes") and any(s["technique"] == "kv_cache_quant" for s in r.get("steps") or [])]
    if not chosen:
        return None
    axes = new_axes(4)[0]
    prompt = sum(number(consolidated.get("workload"), key) or 0 for key in ("prompt_tokens", "new_tokens"))
    tokens = [(p["depth"] + prompt) * p["batch_size"] for p in chosen[0]["axes"]]
    reference = sorted(zip(tokens, (p["baseline_kv_cache_mb"] for p in chosen[0]["axes"]), strict=True))
    axes.plot(*zip(*reference, strict=True), "k--", marker=".", label="baseline")
    for place, record in enumerate(chosen):
        _line(axes, place, sorted(zip(tokens, (p["kv_cache_mb"] for p in record["axes"]), strict=True)), label(record))
    axes.set_ylabel("KV cache in MB (lower is better)")
    weights = number(baseline_of(consolidated), "weights_mb")
    per_token = reference[-1][1] / reference[-1][0]
    notes = (
        [f"The baseline's cache would outgrow its weights ({amount(weights)} MB) at {amount(weights / per_token)} tokens."]
        if weights
        else []
    )
    title = "KV-cache memory by tokens held"
    return finish(
        axes, consolidated, [*chosen, baseline_of(consolidated)], title, "(depth + prompt + new tokens) x batch size", notes
    )


def _line(axes, place, points, name):
    style = {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)], "label": name}
    axes.plot(*zip(*points, strict=True), **style)


def _by_depth(consolidated, record, batch_size):
    """depth -> (baseline, variant) tokens per second at the main batch size, the main workload's point included."""
    depth = number(consolidated.get("workload"), "depth") or 0
    speeds = [number(one, "decode_tokens_per_s") for one in (baseline_of(consolidated), record)]
    main = {depth: tuple(speeds)}
    points = [point for point in record.get("axes") or [] if point["batch_size"] == batch_size]
    others = {p["depth"]: (p["baseline_decode_tokens_per_s"], p["decode_tokens_per_s"]) for p in points}
    return dict(sorted((main | others).items()))


def _crossover(name, line):
    faster = [depth for depth, (base, speed) in line.items() if base and speed and speed >= base]
    deepest = max(line)
    if not faster:
        return f"{name}: no crossover up to a depth of {deepest}: slower than the baseline's cache throughout."
    return f"{name}: at least as fast as the baseline's cache from a depth of {min(faster)} on (measured up to {deepest})."
