"""The pipeline under faults: really killed, filled, corrupted. What was finished must survive; the next run completes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pipeline_model import save_tiny_model

pytestmark = pytest.mark.faults

ROOT = Path(__file__).parent.parent
PRUNE = {"head_pruning": [["head_pruning", {}]]}
CACHE = {"kv_cache_int8": [["kv_cache_quant", {}]]}


def faulty(kind: str) -> dict:
    return {kind: [["tests.faulty_techniques", {"kind": kind}]]}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def start(model: Path, recipes: dict, results: Path, *flags: str) -> subprocess.Popen:
    command = [sys.executable, "tests/pipeline_model.py", str(model), json.dumps(recipes), "-o", str(results), *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TINYOPT_NO_KERNELS": "1"}
    environment["TINYOPT_TEST_SLOW"] = str(results / "slow.begun")
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=_deliver_interrupts,
    )  # fmt: skip


def _deliver_interrupts() -> None:
    """What runs in the background of a shell ignores SIGINT, and its children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run(model: Path, recipes: dict, results: Path, *flags: str) -> tuple[int, str]:
    process = start(model, recipes, results, *flags)
    out, err = process.communicate(timeout=120)
    return process.returncode, out + err


def wait_for(path: Path, process: subprocess.Popen, timeout_s: float = 90) -> None:
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)


def record(results: Path, name: str) -> dict:
    return json.loads((results / f"{name}_results.json").read_text())


def all_json_is_whole(results: Path) -> None:
    for path in results.glob("*.json"):
        json.loads(path.read_text())


def test_a_failing_recipe_is_recorded_and_the_others_go_on(model, tmp_path):
    """Killed worker, no memory, NaN, a bug, no support: each has its status and reason, and the last recipe is measured.

    The folder holds half a JSON of who knows what, which is moved aside.
    """
    left = "{ half a"
    (tmp_path / "consolidated_results.json").write_text(left)
    kinds = ["killed", "out of memory", "nan", "bug", "unsupported"]
    recipes = {name: steps for kind in kinds for name, steps in faulty(kind).items()} | CACHE
    code, output = run(model, recipes, tmp_path)
    assert code == 1, output
    statuses = {name: record(tmp_path, name)["status"] for name in [*kinds, "kv_cache_int8"]}
    expected = {"killed": "oom", "out of memory": "oom", "nan": "failed", "bug": "failed", "unsupported": "unsupported"}
    assert statuses == expected | {"kv_cache_int8": "ok"}, output
    assert "layers.1.mlp.down_proj" in record(tmp_path, "nan")["reason"]
    assert record(tmp_path, "unsupported")["reason"] == "this machine has no such thing"
    assert record(tmp_path, "nan")["decode_tokens_per_s"] is None
    moved = list((tmp_path / "previous").glob("*/consolidated_results.json"))
    assert [path.read_text() for path in moved] == [left]


def test_killed_pipeline_keeps_what_was_finished_and_resumes(model, tmp_path):
    """kill -9 of the parent while the second recipe runs: its workers notice and go, in the middle of a command that would
    take a minute more; the first recipe stays to the byte, and the next run measures only what is missing."""
    process = start(model, PRUNE | faulty("slow"), tmp_path)
    wait_for(tmp_path / "slow.begun", process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    wait_for_the_end_of_group(process.pid)
    finished = (tmp_path / "head_pruning_results.json").read_bytes()
    all_json_is_whole(tmp_path)
    code, output = run(model, PRUNE | CACHE, tmp_path)
    assert code == 0, output
    assert "already measured here, kept: head_pruning" in output
    assert (tmp_path / "head_pruning_results.json").read_bytes() == finished
    assert record(tmp_path, "kv_cache_int8")["status"] == "ok"
    assert not list(tmp_path.glob(".scratch-*"))


def wait_for_the_end_of_group(group: int, timeout_s: float = 8) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.5)
    pytest.fail("workers outlived the pipeline")


def test_a_second_pipeline_is_refused_and_an_interrupt_keeps_results(model, tmp_path):
    """Two in one folder: the second gets one sentence and exit code 2, the first is not disturbed. Ctrl-C ends it with 130."""
    process = start(model, PRUNE | faulty("slow"), tmp_path)
    wait_for(tmp_path / ".cache" / "read_bandwidth.json", process)
    code, output = run(model, CACHE, tmp_path)
    assert (code, "another run is writing there" in output) == (2, True), output
    wait_for(tmp_path / "slow.begun", process)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, out + err
    assert record(tmp_path, "head_pruning")["status"] == "ok"
    assert record(tmp_path, "slow")["status"] == "interrupted"


def test_full_disk_keeps_finished_results(model, tmp_path):
    """A file system of 300 kB fills up: exit code 1, and every JSON that is there is whole."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)], capture_output=True, check=False)
    if mount.returncode:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        filler = disk / "filler"
        filler.write_bytes(b"x" * 230_000)
        code, output = run(model, PRUNE | CACHE, disk)
        uncaught = 'pipeline_model.py", line'  # a worker's own traceback may be shown
        assert code == 1 and uncaught not in output, output
        all_json_is_whole(disk)
        with contextlib.suppress(OSError):
            filler.write_bytes(b"x" * 300_000)
        code, output = run(model, PRUNE, disk)
        assert code == 1 and uncaught not in output, "full before anything is measured"
        filler.unlink()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


def test_results_folder_that_is_a_file(model, tmp_path):
    (tmp_path / "taken").write_text("")
    code, output = run(model, CACHE, tmp_path / "taken")
    assert (code, "--results-dir" in output) == (2, True), output
