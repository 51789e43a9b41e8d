"""Charts over context depth and batch size, from the points that `-d 0,512,1536 -b 1,8` adds to each record."""

from chart_parts import finish, new_axes
from readings import amount, baseline_of, interval, label, number

MARKERS = "osD^vP*X<>"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def depth_speed(consolidated, records):
    """Decode speed-up against tokens in the cache, at the main batch size; names where a recipe overtakes the baseline.

    Not tokens per second: those of two recipes were read minutes apart, their speed-ups each in turns with the baseline.
    """
    batch_size = number(consolidated.get("workload"), "batch_size") or 1
    lines = {id(r): _speedups(consolidated, r, batch_size) for r in records}
    records = [r for r in records if len(lines[id(r)]) > 1]
    if not records:
        return None
    axes = new_axes(4)[0]
    axes.axhline(1, color="black", linestyle="--", label="baseline")
    for place, record in enumerate(records):
        points = [(depth, *speed) for depth, speed in sorted(lines[id(record)].items()) if speed[0] is not None]
        _line(axes, place, [point[:2] for point in points], _with_cache_dtype(record))
        for depth, _, ends in points:
            if ends:
                axes.plot([depth, depth], ends, color=COLOURS[place % len(COLOURS)], linewidth=2)
    axes.set_ylabel("decode speed-up over the baseline (higher is better)")
    axes.set_ylim(bottom=0)
    notes = ["Vertical lines are intervals (99 %); a point without one has too few pairs."]
    for record in filter(_has_cache_technique, records):
        ours = _intervals(lines[id(record)])
        name, theirs = "the baseline", dict.fromkeys(ours, (1.0, 1.0))
        if rival := next((r for r in records if r.get("steps") == _without_cache_technique(record)), None):
            name, theirs = label(rival), _intervals(lines[id(rival)])
        notes.append(
            _seen_by_depth(label(record), name, {depth: (theirs[depth], ours[depth]) for depth in ours if depth in theirs})
        )
    drawn = [*records, baseline_of(consolidated)]
    title, xlabel = "Decode speed-up by context depth", "tokens before the prompt"
    return finish(axes, _without(consolidated, "depth"), drawn, title, xlabel, notes)


def cache_memory(consolidated, records):
    """KV-cache memory against depth x batch size, for every recipe whose cache differs from the baseline's."""
    chosen = [r for r in records if any(p["kv_cache_mb"] != p["baseline_kv_cache_mb"] for p in r.get("axes") or [])]
    if not any(map(_has_cache_technique, chosen)):
        return None
    axes = new_axes(4)[0]
    prompt = sum(number(consolidated.get("workload"), key) or 0 for key in ("prompt_tokens", "new_tokens"))

    main = {key: number(consolidated.get("workload"), key) or least for key, least in (("depth", 0), ("batch_size", 1))}
    main |= {"baseline_kv_cache_mb": number(baseline_of(consolidated), "kv_cache_mb")}

    def cache(record, key="kv_cache_mb"):
        points = [*record["axes"], main | {"kv_cache_mb": number(record, "kv_cache_mb")}]
        return tuple(sorted(((p["depth"] + prompt) * p["batch_size"], p[key]) for p in points if p[key] is not None))

    reference = cache(max(chosen, key=lambda r: len(r["axes"])), "baseline_kv_cache_mb")
    axes.plot(*zip(*reference, strict=True), "k--", marker=".", label="baseline")
    names = {}  # of recipes whose caches are the same: lines on top of each other could not be told apart
    for record in chosen:
        names.setdefault(cache(record), []).append(_with_cache_dtype(record))
    for place, (points, labels) in enumerate(names.items()):
        _line(axes, place, points, "; ".join(labels))
    axes.set_ylabel("KV cache in MB (lower is better)")
    weights = number(baseline_of(consolidated), "weights_mb")
    per_token = reference[-1][1] / reference[-1][0]
    notes = (
        [f"The baseline's cache would outgrow its weights ({amount(weights)} MB) at {amount(weights / per_token)} tokens."]
        if weights
        else []
    )
    title = "KV-cache memory by tokens held"
    measured = [r for r in records if r.get("axes")]
    same = [label(r) for r in measured if r not in chosen]
    notes += [f"The same cache as the baseline: {', '.join(same)}."] if same else []
    drawn = [*measured, baseline_of(consolidated)]
    varied = _without(consolidated, "depth", "batch_size")
    return finish(axes, varied, drawn, title, "(depth + prompt + new tokens) x batch size", notes)


def _without(consolidated, *varied):
    """The same, its workload without what the chart itself varies: the lines above a chart say what all its points share."""
    kept = {key: value for key, value in (consolidated.get("workload") or {}).items() if key not in varied}
    return consolidated | {"workload": kept}


def _with_cache_dtype(record):
    """The recipe's name, and what the lean pass keeps keys and values in where no other step decides it."""
    kept = [step["options"].get("kv_dtype") for step in record.get("steps") or [] if step["technique"] == "lean_decode"]
    return label(record) + (f" ({kept[0]} cache)" if any(kept) and not _has_cache_technique(record) else "")


def _has_cache_technique(record):
    return any(step["technique"] == "kv_cache_quant" for step in record.get("steps") or [])


def _without_cache_technique(record):
    return [step for step in record.get("steps") or [] if step["technique"] != "kv_cache_quant"]


def _line(axes, place, points, name):
    style = {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)], "label": name}
    axes.plot(*zip(*points, strict=True), **style)


def _speedups(consolidated, record, batch_size):
    """depth -> (speed-up over the baseline, its interval or None) at this batch size, the main workload's point included."""
    points = [p for p in record.get("axes") or [] if p["batch_size"] == batch_size]
    main = {"depth": number(consolidated.get("workload"), "depth") or 0, **record}
    return {p["depth"]: (number(p, "speedup"), interval(p, "speedup_ci")) for p in [main, *points]}


def _intervals(speedups):
    return {depth: ends for depth, (_, ends) in speedups.items()}


def _seen_by_depth(name, rival, speedups):
    """At which depths the recipe is seen to be faster or slower than the same without its cache technique.

    `speedups` depth -> (the rival's interval, its own).
    """
    depths: dict[str, list[str]] = {"faster": [], "slower": [], "not told apart": [], "too few pairs to tell": []}
    for depth, (theirs, ours) in sorted(speedups.items()):
        if theirs is None or ours is None:
            word = "too few pairs to tell"
        else:
            word = "faster" if ours[0] > theirs[1] else "slower" if ours[1] < theirs[0] else "not told apart"
        depths[word].append(str(depth))
    found = "; ".join(f"{word} at {', '.join(places)}" for word, places in depths.items() if places)
    return f"{name}, beside {rival}, by depth: {found}."
