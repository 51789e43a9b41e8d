"""Turns: the baseline stays alive, groups of contenders come and go, one block at a time, a record for each."""

from __future__ import annotations

import contextlib
import re
import sys
import time
from pathlib import Path

import numpy as np

import interleave
import judgement
import records
from devices import available_memory_mb
from measurement import HEADROOM, console
from peers import contenders, standalone
from peers.build_models import MODEL, folder_of
from peers.contenders import PEERS, PeerJob, PeerProcess
from run_optimization import RECIPES
from worker import Job, RecipeError, WorkerProcess

BASELINE, AGAIN = "baseline", "baseline again"
SETTLE_S = 0.1  # between turns: threads that spin after their last product go to sleep
NEEDED_PEER_MB = 2.5  # times the model's file: a copy repacked for the vector units, and the compiler's own


def steps_of(name: str) -> list[tuple[str, dict]]:
    return [] if name == BASELINE else RECIPES[name][1]


def title_of(name: str) -> str:
    return "Ours: baseline (fp32)" if name == BASELINE else f"Ours: {RECIPES[name][0]}"


def bits_by_name(name: str) -> int:
    """Which group a contender runs in: only an order, figures never depend on it."""
    if name in PEERS:
        return PEERS[name].bits
    found = re.search(r"int(4|8)(?!\d)", name)
    return int(found.group(1)) if found else 16


class Turns:
    """One run: the baseline stays, groups come and go; each record is complete when its group ends."""

    def __init__(self, args, scratch: Path):
        self.args, self.scratch = args, scratch
        self.rng = np.random.default_rng(args.seed)
        self.records: dict[str, dict] = {}
        self.samples: dict[str, list[dict]] = {BASELINE: []}
        self.rounds: dict[str, list[dict]] = {}  # contender -> the baseline's readings of the same rounds
        self.noise: list[interleave.Comparison] = []
        self.alive: dict[str, WorkerProcess | PeerProcess] = {}

    def run(self, names: list[str]) -> None:
        """Load group by group and measure; a contender that fails is recorded and the others go on."""
        try:
            self._start(BASELINE)
            if BASELINE not in self.alive:
                return
            for bits in sorted({bits_by_name(name) for name in names}):
                for name in [name for name in names if bits_by_name(name) == bits]:
                    if len(self.alive) > 1 and self._short_of_memory(name):
                        self._measure_group()
                    if BASELINE in self.alive:
                        self._start(name)
                self._measure_group()
                if BASELINE not in self.alive:
                    break
            self._give_up([name for name in names if name not in self.records])
        except KeyboardInterrupt:
            if self.samples[BASELINE]:  # groups that ended are kept, and their reference with them
                self._finish(BASELINE)
            raise
        finally:
            for process in self.alive.values():
                process.close()
        self._finish(BASELINE)

    def _short_of_memory(self, name: str) -> bool:
        if name in PEERS:
            path = folder_of(self.args.model_dir, self.args.seed) / PEERS[name].model
            size_mb = records.file_size_mb(path) or 1200  # not built yet
            needed_mb = NEEDED_PEER_MB * size_mb
        else:
            needed_mb = HEADROOM * self.records[BASELINE]["load_peak_memory_mb"]
        return available_memory_mb(self.args.torch_device) < needed_mb

    def _start(self, name: str) -> None:
        record = self.records[name] = self._new_record(name)
        with console.status(f"{name}: loading, memory, warm-up"), self._guarded(name):
            process = self._process(name)
            self.alive[name] = process
            if name in PEERS:
                contenders.describe_loaded(record, process.call("load"), process.version)
            else:
                record.update(process.load())
            record.update(process.call("memory"))
            process.call("block")

    def _process(self, name: str):
        args = self.args
        if name in PEERS:
            ids = args.inputs.input_ids[0].tolist()
            return PeerProcess(PeerJob(PEERS[name], args.peers_python, args.model_dir, args.threads, args.workload, ids))
        return WorkerProcess(Job.of(args, steps_of(name), args.inputs.input_ids, self.scratch))

    def _measure_group(self) -> None:
        """All rounds of what is alive now; ends every process but the baseline's."""
        samples: dict[str, list[dict]] = {name: [] for name in (AGAIN, *self.alive)}
        for number in range(self.args.repeats if len(self.alive) > 1 else 0):
            turns = [AGAIN, *self.alive]
            self.rng.shuffle(turns)
            with console.status(f"{', '.join(self.alive)}: round {number + 1} of {self.args.repeats}"):
                for name in turns:
                    time.sleep(SETTLE_S)
                    owner = BASELINE if name == AGAIN else name
                    if owner not in self.alive:  # it failed earlier in this round
                        continue
                    with self._guarded(owner):
                        samples[name].append(self.alive[owner].call("block"))
            if BASELINE not in self.alive:
                break
        self.samples[BASELINE] += samples[BASELINE] + samples[AGAIN]
        if BASELINE not in self.alive:
            self._give_up(list(self.alive))
        elif samples[AGAIN]:
            self.noise.append(interleave.Comparison(samples[BASELINE], samples[AGAIN]))
        for name in [name for name in self.alive if name != BASELINE]:
            self.samples[name], self.rounds[name] = samples[name], samples[BASELINE]
            self._finish(name)
            self.alive.pop(name).close()

    def _give_up(self, names: list[str]) -> None:
        for name in names:
            record = self.records.setdefault(name, self._new_record(name))
            record.update(status="failed", reason="the baseline, which its rounds need, ended")

    def _finish(self, name: str) -> None:
        record = self.records[name]
        if record["status"] != "interrupted":
            return
        judgement.fill_medians(record, self.samples[name])
        if record["bytes_per_token"]:
            judgement.explain_speed(record, self.args.bandwidth_gb_per_s)
        if name == BASELINE:
            record.update(speedup=1.0, prefill_speedup=1.0)
        else:
            against = interleave.Comparison(self.rounds[name], self.samples[name])
            judgement.fill_ratios(record, against)
        record["status"], record["reason"] = "ok", None
        console.print(summary(record), markup=False)

    def _new_record(self, name: str) -> dict:
        repro = standalone.repro("peers/compare.py", sys.argv[1:])
        if name in PEERS:
            return contenders.new_record(PEERS[name], repro)
        return records.new_record(
            name=name, title=title_of(name), status="interrupted", reason="the run ended here", model=MODEL, device="cpu",
            random_weights=True, repro=repro, steps=records.resolved(steps_of(name)),
        )  # fmt: skip

    @contextlib.contextmanager
    def _guarded(self, name: str):
        """A RecipeError becomes the record's status and reason, and the process ends."""
        try:
            yield
        except RecipeError as error:
            record = self.records[name]
            record["status"], record["reason"] = error.status, str(error)
            if process := self.alive.pop(name, None):
                process.close()
            console.print(summary(record), markup=False)


def summary(record: dict) -> str:
    """The line printed when a contender is done."""
    if record["status"] != "ok":
        return f"{record['title']}: {record['status']}: {record['reason']}"
    decode = f"decode {record['decode_tokens_per_s']:.1f}, " if record["decode_tokens_per_s"] else ""
    return f"{record['title']}: {decode}prefill {record['prefill_tokens_per_s']:.0f} tokens/s"
