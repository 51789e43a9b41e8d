"""Reading results: questions to consolidated_results.json, and numbers as tables and charts write them."""

import json
import math
from pathlib import Path

RANDOM = "random weights: speed, memory and size only"
MACHINE = {"threads": "{} threads", "cores": "{} cores", "ram_gb": "{:.0f} GB RAM", "os": "{}"}
MACHINE |= {"torch": "torch {}", "transformers": "transformers {}", "time": "{:.10}"}
WORKLOAD = {"prompt_tokens": "{} prompt tokens", "new_tokens": "{} new tokens", "depth": "depth {}"}
WORKLOAD |= {"batch_size": "batch size {}", "repeats": "{} repeats"}


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
    return _finite((record or {}).get(key))


def _finite(value):
    return value if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None


def interval(record, key):
    """(low, high), or None where either end is missing."""
    ends = tuple(map(_finite, (record or {}).get(key) or ()))
    return ends if len(ends) == 2 and None not in ends else None


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


def share(kept, ends=None):
    """A retention of 0.9754 as 97.54 %, with its interval where there is one."""
    return f"{100 * kept:.2f} %" + (f" [{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]" if ends else "")


def describe(consolidated):
    """Model, machine and workload as three lines; what is unknown is left out."""
    env, work = consolidated.get("environment") or {}, consolidated.get("workload") or {}
    exam = work.get("quality") or {}
    first = baseline_of(consolidated) or consolidated["results"][0]
    gpu = env.get("gpu") if first.get("device") == "cuda" else None
    is_random = any(record.get("random_weights") for record in consolidated["results"])
    model = [first.get("model") or "model not recorded", first.get("dtype"), is_random and RANDOM]
    machine = [f"{first.get('device') or 'device'}: {gpu or env.get('cpu') or 'not recorded'}", gpu and env.get("cpu")]
    # The newest of its vector units: two CPUs of one name may differ by these.
    machine += [([env.get("vector_capability"), *(env.get("cpu_features") or [])][-1] or "").upper().replace("_", "-")]
    machine += [form.format(env[key]) for key, form in MACHINE.items() if env.get(key)]
    timed = any(number(record, "prefill_tokens_per_s") for record in consolidated["results"])
    workload = [form.format(work[key]) for key, form in WORKLOAD.items() if timed and work.get(key) is not None]
    if exam.get("windows"):
        workload.append(f"quality on {exam['windows']} x {exam.get('window')} tokens of {exam.get('text') or 'text'}")
    return [", ".join(str(part) for part in line if part) for line in (model, machine, workload)]


def noise_sentences(consolidated):
    """(sentence or None, warning or None): how far the baseline differs from itself."""
    aa = consolidated.get("aa") or {}
    kinds = [("decode", ""), ("prefill", "prefill_")]
    known = [f"{name} {times(*speedup(aa, {}, kind))}" for name, kind in kinds if speedup(aa, {}, kind)[0]]
    sentence = f"Noise floor, the baseline against itself: {', '.join(known)}." if known else None
    ends = [end for _, kind in kinds for end in interval(aa, f"{kind}speedup_ci") or ()]
    floor = max((abs(end - 1) for end in ends), default=0)
    warning = f"Untrustworthy run: the baseline differs from itself. Speed differences up to {floor:.0%} mean nothing here."
    return sentence, warning if aa.get("trustworthy") is False else None
