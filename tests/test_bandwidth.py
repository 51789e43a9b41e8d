"""Read bandwidth: bytes over the shortest time, kept for the machine that it was measured on."""

import itertools
from types import SimpleNamespace

import pytest
import torch

import bandwidth

CPU = torch.device("cpu")


def test_bandwidth_by_hand(monkeypatch):
    """4 MB in 2, 1, 2, ... ms: the best counts."""
    ticks = itertools.accumulate(itertools.cycle([1.0, 0.002, 1.0, 0.001]))
    monkeypatch.setattr(bandwidth, "READ_BYTES", 4_000_000)
    monkeypatch.setattr(bandwidth, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    assert bandwidth.measure_read_bandwidth(CPU) == pytest.approx(4.0)


def test_a_machine_is_measured_once_and_another_anew(monkeypatch, tmp_path):
    """Not where memory was short before, and not what a copied folder says of other threads or of another CPU."""
    answers = iter([None, 5.0, 6.0, 7.0])
    monkeypatch.setattr(bandwidth, "measure_read_bandwidth", lambda _: next(answers))

    def read(threads):
        return bandwidth.read_bandwidth(CPU, cache=tmp_path, threads=threads)["read_bandwidth_gb_per_s"]

    assert [read(threads) for threads in (1, 1, 1, 2)] == [None, 5.0, 5.0, 6.0]
    monkeypatch.setattr(bandwidth, "device_name", lambda _: "another")
    assert read(2) == 7.0
