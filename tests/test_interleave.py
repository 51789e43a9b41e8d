"""Comparing two sides: the order of blocks, how often the verdict is right, when it stops. No test sleeps."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

import interleave
from interleave import Ratio, summarise
from measurement import Measurement, Side
from worker import RecipeError

QUANTITY = "decode_tokens_per_s"


def block(log, name, speed=100.0):
    """A block that notes its turn in `log` and reads `speed`."""

    def run():
        log.append(name)
        return {QUANTITY: speed}

    return run


def simulated_ratios(rng, *, true_ratio, pairs, noise=0.02, drift=0.10):
    """Readings as a drifting machine gives them: both blocks of a pair share the drift, each has its own noise."""
    shared = 100 * np.exp(rng.normal(0, drift, pairs))
    baseline = shared * (1 + rng.normal(0, noise, pairs))
    variant = true_ratio * shared * (1 + rng.normal(0, noise, pairs))
    return list(variant / baseline)


def test_each_pair_runs_both_sides_once():
    """Whatever the order within a pair, neighbours share the machine's state: A B or B A, never A A."""
    for seed in range(20):
        log = []
        interleave.interleave(block(log, "A"), block(log, "B"), pairs=6, seed=seed)
        assert len(log) == 12
        assert all({log[i], log[i + 1]} == {"A", "B"} for i in range(0, 12, 2))


def test_order_is_random_and_balanced_over_seeds():
    """Going first is neither side's privilege: about half of all pairs begin with either, and seeds differ."""
    orders = []
    for seed in range(100):
        log = []
        interleave.interleave(block(log, "A"), block(log, "B"), pairs=8, seed=seed)
        orders.append("".join(log[::2]))
    share = np.mean([letter == "A" for letter in "".join(orders)])
    assert 0.45 < share < 0.55  # 800 fair coins: standard deviation 0.018
    assert len(set(orders)) > 12  # of the 16 that four balanced pairs of pairs allow
    assert {order[i : i + 2].count("A") for order in orders for i in (0, 2, 4, 6)} == {1}, "each side leads one of two pairs"
    again = []
    interleave.interleave(block(again, "A"), block(again, "B"), pairs=8, seed=3)
    assert "".join(again[::2]) == orders[3]


def test_readings_stay_with_their_side():
    """The ratio is variant over baseline whichever block of a pair ran first."""
    log = []
    comparison = interleave.interleave(block(log, "A", 100), block(log, "B", 150), pairs=9)
    assert {log[0], log[2], log[4], log[6], log[8]} == {"A", "B"}, "this seed must mix the orders to test anything"
    assert comparison.ratio(QUANTITY).median == pytest.approx(1.5)
    assert comparison.ratio(QUANTITY).verdict == "faster"
    assert comparison.ratio("absent") is None


@pytest.mark.parametrize("pairs", [8, 12])
def test_a_difference_of_five_percent_is_told_apart(pairs):
    """With 2 % noise a true ratio of 1.05 is called faster in at least four of five runs, and never slower."""
    verdicts = [
        summarise(simulated_ratios(np.random.default_rng(seed), true_ratio=1.05, pairs=pairs)).verdict for seed in range(300)
    ]
    assert verdicts.count("faster") >= 0.8 * len(verdicts)
    assert verdicts.count("slower") == 0


@pytest.mark.parametrize("pairs", [8, 12])
def test_equal_sides_are_rarely_called_different(pairs):
    """False verdicts: one in twenty is the promise, 7 % what 300 seeds allow it to look like."""
    verdicts = [
        summarise(simulated_ratios(np.random.default_rng(seed), true_ratio=1.0, pairs=pairs)).verdict for seed in range(300)
    ]
    false = len(verdicts) - verdicts.count("no difference resolved")
    assert false <= 0.05 * len(verdicts), f"{false} of {len(verdicts)}"


def test_stopping_early_does_not_raise_false_verdicts():
    """Looking after each pair and stopping when the interval is narrow is looking often: equal sides of the default run
    (seven pairs, 2 % precision, at most fifteen pairs) are still rarely called different."""
    false, runs = 0, 200
    for seed in range(runs):
        rng = np.random.default_rng(1000 + seed)
        stop_at = iter([False] * 10 + [True] * 100)  # the budget, in pairs

        def side(rng=rng):
            return {QUANTITY: 100 * (1 + rng.normal(0, 0.02))}

        clock = SimpleNamespace(monotonic=lambda stop_at=stop_at: 100.0 if next(stop_at) else 0.0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(interleave, "time", clock)
            comparison = interleave.interleave(side, side, pairs=7, seed=seed, precision=0.02, budget_s=50)
        false += comparison.ratio(QUANTITY).verdict != "no difference resolved"
    assert false <= 0.06 * runs, f"{false} of {runs}"


def test_drift_shared_by_a_pair_cancels():
    """A machine that halves its speed during the run changes both blocks of a pair, so no ratio moves."""
    speeds = itertools.chain.from_iterable((speed, speed) for speed in np.linspace(100, 50, 10))
    comparison = interleave.interleave(*(2 * [lambda: {QUANTITY: float(next(speeds))}]), pairs=10)
    assert comparison.ratio(QUANTITY).interval == [1.0, 1.0]
    assert comparison.ratio(QUANTITY).verdict == "no difference resolved"


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_too_few_pairs_decide_nothing(count):
    """Below six pairs [min, max] misses the median too often: a median, but no interval and no verdict."""
    ratio = summarise([2.0] * count)
    assert ratio.median == 2.0
    assert ratio.interval is None and ratio.verdict is None and ratio.half_width == float("inf")


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ([1.01, 1.2], "faster"),
        ([0.8, 0.99], "slower"),
        ([0.9, 1.1], "no difference resolved"),
        ([1.0, 1.1], "no difference resolved"),
    ],
)
def test_verdict_follows_the_interval(interval, verdict):
    """An interval that touches 1 decides nothing."""
    assert Ratio(1.0, interval).verdict == verdict


def test_half_width_is_relative_to_the_median():
    """The smallest difference that could have been resolved: [1.9, 2.1] around 2 is 5 %."""
    assert Ratio(2.0, [1.9, 2.1]).half_width == pytest.approx(0.05)


class Clock:
    """Stands in for the `time` module; each block takes `step` seconds of it."""

    def __init__(self, step):
        self.now, self.step = 0.0, step

    def monotonic(self):
        return self.now

    def block(self, readings):
        def run():
            self.now += self.step
            return {QUANTITY: next(readings)}

        return run


def noisy(seed, noise):
    rng = np.random.default_rng(seed)
    return iter(lambda: float(100 * (1 + rng.normal(0, noise))), None)


def test_budget_ends_a_run_that_stays_imprecise(monkeypatch):
    """Readings too noisy for the precision asked for: pairs go on past the minimum, and stop when time is spent."""
    clock = Clock(step=1.0)
    monkeypatch.setattr(interleave, "time", SimpleNamespace(monotonic=clock.monotonic))
    comparison = interleave.interleave(
        clock.block(noisy(1, 0.3)), clock.block(noisy(2, 0.3)), pairs=5, precision=0.001, budget_s=30
    )
    assert len(comparison.baseline) == 15  # two blocks of a second each a pair


def test_precision_ends_a_run_before_its_budget(monkeypatch):
    """The run stops at the first pair whose interval is narrow enough, and not before the least number of pairs."""
    clock = Clock(step=1.0)
    monkeypatch.setattr(interleave, "time", SimpleNamespace(monotonic=clock.monotonic))
    comparison = interleave.interleave(
        clock.block(noisy(1, 0.02)), clock.block(noisy(2, 0.02)), pairs=5, precision=0.01, budget_s=10_000
    )
    done = len(comparison.baseline)
    assert comparison.ratio(QUANTITY).half_width <= 0.01
    assert 5 <= done < 500
    ratios = [v[QUANTITY] / b[QUANTITY] for b, v in zip(comparison.baseline, comparison.variant, strict=True)]
    assert all(summarise(ratios[:n]).half_width > 0.01 for n in range(5, done))


def test_the_least_number_of_pairs_is_run_whatever_the_budget(monkeypatch):
    """A budget of nothing does not take away the pairs that an interval needs."""
    clock = Clock(step=1.0)
    monkeypatch.setattr(interleave, "time", SimpleNamespace(monotonic=clock.monotonic))
    comparison = interleave.interleave(
        clock.block(noisy(1, 0.3)), clock.block(noisy(2, 0.3)), pairs=6, precision=0.001, budget_s=0
    )
    assert len(comparison.baseline) == 6


def test_without_precision_exactly_the_pairs_asked_for():
    """And `progress` is told after each pair."""
    log, told = [], []
    interleave.interleave(block(log, "A"), block(log, "B"), pairs=3, progress=told.append)
    assert told == [1, 2, 3]


def test_either_side_may_end_a_comparison_and_is_named(monkeypatch):
    """The kernel takes the largest process first, which is the baseline's: its end is not the recipe's fault."""
    side = Side(None)
    monkeypatch.setattr(side, "_call", lambda *_, **__: (_ for _ in ()).throw(RecipeError("oom", "was killed")))
    with pytest.raises(RecipeError, match=r"^was killed$"):
        side.call("block")
    side.blame = "the baseline beside it: "
    with pytest.raises(RecipeError, match=r"^the baseline beside it: was killed$") as stopped:
        side.call("block")
    assert stopped.value.status == "oom"


def test_an_axis_point_that_fails_costs_no_finished_result():
    """Memory for the largest batch is short: the points before it stay, and the record says why there are no more."""

    class Point:
        def call(self, _command, depth, batch_size):
            if batch_size > 1:
                raise RecipeError("oom", "no room")
            return {"rates": {"decode_tokens_per_s": 5.0 + depth / 512, "prefill_tokens_per_s": 1.0}, "kv_cache_mb": 1.0}

    measurement = Measurement.__new__(Measurement)
    measurement.args, measurement.baseline_side = SimpleNamespace(axes=[(512, 1), (0, 4), (512, 4)], seed=0), Point()
    record = {"name": "a", "notes": ["one"]}
    points = measurement._measure_axes(record, Point())
    assert [(point["depth"], point["batch_size"]) for point in points] == [(512, 1)] and points[0]["speedup_ci"] == [1, 1]
    assert record["notes"][1] == "depth 0, batch 4 and what comes after it were not measured: no room"
