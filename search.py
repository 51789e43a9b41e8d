"""Which stacks of techniques are worth measuring: the space, what a stack should give, the front, the choice.

Pure arithmetic on numbers that others measured. The space is a product of a few choices, one an axis, in the order in which
techniques combine. Each choice is measured alone, with the lean pass; a stack is estimated from its choices:
    loss         adds up: nats per token more than the untouched model's, as if the choices did not know of each other
    bytes        multiply: what is left of the weights after one choice is what the next one works on
    time a byte  multiplies likewise: how much faster or slower than under the lean pass alone a choice's bytes are read. What a
                 token takes beyond reading is not estimated: float32's noise alone is as long as a whole token in int8
    memory       the weights by the rule for bytes; the rest of the peak adds up
Estimates rank; they decide nothing. What is chosen in the end was measured whole (find.py).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

PRUNED = {"method": "calibrated"}
# axis -> its choices from mild to harsh: name -> steps. The first of an axis changes nothing.
AXES = {
    "heads": {
        "": [],
        "heads10": [("head_pruning", PRUNED | {"prune_ratio": 0.1})],
        "heads25": [("head_pruning", PRUNED | {"prune_ratio": 0.25})],
    },
    "width": {"": [], "width10": [("mlp_pruning", {"prune_ratio": 0.1})]},
    "weights": {
        "": [],
        "half": [("mixed_precision", {})],
        "int8": [("quantization", {})],
        "int4-7bit": [("int4", {"max_bits": 7.0})],
        "int4-6bit": [("int4", {"max_bits": 6.0})],
        "int4-4.6bit": [("int4", {"max_bits": 4.6})],
    },
    "cache": {"": [], "kv8": [("kv_cache_quant", {})]},
}
LEAN = [("lean_decode", {})]
WORTH_TRYING = 0.02  # of what a token reads: no timing on a busy machine tells less from nothing
# Cheap ones first: seconds; then minutes of rounding; then the minutes of calibration that pruning takes.
BY_EXPENSE = ("lean", "half", "int8", "kv8", "int4-7bit", "int4-6bit", "int4-4.6bit", "width10", "heads10", "heads25")


@dataclass(frozen=True)
class Limits:
    """What the recipe has to keep: a share of the baseline's perplexity, MB of peak memory, a decode speed-up; None: any."""

    min_retention: float
    max_memory_mb: float | None = None
    min_speedup: float | None = None

    def shortfalls(self, *, retention: float, memory_mb: float, speedup: float) -> dict[str, float]:
        """By how much each limit is missed, as a share of it; empty where all are kept."""
        missed = {"retention": 1 - retention / self.min_retention}
        if self.max_memory_mb is not None:
            missed["memory"] = memory_mb / self.max_memory_mb - 1
        if self.min_speedup is not None:
            missed["speed"] = 1 - speedup / self.min_speedup
        return {name: share for name, share in missed.items() if share > 0}

    @property
    def allowed_loss(self) -> float:
        """Nats per token: retention is exp(-loss)."""
        return -math.log(self.min_retention)


@dataclass(frozen=True)
class Single:
    """One choice measured alone, under the lean pass; `loss_low` is the lower end of the loss's interval, `tpot_ms` a token."""

    loss: float
    loss_low: float
    streamed_mb: float
    kv_mb: float
    weights_mb: float
    rest_mb: float
    tpot_ms: float

    @property
    def ms_per_mb(self) -> float:
        return self.tpot_ms / (self.streamed_mb + self.kv_mb)


@dataclass(frozen=True)
class Stack:
    """One estimated stack: the names of its choices by axis, and what it should give."""

    choices: tuple[str, ...]
    retention: float
    speedup: float
    memory_mb: float
    megabytes_per_token: float

    @property
    def name(self) -> str:
        return "+".join([*filter(None, self.choices), "lean"])


def steps_of(choices) -> list[tuple[str, dict]]:
    """The steps of a stack, the lean pass last; `choices` are names, one an axis, "" for nothing."""
    picked = [AXES[axis][name] for axis, name in zip(AXES, choices, strict=True)]
    return [*itertools.chain(*picked), *LEAN]


def alone(name: str) -> tuple[str, ...]:
    """The choices of a stack that has only `name` (or, for "lean", nothing) beside the lean pass."""
    return tuple(name if name in names else "" for names in AXES.values())


def hopeless(name: str, singles: dict[str, Single], limits: Limits) -> str | None:
    """The milder choice of the same axis, if there is one, whose own loss is too much already: `name` needs no measuring."""
    for names in AXES.values():
        if name in names:
            ladder = list(names)
            for milder in ladder[1 : ladder.index(name)]:
                if milder in singles and singles[milder].loss_low > limits.allowed_loss:
                    return milder
    return None


class Weights(NamedTuple):
    """How many weights of a Llama's matrices a token reads: of one query head, one attention, one MLP, and all of them."""

    head: int
    attention: int
    mlp: int
    streamed: int


def count_weights(config) -> Weights:
    """By the model's shape. A query head has rows of q_proj and columns of o_proj; a KV head as many of k_proj and v_proj."""
    head = 2 * config.hidden_size * config.head_dim
    attention = (config.num_attention_heads + config.num_key_value_heads) * head
    mlp = 3 * config.hidden_size * config.intermediate_size
    streamed = config.num_hidden_layers * (attention + mlp) + config.vocab_size * config.hidden_size
    return Weights(head, attention, mlp, streamed)


def prunable_weights(config) -> dict[str, int]:
    """Of one layer, how many weights go with all of what a technique may take a share of.

    A KV head goes with the last of its query heads: counted where each has one only.
    """
    weights, heads = count_weights(config), config.num_attention_heads
    own_kv_heads = config.num_key_value_heads == heads
    return {"head_pruning": weights.attention if own_kv_heads else heads * weights.head, "mlp_pruning": weights.mlp}


def pruned_share(name: str, config) -> float | None:
    """Share of the weights that a token reads which a choice takes away, by the model's shape; None if it prunes nothing."""
    technique, options = steps_of(alone(name))[0]
    prunable = prunable_weights(config)
    if technique not in prunable:
        return None
    return options["prune_ratio"] * config.num_hidden_layers * prunable[technique] / count_weights(config).streamed


def estimate(choices, singles: dict[str, Single], *, baseline_tpot_ms: float) -> Stack:
    """What the stack of `choices` should give, from what its choices gave alone (the module's docstring has the rules)."""
    lean, parts = singles["lean"], [singles[name] for name in choices if name]

    def added(field: str) -> float:
        return getattr(lean, field) + sum(getattr(part, field) - getattr(lean, field) for part in parts)

    def multiplied(field: str) -> float:
        return getattr(lean, field) * math.prod(getattr(part, field) / getattr(lean, field) for part in parts)

    megabytes = multiplied("streamed_mb") + multiplied("kv_mb")
    return Stack(
        choices=tuple(choices), retention=math.exp(-added("loss")),
        speedup=baseline_tpot_ms / (megabytes * multiplied("ms_per_mb")),
        memory_mb=multiplied("weights_mb") + added("rest_mb"), megabytes_per_token=megabytes,
    )  # fmt: skip


def all_stacks(singles: dict[str, Single], *, baseline_tpot_ms: float) -> list[Stack]:
    """Every stack whose choices were all measured alone, estimated."""
    known = [[name for name in names if not name or name in singles] for names in AXES.values()]
    return [estimate(choices, singles, baseline_tpot_ms=baseline_tpot_ms) for choices in itertools.product(*known)]


def front(rows: list, quantities) -> list:
    """The rows that no other row beats or equals in everything; `quantities(row)` gives numbers, more being better.

    Of rows that are equal in everything the first counts.
    """
    points = [tuple(quantities(row)) for row in rows]

    def beaten(place: int) -> bool:
        mine = points[place]
        return any(
            all(a >= b for a, b in zip(other, mine, strict=True)) and (other != mine or index < place)
            for index, other in enumerate(points)
            if index != place
        )

    return [row for place, row in enumerate(rows) if not beaten(place)]


def worth_measuring(stacks: list[Stack], limits: Limits) -> list[Stack]:
    """Up to four stacks to measure: the fastest that should keep the limits, at most two with the same weights, and last a
    safe one, the fastest of those that should lose half of what may be lost. Where none should keep them, the two nearest.
    """

    def missed(stack: Stack) -> float:
        values = {"retention": stack.retention, "memory_mb": stack.memory_mb, "speedup": stack.speedup}
        return sum(limits.shortfalls(**values).values())

    keeping = sorted((stack for stack in stacks if not missed(stack)), key=lambda stack: -stack.speedup)
    if not keeping:
        return sorted(stacks, key=lambda stack: (missed(stack), -stack.speedup))[:2]
    weights = list(AXES).index("weights")
    picked: list[Stack] = []
    for stack in keeping:
        alike = sum(stack.choices[weights] == other.choices[weights] for other in picked)
        if alike < 2 and len(picked) < 3:
            picked.append(stack)
    safe = [stack for stack in keeping if -math.log(stack.retention) <= limits.allowed_loss / 2 and stack not in picked]
    return [*picked, *safe[:1]]


def choose(records: list[dict], limits: Limits) -> tuple[dict | None, dict | None]:
    """(the fastest measured recipe that keeps the limits, None), or (None, the one that misses them by the least).

    A recipe's retention is the lower end of its interval; where there is none (too few windows), the figure itself.
    """
    judged = [(sum(missed(record, limits).values()), record) for record in records if _comparable(record)]
    keeping = [record for shortfall, record in judged if not shortfall]
    if keeping:
        return max(keeping, key=lambda record: record["speedup"]), None
    nearest = min(judged, key=lambda pair: (pair[0], -pair[1]["speedup"]), default=(0, None))
    return None, nearest[1]


def missed(record: dict, limits: Limits) -> dict[str, float]:
    """Limits that a measured record misses, each with its share."""
    interval = record["perplexity_retention_ci"]
    retention = interval[0] if interval else record["perplexity_retention"]
    return limits.shortfalls(retention=retention, memory_mb=record["peak_memory_mb"], speedup=record["speedup"])


def measured_front(records: list[dict]) -> list[dict]:
    """The measured recipes that none beats in speed, retention and memory together, the fastest first."""
    rows = [record for record in records if _comparable(record)]
    best = front(rows, lambda r: (r["speedup"], r["perplexity_retention"], -r["peak_memory_mb"]))
    return sorted(best, key=lambda record: -record["speedup"])


def _comparable(record: dict) -> bool:
    keys = ("speedup", "perplexity_retention", "peak_memory_mb")
    return record["status"] == "ok" and all(record[key] is not None for key in keys)
