"""The peak of memory against allocations of known size."""

import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch

import devices
import memory
from devices import release_memory
from memory import PeakMemory, resident_mb

CPU = torch.device("cpu")
SIZE_MB = 400


def settled_mb():
    """What is resident once earlier tests' freed blocks have been given back, as PeakMemory does on entry."""
    release_memory(CPU)
    return resident_mb()


def allocate(megabytes):
    return torch.ones(int(megabytes * 1e6 / 4))  # written, so that every page is resident


@pytest.fixture(params=["own counter", "sampled"])
def peak(request, monkeypatch):
    """The counter this machine offers, and the sampler that stands in where there is none."""
    if request.param == "sampled":
        monkeypatch.setattr(memory, "_method", lambda device: ("sampled resident set", memory.SAMPLING_INTERVAL_MS))
    return PeakMemory(CPU)


def test_known_allocation_is_seen(peak):
    """400 MB held within the block add 400 MB to the peak, to 5 %."""
    before = settled_mb()
    with peak:
        held = allocate(SIZE_MB)
        assert held[0] == 1
        time.sleep(5 * peak.interval_ms / 1000)  # a few samples
    assert peak.peak_mb - before == pytest.approx(SIZE_MB, rel=0.05)


def test_what_was_freed_within_the_block_still_counts(peak):
    """A peak is the highest moment, not the last: 400 MB given back before the block ends are seen."""
    before = settled_mb()
    with peak:
        held = allocate(SIZE_MB)
        time.sleep(5 * peak.interval_ms / 1000)  # a few samples
        del held
    assert peak.peak_mb - before == pytest.approx(SIZE_MB, rel=0.05)
    assert settled_mb() - before < 0.2 * SIZE_MB


def test_an_earlier_peak_is_forgotten(peak):
    """The counter starts afresh: what another phase once used is not charged to this one."""
    held = allocate(SIZE_MB)
    del held
    before = settled_mb()
    with peak:
        small = allocate(20)
        assert small[0] == 1
        time.sleep(5 * peak.interval_ms / 1000)  # a few samples
    assert peak.peak_mb - before < 60


def test_phases_are_apart():
    """Of two phases in turn, each reads its own peak."""
    before = settled_mb()
    with PeakMemory(CPU) as first:
        held = allocate(SIZE_MB)
        del held
    with PeakMemory(CPU) as second:
        held = allocate(SIZE_MB / 2)
        del held
    assert first.peak_mb - before == pytest.approx(SIZE_MB, rel=0.05)
    assert second.peak_mb - before == pytest.approx(SIZE_MB / 2, rel=0.10)


def test_an_error_in_the_block_gets_through():
    """The block's own exception is what the caller sees, and a sampler does not stay behind."""
    before = threading.active_count()
    with pytest.raises(KeyError), PeakMemory(CPU):
        raise KeyError("mine")
    assert threading.active_count() == before


def test_the_method_is_named():
    """A record says how the peak was taken, and 0 ms where the counter is exact."""
    with PeakMemory(CPU) as peak:
        pass
    assert (peak.method, peak.interval_ms) in [("VmHWM", 0), ("sampled resident set", 10)]


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(devices._libc(), "mallopt"), reason="glibc's malloc")
def test_freed_activations_are_not_faulted_in_again():
    """Twenty tensors of 8 MB are 39,000 pages. Once they were there, they are there the next time."""
    import resource

    def faults_of_a_layer() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        activations = [torch.empty(2_000_000).fill_(1.0) for _ in range(20)]
        del activations
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    assert min(faults_of_a_layer() for _ in range(10)) < 500


def test_a_container_has_less_than_its_machine(monkeypatch, tmp_path):
    """6 GB of which 1 is used, 0.25 of that files that give way; one and a half CPUs."""
    files = {"memory.max": "6000000000", "memory.current": "1000000000", "memory.stat": "anon 1\ninactive_file 250000000"}
    for name, content in (files | {"cpu.max": "150000 100000"}).items():
        (tmp_path / name).write_text(content + "\n")
    monkeypatch.setattr(devices, "CGROUP", tmp_path)
    monkeypatch.setattr(devices.psutil, "virtual_memory", lambda: SimpleNamespace(available=64e9))
    monkeypatch.setattr(devices.psutil, "cpu_count", lambda logical: 32)
    monkeypatch.setattr(devices.os, "sched_getaffinity", lambda pid: range(32), raising=False)
    assert devices.available_memory_mb(torch.device("cpu")) == 5250 and devices.default_threads() == 2
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert devices.available_memory_mb(torch.device("cpu")) == 64000 and devices.default_threads() == 32


def test_half_precision_of_an_arm_cpu_is_looked_up(monkeypatch):
    monkeypatch.setattr(devices.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(devices, "_arm_has", lambda on_linux, on_macos: on_linux == "asimdhp")
    assert devices.has_half_arithmetic(torch.device("cpu"), torch.float16)[0]
    native, reason = devices.has_half_arithmetic(torch.device("cpu"), torch.bfloat16)
    assert not native and "no arithmetic in torch.bfloat16" in reason
