"""Other engines beside ours: the pipe, the record, a peer that is missing or dies, the chart. No peer is installed here."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import records
from benchmark import Workload
from peers import build_models, chart, compare, contenders, rounds, standalone
from peers.contenders import PEERS, PeerJob, PeerProcess
from store import validate
from worker import RecipeError

FAKE = """
import os, sys
from peers import serving

class Fake:
    def import_library(self):
        print("a library that writes on stdout")
        return "1.0"
    def load(self, *, model, quantization, threads, prompt_ids, new_tokens):
        self.tokens = new_tokens
        if quantization == "int4":
            raise serving.Unsupported("no 4-bit weights here")
        return {"settings": {"threads": threads}, "parameters": len(prompt_ids)}
    def block(self):
        print("more of it")
        held = b"x" * 100_000_000
        if os.path.exists("DIES"):
            os.kill(os.getpid(), 11)
        return {"prefill_s": 0.5, "ttft_s": 0.6, "decode_s": 0.1, "tokens": self.tokens}

serving.serve(Fake())
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A job whose peer is the fake script, in a copy of the repository's layout; its model is there already."""
    for peer in ("openvino", "ctranslate2"):
        script = tmp_path / "peers" / f"{peer}_peer.py"
        script.parent.mkdir(exist_ok=True)
        script.write_text(FAKE.replace("DIES", str(tmp_path / "dies")), encoding="utf-8")
    root = contenders.ROOT
    monkeypatch.setattr(contenders, "_environment", lambda: {"PYTHONPATH": str(root)})
    monkeypatch.setattr(contenders, "ROOT", tmp_path)
    for name in ("openvino-int8", "ctranslate2-int8"):
        (tmp_path / "models" / name).mkdir(parents=True)
    (tmp_path / "models" / "openvino-int8" / "weights.bin").write_bytes(bytes(1000))
    workload = Workload(prompt_tokens=8, new_tokens=3, repeats=2)
    return PeerJob(PEERS["openvino_int8"], Path(sys.executable), tmp_path / "models", 1, workload, list(range(8)))


def test_a_peer_answers_over_the_pipe_whatever_it_prints(job):
    process = PeerProcess(job)
    try:
        loaded = process.call("load")
        assert process.version == "1.0" and loaded["settings"] == {"threads": 1}
        assert loaded["model_size_mb"] == pytest.approx(0.001) and loaded["load_s"] >= 0
        block = process.call("block")
        assert block["decode_tokens_per_s"] == pytest.approx(2 / 0.1), "the first token belongs to prefill"
        assert block["prefill_tokens_per_s"] == pytest.approx(8 / 0.5) and block["ttft_ms"] == pytest.approx(600)
        peak_mb = process.call("memory")["peak_memory_mb"]
        if sys.platform != "linux" or not os.access("/proc/self/clear_refs", os.W_OK):
            assert peak_mb is None
        else:
            assert 90 < peak_mb < 130, "what a block takes beyond what was there when the library had been imported"
    finally:
        process.close()
    assert process._process.returncode == 0


def test_measured_alone_it_gives_a_valid_record(job):
    record = contenders.new_record(job.peer, "python peers/openvino_peer.py")
    validate(record)
    standalone.measure(record, job)
    validate(record)
    assert record["status"] == "ok" and len(record["samples"]["decode_tokens_per_s"]) == 2
    assert record["random_weights"] and record["perplexity"] is None and record["evidence"]["version"] == "1.0"


@pytest.mark.parametrize(
    ("change", "status", "reason"),
    [
        ({"python": Path("/nowhere/python")}, "unsupported", "--peers-python"),
        ({"peer": PEERS["ctranslate2_int4"]}, "unsupported", "no 4-bit weights here"),
        ({"peer": PEERS["llama_cpp_q8_0"]}, "failed", "exit code"),  # its script is not there
        ({"peer": PEERS["openvino_int4"]}, "failed", "could not be built"),  # nor is the one that builds this model
    ],
)
def test_what_cannot_run_is_recorded_with_its_reason(job, change, status, reason):
    record = contenders.new_record(PEERS["openvino_int8"], None)
    standalone.measure(record, replace(job, **change))
    validate(record)
    assert record["status"] == status and reason in record["reason"]


def test_a_missing_library_is_unsupported(job, tmp_path):
    script = tmp_path / "peers" / "openvino_peer.py"
    script.write_text(FAKE.replace('return "1.0"', "import a_package_nobody_has"), encoding="utf-8")
    with pytest.raises(RecipeError, match="a_package_nobody_has") as caught:
        PeerProcess(job)
    assert caught.value.status == "unsupported"


def test_a_crash_names_the_signal(job, tmp_path):
    record = contenders.new_record(job.peer, None)
    (tmp_path / "dies").touch()
    standalone.measure(record, job)
    assert record["status"] == "failed" and "SIGSEGV" in record["reason"]


def test_the_command_names_no_place_of_this_machine():
    flags = ["-r", "9", "--peers-python", "/home/me/bin/python", "--model-dir=/data", "--seed", "1"]
    assert standalone.repro("peers/compare.py", flags) == "python peers/compare.py -r 9 --seed 1"


def test_too_few_tokens_are_no_result():
    reply = {"tokens": 2, "prefill_s": 1.0, "ttft_s": 1.0, "decode_s": 1.0}
    with pytest.raises(RecipeError, match="2 tokens were generated, 3"):
        contenders.rates(reply, Workload(new_tokens=3))


def test_every_peer_has_a_model_that_can_be_built():
    assert {peer.model for peer in PEERS.values()} <= {*build_models.BUILDERS, "ctranslate2-int8"}
    assert {rounds.bits_by_name(name) for name in ("int8", "int4_g64", "bf16", "mixed_precision", "half+kv8")} == {4, 8, 16}


@pytest.mark.parametrize(
    "flags",
    [
        ["--peers", "vllm"],
        ["--recipes", "magic"],
        ["--recipes", "int8_dynamic"],
        ["--repeats", "0"],
        ["-p", "2000", "-n", "100"],
    ],
)
def test_bad_arguments_end_in_one_sentence(flags, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        compare.main([*flags, "-o", str(tmp_path)])
    said = capsys.readouterr().err.strip()
    assert caught.value.code == 2 and said.count("\n") == 0 and {"-p": "--prompt-tokens"}.get(flags[0], flags[0]) in said


def finished(name, title, decode, engine=None):
    record = records.new_record(
        name=name, title=title, status="ok", model="tinyllama-random", device="cpu", random_weights=True
    )
    record |= {"steps": [], "decode_tokens_per_s": decode, "prefill_tokens_per_s": 10 * decode, "speedup": decode / 5}
    record |= {
        "evidence": {"engine": engine} if engine else {},
        "prefill_speedup": decode / 5,
        "speedup_ci": [decode / 6, decode / 4],
    }
    return record | {"samples": {"decode_tokens_per_s": [decode - 1, decode, decode + 1], "prefill_tokens_per_s": []}}


def test_the_chart_is_drawn_and_names_what_failed(tmp_path):
    missing = finished("ctranslate2_int4", "CTranslate2 int4", 1) | {"status": "unsupported", "reason": "no 4-bit weights"}
    results = [finished("baseline", "Ours: baseline (fp32)", 5), finished("int8", "Ours: int8", 20)]
    results += [finished("llama_cpp_q8_0", "llama.cpp Q8_0", 15, "llama_cpp"), missing]
    bits = {"baseline": 32, "int8": 8, "llama_cpp_q8_0": 8}
    environment = {"cpu": "Imaginary 9000", "threads": 2, "cores": 2}
    content = {
        "environment": environment,
        "workload": {"prompt_tokens": 128, "new_tokens": 32},
        "bits": bits,
        "results": results,
    }
    path = chart.draw(content, tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG")
    figure = chart.panels(content, chart.by_width(results[:3], bits))
    said = " ".join(text.get_text() for text in figure.texts)
    assert "Imaginary 9000, 2 threads" in " ".join(said.split()) and "no 4-bit weights" in said and "random weights" in said
    assert chart.draw(content | {"results": [missing]}, tmp_path) is None and not path.exists()


class FakeSide:
    """A contender of a given decode speed, and its square in prefill, in place of a process."""

    def __init__(self, speed, streamed_bytes=4e9):
        self.speed, self.streamed_bytes, self.version = speed, streamed_bytes, "1.0"

    def load(self):
        return self.call("load")

    def call(self, command):
        if command == "block" and self.speed < 0:
            raise RecipeError("failed", "it ended")
        loaded = {"parameters": 1, "load_peak_memory_mb": 1.0}
        memory = {"peak_memory_mb": 1.0, "kv_cache_mb": 0.0, "bytes_per_token": self.streamed_bytes}
        block = {"decode_tokens_per_s": self.speed, "prefill_tokens_per_s": self.speed**2, "ttft_ms": 1.0, "tpot_ms": 1.0}
        return {"load": loaded, "block": block, "memory": memory}[command]

    def close(self):
        pass


def test_rounds_compare_within_a_group_and_survive_a_failure(tmp_path, monkeypatch):
    sides = {"baseline": FakeSide(5.0), "int8": FakeSide(20.0, 1.1e9), "llama_cpp_q8_0": FakeSide(16.0)}
    sides |= {"ctranslate2_int8": FakeSide(10.0), "openvino_int8": FakeSide(-1.0)}
    monkeypatch.setattr(rounds, "SETTLE_S", 0)
    monkeypatch.setattr(rounds.Turns, "_process", lambda self, name: sides[name])
    monkeypatch.setattr(rounds.Turns, "_short_of_memory", lambda self, name: False)
    args = standalone.build_parser("").parse_args(["-o", str(tmp_path)])
    args.repeats, args.workload, args.bandwidth_gb_per_s = 6, Workload(repeats=6), 20.0
    comparison = rounds.Turns(args, tmp_path)
    comparison.run(["int8", "ctranslate2_int8", "llama_cpp_q8_0", "openvino_int8"])
    content = compare.gather(comparison, {"cpu": "Imaginary 9000"})
    compare.write(content, tmp_path)
    statuses = {record["name"]: record["status"] for record in content["results"]}
    assert statuses == dict.fromkeys(sides, "ok") | {"openvino_int8": "failed"}
    int8 = comparison.records["int8"]
    assert (int8["speedup"], int8["prefill_speedup"], content["aa"]["trustworthy"]) == (4, 16, True)
    saved = json.loads((tmp_path / "peers_results.json").read_text(encoding="utf-8"))
    assert len(saved["results"]) == 5 and (tmp_path / "visualizations" / "peers.png").exists()
    decode, prefill = saved["best"]
    assert {decode["bits"], prefill["bits"]} == {8} and {decode["ours"], prefill["ours"]} == {"int8"}
    assert {decode["peer"], prefill["peer"]} == {"llama_cpp_q8_0"}, "the faster of two"
    assert (decode["ratio"], prefill["ratio"]) == pytest.approx((1.25, 1.5625)) and decode["verdict"] == "faster"


def test_what_was_measured_outlives_the_baseline(tmp_path, monkeypatch):
    """It ends in the second group: the first is kept, everything else has a reason."""
    baseline = FakeSide(5.0)
    monkeypatch.setattr(rounds, "SETTLE_S", 0)
    monkeypatch.setattr(rounds.Turns, "_process", lambda self, name: baseline if name == "baseline" else FakeSide(20.0))
    monkeypatch.setattr(rounds.Turns, "_short_of_memory", lambda self, name: False)
    finish = rounds.Turns._finish

    def finish_then_end(self, name):
        finish(self, name)
        baseline.speed = -1.0

    monkeypatch.setattr(rounds.Turns, "_finish", finish_then_end)
    args = standalone.build_parser("").parse_args(["-o", str(tmp_path)])
    args.repeats, args.workload, args.bandwidth_gb_per_s = 6, Workload(repeats=6), 20.0
    comparison = rounds.Turns(args, tmp_path)
    comparison.run(["int4+lean", "int8", "mixed_precision"])
    statuses = {name: record["status"] for name, record in comparison.records.items()}
    assert statuses == {"baseline": "failed", "int4+lean": "ok", "int8": "failed", "mixed_precision": "failed"}
    assert "the baseline, which its rounds need" in comparison.records["mixed_precision"]["reason"]
    compare.write(compare.gather(comparison, {"cpu": "Imaginary 9000"}), tmp_path)


def test_weights_of_another_seed_have_a_folder_of_their_own(tmp_path):
    assert build_models.folder_of(tmp_path, 0) == tmp_path
    assert build_models.folder_of(tmp_path, 3) == tmp_path / "seed-3"
