"""The search from flags to files: on made-up workers, where every outcome can be had, and once on a tiny model."""

import json
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from pipeline_model import QUICK_FLAGS, save_tiny_model
from transformers import LlamaConfig

import find
import run_optimization
import search
from benchmark import Workload
from search import Limits
from worker import RecipeError

# loss in nats, MB streamed, ms a token
FIGURES = {
    "baseline": (0.0, 400, 40), "lean": (0.0, 400, 25), "half": (0.0005, 200, 14), "int8": (0.004, 100, 9),
    "kv8": (0.001, 400, 25.5), "int4-7bit": (0.02, 75, 8), "int4-6bit": (0.04, 65, 7), "int4-4.6bit": (0.09, 55, 6),
    "width10": (0.012, 370, 23), "heads10": (0.01, 394, 26), "heads25": (0.05, 385, 27),
}  # fmt: skip


def steps_alone(name: str) -> list:
    """As a search that is not quick tries a choice alone."""
    briefly = {"int4": find.BRIEFLY | {"tune_steps": find.TUNE_STEPS.get(name, 0)}}
    return [(technique, options | briefly.get(technique, {})) for technique, options in search.steps_of(search.alone(name))]


NAMES = {json.dumps(steps_alone(name)): name for name in search.BY_EXPENSE} | {"[]": "baseline"}


@pytest.fixture
def asked(monkeypatch):
    """Names of the choices that workers were started for; what a name maps to in `asked.fail` is raised when it loads."""
    started = SimpleNamespace(names=[], fail={})

    class Worker:
        def __init__(self, job):
            self.name = NAMES[json.dumps(job.steps)]
            self.calibrated_s = {"int4-7bit": 300.0, "int4-6bit": 15.0}.get(self.name)
            started.names.append(self.name)
            assert self.name == "baseline" or job.deadline > time.time()

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def load(self):
            return self.call("load")

        def call(self, command, **arguments):
            loss, streamed, tpot_ms = FIGURES[self.name]
            if command == "load" and self.name in started.fail:
                raise started.fail[self.name]
            if command == "score_baseline":
                assert arguments["windows"].shape[1] == find.WINDOW
                find.Path(arguments["reference_file"]).touch()
            quality = {"delta_nll": loss, "delta_nll_ci": [loss - 0.0005, loss + 0.0005]}
            return {
                "load": {"evidence": {"streamed_bytes": streamed * 1e6}, "weights_mb": streamed, "apply_s": 2.0},
                "memory": {"kv_cache_mb": 2.0, "peak_memory_mb": streamed + 40.0},
                "block": {"tpot_ms": tpot_ms}, "score_baseline": quality, "score_variant": quality,
            }[command]  # fmt: skip

    monkeypatch.setattr(find, "WorkerProcess", Worker)
    monkeypatch.setattr(find.experiment, "check_steps", lambda *_: None)
    monkeypatch.setattr(find, "load_text", lambda part: SimpleNamespace(content="x" * 5000))
    return started


@pytest.fixture
def searching(tmp_path):
    """`searching(min_retention)` runs the first half of a search and returns the finder and what it picked."""
    config = LlamaConfig(vocab_size=100, hidden_size=64, intermediate_size=64, num_attention_heads=4, num_key_value_heads=4)
    args = SimpleNamespace(
        results_dir=str(tmp_path), resume=True, quick=False, dtype="auto", find_minutes=None, config=config, source="tiny",
        torch_device=torch.device("cpu"), threads=1, workload=Workload(), json=False,
    )  # fmt: skip
    identity = {"environment": {}, "workload": {}, "identity": {"code": 1}}
    store = SimpleNamespace(cache=tmp_path, consolidated=lambda: identity)

    def run(min_retention=0.97, **flags):
        measurement = SimpleNamespace(
            store=store, scratch=tmp_path, inputs=SimpleNamespace(input_ids=torch.ones(1, 8)), titles={},
            tokenizer=lambda text, **_: SimpleNamespace(input_ids=list(range(len(text)))),
        )  # fmt: skip
        finder = find.Finder(SimpleNamespace(**vars(args) | flags), Limits(min_retention))
        return finder, finder.choose_recipes(measurement), measurement

    return run


def test_choices_are_measured_once_and_the_best_stacks_picked(asked, searching, tmp_path):
    """The harshest int4 is skipped, for the milder one lost too much alone; the estimate adds and multiplies."""
    finder, picked, measurement = searching()
    assert asked.names == ["baseline", *(name for name in search.BY_EXPENSE if name != "int4-4.6bit")]
    assert "int4-7bit+lean" in picked and len(picked) == 4
    saved = json.loads((tmp_path / find.RESULTS).read_text())
    assert saved["alone"]["int4-4.6bit"]["status"] == "skipped" and saved["picked"] == list(picked)
    best = next(row for row in saved["estimates"] if row["name"] == "int4-7bit+lean")
    assert best["speedup"] == pytest.approx(5) and best["retention"] == pytest.approx(0.9802, abs=1e-4)
    assert measurement.deadline - finder.started == pytest.approx(find.MINUTES * 60) and set(measurement.titles) == set(picked)
    assert picked["int4-7bit+lean"] == [("int4", {"max_bits": 7.0, "tune_steps": 0} | find.BRIEFLY), ("lean_decode", {})]


def test_rounding_again_is_what_rounding_took_the_first_time(asked, searching):
    """Not what reading it from the cache took; and the first width was rounded for all of them."""
    finder, _, _ = searching(0.9)
    seconds = {name: finder._seconds_again(SimpleNamespace(choices=choices)) for name, choices in {
        "whole": (None, None, "int4-6bit", None), "pruned": (None, "width10", "int4-6bit", None),
        "int8": ("heads10", None, "int8", None), "half": (None, None, None, None),
    }.items()}  # fmt: skip
    assert seconds == {"whole": 0, "pruned": 300, "int8": 2, "half": 0}


def test_a_choice_that_fails_is_named(asked, searching, capsys):
    asked.fail = {"heads25": RecipeError("failed", "a bug in it")}
    finder, _, _ = searching()
    finder.conclude()
    assert "heads25 (a bug in it)" in capsys.readouterr().out and list(finder.failures()) == ["heads25"]


def test_what_would_hardly_be_seen_is_not_tried(asked, searching):
    """With two KV heads for eight query heads and wide layers, a tenth of the heads is a hundredth of the bytes."""
    shape = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8}
    finder, picked, _ = searching(config=LlamaConfig(vocab_size=100, intermediate_size=512, **shape))
    assert "heads10" not in asked.names and "width10" in asked.names and not any("heads10" in name for name in picked)
    assert finder.state["alone"]["heads10"]["reason"].startswith("takes 0.8% off")


def test_a_stopped_search_goes_on_where_it_was(asked, searching):
    """What ran out of time is named, and is all that the next search measures; other limits need other choices."""
    asked.fail = {"heads10": RecipeError("interrupted", "the time for it was over"), "heads25": RecipeError("oom", "killed")}
    finder, _, _ = searching()
    assert finder.state["alone"]["heads10"]["status"] == "interrupted"
    asked.names, asked.fail = [], {}
    searching()
    assert asked.names == ["heads10", "heads25"]
    asked.names = []
    searching(0.9)
    assert asked.names == ["int4-4.6bit"]
    asked.names = []
    searching(resume=False)
    assert len(asked.names) == 10


def test_without_lean_there_is_nothing_to_build_on(asked, searching, capsys):
    """Nothing is measured then, and what is said is not that the baseline is the best."""
    asked.fail = {"lean": RecipeError("interrupted", "the time for it was over")}
    finder, picked, _ = searching()
    assert picked == {} and asked.names == ["baseline", "lean"]
    finder.conclude()
    shown = capsys.readouterr().out
    assert "Nothing was measured to the end" in shown and "Not reached" in shown and "int4-7bit" in shown


def test_what_cannot_be_searched_is_not_called_unfinished(asked, searching, capsys, monkeypatch):
    """A model that the lean pass cannot serve will not be served by the same command a second time: so is the exit code."""
    asked.fail = {"lean": RecipeError("failed", "the lean forward pass computes silu, this model wants gelu")}
    finder, _, measurement = searching()
    finder.conclude()
    shown = capsys.readouterr().out
    assert "lean cannot be measured here (the lean forward pass" in shown and "Not reached" not in shown
    monkeypatch.setattr(find.experiment, "run", lambda *_, search, **__: (search(measurement), 0)[1])
    assert find.run(finder.args, finder.limits, parser=None) == 1


def test_a_pick_of_part_of_the_search_is_called_so():
    record = {"name": "a", "speedup": 2.0, "perplexity_retention": 0.99, "perplexity_retention_ci": None, "peak_memory_mb": 5.0}
    assert find._verdict(record, None, Limits(0.97), whole=False).startswith("Best of what was measured so far: a")
    assert "at least" not in find._verdict(record, None, Limits(0.97), whole=True)


def test_a_quick_search_leaves_out_what_takes_minutes(asked, searching, monkeypatch):
    nearest = [("int4", {"max_bits": 7.0, "rounding": "nearest"}), ("lean_decode", {})]
    monkeypatch.setitem(NAMES, json.dumps(nearest), "int4-7bit")
    monkeypatch.setitem(NAMES, json.dumps([("int4", nearest[0][1] | {"max_bits": 6.0}), nearest[1]]), "int4-6bit")
    _, picked, _ = searching(quick=True)
    assert not any("heads" in name or "width" in name for name in [*asked.names, *picked])
    assert picked["int4-7bit+lean"] == nearest


def test_the_command_repeats_the_run_without_the_search(monkeypatch):
    flags = ["--find", "--min-retention", "0.98", "--max-memory=200", "-m", "smollm2-135m", "--find-minutes=5", "--quick"]
    monkeypatch.setattr(sys, "argv", ["run_optimization.py", *flags])
    assert find.command([("int4", {"max_bits": 6.0}), ("lean_decode", {})]) == (
        "python run_optimization.py -m smollm2-135m --quick --stack 'int4:max_bits=6.0 + lean_decode'"
    )
    monkeypatch.setattr(sys, "argv", ["run_optimization.py", "--find", "--dtype", "bf16", "-m", "smollm2-135m"])
    assert find.command([]) == "python baseline.py -m smollm2-135m"
    stack = "mixed_precision:dtype=bf16 + lean_decode"
    assert find.command(find.stacks.parse_stack(stack)).endswith(f"-m smollm2-135m --stack '{stack}'"), (
        "--dtype is refused there"
    )


def test_a_whole_search_on_a_tiny_model(tmp_path, monkeypatch, capsys):
    """From flags to the pick and its command, and once more with limits that nothing keeps; the second run measures nothing."""
    model = str(save_tiny_model(tmp_path / "model"))
    monkeypatch.setattr("bandwidth.READ_BYTES", 10_000_000)
    monkeypatch.setattr(search, "BY_EXPENSE", ("lean",))  # the whole space takes minutes even here
    monkeypatch.setattr(search, "AXES", {axis: {"": []} for axis in search.AXES})
    flags = ["-m", model, "-t", "1", *QUICK_FLAGS, "-o", str(tmp_path / "out"), "--find"]
    monkeypatch.setattr(sys, "argv", ["run_optimization.py", *flags])
    assert run_optimization.main([*flags, "--min-retention", "0.5"]) == 0
    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / find.RESULTS).read_text())
    assert found["pick"] in ("lean", "baseline") and "Best recipe for this machine" in shown
    assert found["command"] in " ".join(shown.split()) and found["not_reached"] == []
    assert set(found["alone"]) == {"baseline", "lean"} and found["picked"] == ["lean"]
    measured = json.loads((tmp_path / "out" / "consolidated_results.json").read_text())["results"]
    assert {record["name"] for record in measured} == {"baseline", *found["picked"]}
    assert all("--stack" in record["repro"] for record in measured if record["steps"])
    monkeypatch.setattr("worker.WorkerProcess.__init__", lambda *_: pytest.fail("measured again"))
    assert run_optimization.main([*flags, "--min-retention", "0.5", "--min-speedup", "1000"]) == 0
    assert "No measured recipe keeps the limits. Nearest is" in capsys.readouterr().out
