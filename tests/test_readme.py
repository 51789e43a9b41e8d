"""The README says what the committed results say, and names only files and commands that exist."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

import charts
import readings
import report
import run_optimization
import stacks
from store import validate

ROOT = Path(__file__).parent.parent
WHOLE = ["results", "results/tinyllama-random"]  # every recipe of the default list
FOLDERS = [*WHOLE, "results/xeon-amx-tinyllama-random", "results/epyc-avx2-tinyllama-random", "results/axes"]


@pytest.fixture(scope="module")
def committed_results():
    """Where the reader's own results took the place of these there is nothing to compare; new folders do not matter."""
    command = ["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no", "--", "results"]
    status = subprocess.run(command, capture_output=True, text=True, check=False)
    if status.returncode == 0 and status.stdout.strip():
        pytest.skip("results/ holds results of your own, not the committed ones")


@pytest.mark.usefixtures("committed_results")
def test_generated_parts_are_up_to_date():
    """Mend with: python report.py results results/*tinyllama-random --readme README.md"""
    assert report.update_readme(ROOT / "README.md", check=True) == []


@pytest.mark.usefixtures("committed_results")
@pytest.mark.parametrize("folder", FOLDERS)
def test_committed_charts_were_drawn_from_the_committed_numbers(folder):
    consolidated = readings.load_results(ROOT / folder)
    assert charts.stale(consolidated, ROOT / folder) == []
    assert (ROOT / folder / "visualizations" / "decode_speed.png").exists()


@pytest.mark.usefixtures("committed_results")
@pytest.mark.parametrize("chart", ["peers/peers", "epyc-avx2-peers/peers", "pruning/equal_bytes", "pruning/layer_costs"])
def test_committed_charts_with_a_file_of_their_own_too(chart):
    """Mend with: python -m peers.chart results/peers, or charts.draw_all_own("results/pruning")"""
    folder, name = (ROOT / "results" / chart).parent, chart.rpartition("/")[2]
    content = json.loads((folder / f"{name}_results.json").read_text(encoding="utf-8"))
    picture = folder / "visualizations" / f"{name.replace('layer_costs', 'sensitivity')}.png"
    assert charts.digest(content).encode() in picture.read_bytes()


@pytest.mark.usefixtures("committed_results")
@pytest.mark.parametrize("folder", FOLDERS)
def test_committed_results_are_whole(folder):
    """Every record keeps the schema, none failed, random weights carry no quality, an unsound A/A comparison is said."""
    consolidated = readings.load_results(ROOT / folder)
    for record in consolidated["results"]:
        validate(record)
        assert record["status"] in ("ok", "unsupported"), record["reason"]
        if record["random_weights"]:
            assert record["perplexity"] is None and record["continuations"] is None
    stacked = {record["name"] for record in consolidated["results"] if record["name"] == stacks.file_name(record["title"])}
    names = {record["name"] for record in consolidated["results"]} - stacked
    assert names <= {"baseline", *run_optimization.RECIPES}
    if folder in WHOLE:
        assert names >= {"baseline", *run_optimization.RECIPES} - run_optimization.ASKED_FOR
    warned = "untrustworthy" in report.markdown_table(consolidated).lower()
    assert warned is not consolidated["aa"]["trustworthy"], "a noise floor that excludes 1 is said above the table"
    assert consolidated["environment"]["dirty"] is False


@pytest.mark.usefixtures("committed_results")
def test_what_each_technique_promises_was_measured():
    """Retention by the lower end of its interval, sizes, speed on TinyLlama's shape, and the three targets at once."""
    real, shape = ({r["name"]: r for r in readings.load_results(ROOT / folder)["results"]} for folder in WHOLE)
    least = {"mixed_precision": 0.998, "int8": 0.993, "int8_weight_only": 0.993, "int8_dynamic": 0.96, "int4x6+lean": 0.969}
    kept = {name: real[name]["perplexity_retention_ci"][0] for name in least}
    assert all(kept[name] >= promise for name, promise in least.items()), kept
    cache = real["kv_cache_int8"]
    assert cache["kl_divergence"] <= 0.002 and cache["kv_cache_mb"] <= 0.3 * real["baseline"]["kv_cache_mb"]
    for records in (real, shape):
        assert records["int8"]["model_size_mb"] <= 0.3 * records["baseline"]["model_size_mb"]
    assert shape["mixed_precision"]["speedup"] >= 1.3 and shape["int8"]["speedup"] >= 2.0
    assert all(real["int8"]["targets_met"].values())


def test_every_script_and_picture_named_exists():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"python (\S+\.py)", readme)) | set(re.findall(r"!\[[^\]]*\]\(([^)]+)\)", readme))
    assert named and all((ROOT / name).exists() for name in named), sorted(named)
    assert "make run" in readme and "make test" in readme
