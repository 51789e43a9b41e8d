"""The results folder: what is kept, skipped, moved aside and refused."""

from __future__ import annotations

import csv
import json
import tomllib
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import pytest
import torch

import experiment
import judgement
import models
import records
from benchmark import Workload
from interleave import Comparison
from store import ResultsFolder

HEAD = {"environment": {"cpu": "x"}, "workload": {"prompt_tokens": 1}, "identity": {"model": "tiny"}}
STEPS = [{"technique": "head_pruning", "options": {"prune_ratio": 0.25}}]


def a_record(name="head_pruning", **fields):
    known = {"title": name, "status": "ok", "steps": STEPS, "model": "tiny", "device": "cpu", "random_weights": False}
    return records.new_record(name=name, **(known | fields))


def opened(folder, **changes):
    store = ResultsFolder(folder, **(HEAD | changes))
    store.close()
    return store


def test_schema_lists_exactly_the_keys_of_the_contract():
    schema = json.loads((records.Path(records.__file__).parent / "record.schema.json").read_text())
    assert set(schema["properties"]) == set(schema["required"]) == set(records.RECORD_KEYS)


@pytest.mark.parametrize("broken", [{"status": "fine"}, {"status": "failed"}, {"speedup_ci": [1.0]}, {"weights_mb": "many"}])
def test_a_record_that_breaks_the_schema_is_not_written(tmp_path, broken):
    """An unknown status, a failure without its reason, half an interval, text for a number."""
    with pytest.raises(jsonschema.ValidationError):
        opened(tmp_path).save(a_record(**broken))
    assert not list(tmp_path.glob("*_results.json"))


def test_what_other_scripts_keep_is_theirs(tmp_path):
    """A search that was stopped before any recipe was measured, or a curve: nothing of it is moved by the next run."""
    for name in ("find", "equal_bytes", "layer_costs"):
        (tmp_path / f"{name}_results.json").write_text("{}")
    (tmp_path / "int8_results.json").write_text("{}")
    store = opened(tmp_path)
    assert (tmp_path / "find_results.json").exists() and len(list(tmp_path.glob("*_results.json"))) == 3
    assert "were moved" in store.notice


@pytest.mark.parametrize(("earlier", "later", "kept"), [
    ((True, 0.9, 1.1), (True, 0.98, 1.02), 0), ((True, 0.9, 1.1), (False, 1.01, 1.02), 1),
    ((False, 0.9, 0.99), (True, 0.5, 2.0), 0),
])  # fmt: skip
def test_the_worse_noise_floor_stands_over_old_and_new_results(earlier, later, kept):
    entries = [{"trustworthy": good, "speedup_ci": ends, "prefill_speedup_ci": ends} for good, *ends in (earlier, later)]
    assert judgement.noisier(*entries) is entries[kept]


def test_finished_recipes_are_found_again(tmp_path):
    opened(tmp_path).save(a_record())
    again = opened(tmp_path)
    assert again.finished("head_pruning", STEPS)
    assert not again.finished("head_pruning", [])
    assert not again.finished("other", STEPS)


def test_options_compare_as_files_hold_them(tmp_path):
    """A file keeps seven digits: asked for with more, a recipe would be measured again every time."""
    steps = records.resolved([("head_pruning", {"prune_ratio": 0.123456789})])
    opened(tmp_path).save(a_record(steps=steps))
    again = opened(tmp_path)
    assert again.records["head_pruning"]["steps"][0]["options"]["prune_ratio"] != 0.123456789
    assert again.finished("head_pruning", records.resolved([("head_pruning", {"prune_ratio": 0.123456789})]))


def test_a_repetition_that_came_to_nothing_replaces_nothing(tmp_path):
    """Ctrl-C or lack of memory while a finished recipe is measured once more."""
    store = opened(tmp_path)
    store.save(a_record(perplexity=9.5))
    store.save(a_record(status="interrupted", reason="the run ended here"))
    assert json.loads((tmp_path / "head_pruning_results.json").read_text())["perplexity"] == 9.5
    assert opened(tmp_path).finished("head_pruning", STEPS)
    store.save(a_record(perplexity=9.4))
    assert json.loads((tmp_path / "head_pruning_results.json").read_text())["perplexity"] == 9.4


def test_the_same_recipe_with_other_options_moves_the_finished_one(tmp_path):
    store = opened(tmp_path)
    store.save(a_record(perplexity=9.5))
    store.save(a_record(steps=[{"technique": "head_pruning", "options": {"prune_ratio": 0.1}}]))
    (moved,) = (tmp_path / "previous").glob("*/head_pruning_results.json")
    assert json.loads(moved.read_text())["perplexity"] == 9.5
    (now,) = json.loads((tmp_path / "consolidated_results.json").read_text())["results"]
    assert now["steps"][0]["options"] == {"prune_ratio": 0.1}


def test_failed_recipes_are_measured_again(tmp_path):
    opened(tmp_path).save(a_record(status="failed", reason="a reason"))
    assert not opened(tmp_path).finished("head_pruning", STEPS)


def test_an_edit_of_what_measures_is_other_code(tmp_path, monkeypatch):
    """Every package that a recipe runs through, C++ included; what only reads results is none of it."""
    monkeypatch.setattr(records, "__file__", str(tmp_path / "records.py"))
    settings = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = set(settings["packages"]) - {"peers"}
    files = ["records.py", "kernels/linear.cpp", "kernels/rows.h", *(f"{package}/some.py" for package in packages)]
    for file in [*files, "report.py"]:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("before")
    for file in files:
        before = records._code_sha256.__wrapped__()
        (tmp_path / file).write_text("after")
        assert records._code_sha256.__wrapped__() != before, file
    before = records._code_sha256.__wrapped__()
    (tmp_path / "report.py").write_text("after")
    assert records._code_sha256.__wrapped__() == before


@pytest.mark.parametrize("changes", [{"identity": {"model": "another"}}, {"resume": False}])
def test_results_of_another_experiment_are_moved_not_mixed(tmp_path, changes):
    opened(tmp_path).save(a_record())
    store = opened(tmp_path, **changes)
    assert not store.records and "previous" in store.notice
    assert list((tmp_path / "previous").glob("*/head_pruning_results.json"))


@pytest.mark.parametrize("content", ["{ half a", "[]", "", '{"identity": {"model": "tiny"}, "results": [{"name": "x"}]}'])
def test_unreadable_results_do_not_stop_a_run(tmp_path, content):
    (tmp_path / "consolidated_results.json").write_text(content)
    assert opened(tmp_path).records == {}


def test_one_writer_at_a_time(tmp_path):
    first = ResultsFolder(tmp_path, **HEAD)
    with pytest.raises(ValueError, match=r"--results-dir.*another run is writing there"):
        ResultsFolder(tmp_path, **HEAD)
    first.close()
    opened(tmp_path)


def test_nan_and_infinity_become_null(tmp_path):
    opened(tmp_path).save(a_record(perplexity=float("inf"), delta_nll=float("nan")))
    saved = json.loads((tmp_path / "head_pruning_results.json").read_text())
    assert saved["perplexity"] is None and saved["delta_nll"] is None


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    records.save_json(tmp_path / "a.json", {"old": 1})
    monkeypatch.setattr(records.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        records.save_json(tmp_path / "a.json", {"new": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"old": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_csv_has_a_row_a_recipe(tmp_path):
    store = opened(tmp_path)
    store.save(a_record("baseline", steps=[], decode_tokens_per_s=10.0))
    store.save(a_record(speedup=1.5, speedup_ci=[1.4, 1.6]))
    rows = list(csv.DictReader((tmp_path / "consolidated_results.csv").open()))
    assert [row["name"] for row in rows] == ["baseline", "head_pruning"]
    assert (rows[0]["decode_tokens_per_s"], rows[1]["speedup_ci"], rows[1]["perplexity"]) == ("10.0", "1.4 1.6", "")


def test_targets_need_the_bound_not_the_point():
    """97.5 % retention with an interval from 96.5 % is a miss; without an interval the point decides."""
    baseline = a_record("baseline", peak_memory_mb=100.0)
    variant = a_record(speedup=1.6, peak_memory_mb=65.0, perplexity_retention=0.975, perplexity_retention_ci=[0.965, 0.985])
    assert judgement.judge_targets(variant, baseline) == {"speed": True, "memory": True, "quality": False, "all": False}
    variant["perplexity_retention_ci"] = None
    assert judgement.judge_targets(variant, baseline)["all"] is True
    variant["perplexity_retention"] = None
    assert judgement.judge_targets(variant, baseline) == {"speed": True, "memory": True, "quality": None, "all": None}


def test_retention_verdicts_use_the_interval():
    verdicts = judgement.retention_verdicts([0.975, 0.992])
    assert verdicts == {"97.0%": "kept", "99.0%": "not resolved", "99.9%": "lost"}


def test_noise_floor_that_excludes_one_is_not_trusted():
    def sides(factor):
        base = [{"decode_tokens_per_s": 10.0 + i / 100, "prefill_tokens_per_s": 5.0 + (i % 3)} for i in range(8)]
        return Comparison(base, [{key: value * factor for key, value in reading.items()} for reading in base])

    assert judgement.noise_floor(sides(1.0))["trustworthy"] is True
    assert judgement.noise_floor(sides(1.1))["trustworthy"] is False


def test_what_makes_another_experiment(tiny_folder, monkeypatch):
    """Machine, code, text, prompts, workload and model: a result of any other must not stand in the same table."""
    monkeypatch.delenv("TINYOPT_NO_KERNELS", raising=False)
    source, machine = models.find_model(str(tiny_folder)), dict.fromkeys(experiment.MACHINE, "a")
    flags = {"workload": Workload(), "axes": [], "precision": 0.02, "budget_s": 10.0, "torch_device": torch.device("cpu"),
             "source": source}  # fmt: skip

    def identity(environment=machine, text="a", prompts="a", **changed):
        prepared = SimpleNamespace(quality_protocol={"text_sha256": text}, sha256=prompts)
        return experiment.describe(SimpleNamespace(**flags | changed), prepared, environment)[1]

    same = identity()
    others = [identity(machine | {key: "b"}) for key in experiment.MACHINE]
    others += [identity(text="b"), identity(prompts="b"), identity(workload=Workload(new_tokens=5))]
    others += [identity(axes=[(9, 1)]), identity(precision=0.1), identity(budget_s=1.0)]
    weights = tiny_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    others.append(identity())
    monkeypatch.setenv("TINYOPT_NO_KERNELS", "1")
    others.append(identity())
    assert {"cpu", "cpu_features", "gpu", "threads", "torch", "transformers", "code_sha256"} < set(experiment.MACHINE)
    assert all(other != same for other in others) and others[-1] != others[-2]
