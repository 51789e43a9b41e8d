"""Two runs side by side: overlapping intervals pass, contradicting ones and different experiments are named."""

from __future__ import annotations

import copy
import json

import pytest

import compare_runs


def run_with(speedup: float, ends: list[float]) -> dict:
    record = {"name": "int8", "title": "Int8", "model": "m", "device": "cpu", "speedup": speedup, "speedup_ci": ends}
    return {"workload": {"prompt_tokens": 8}, "results": [{"name": "baseline", "model": "m", "device": "cpu"}, record]}


def written(tmp_path, name: str, content: dict) -> str:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "consolidated_results.json").write_text(json.dumps(content))
    return str(folder)


@pytest.mark.parametrize(("ends", "code"), [([1.9, 2.2], 0), ([2.1, 2.3], 0), ([2.11, 2.3], 1)])
def test_exit_code_says_whether_intervals_overlap(tmp_path, capsys, ends, code):
    folders = written(tmp_path, "a", run_with(2.0, [1.9, 2.1])), written(tmp_path, "b", run_with(2.2, ends))
    assert compare_runs.main(list(folders)) == code
    assert f"{1 - code} of 1 pairs" in capsys.readouterr().out


def test_different_experiments_are_not_compared(tmp_path, capsys):
    first = run_with(2.0, [1.9, 2.1])
    second = copy.deepcopy(first) | {"workload": {"prompt_tokens": 9}}
    with pytest.raises(SystemExit) as caught:
        compare_runs.main([written(tmp_path, "a", first), written(tmp_path, "b", second)])
    assert caught.value.code == 2 and "workloads differ" in capsys.readouterr().err


def test_a_run_without_intervals_does_not_pass(tmp_path, capsys):
    """And nothing is said of intervals that are apart: there are none."""
    first = run_with(2.0, [])
    with pytest.raises(SystemExit) as stopped:
        compare_runs.main([written(tmp_path, "a", first), written(tmp_path, "b", first)])
    assert stopped.value.code == 2 and "no recipe has an interval in both runs" in capsys.readouterr().err
