"""The parent's end of a peer: a process that answers like our own workers do, and the record its readings become."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import records
from benchmark import Workload, speeds
from peers import ctranslate2_peer, llama_cpp_peer, openvino_peer
from peers.build_models import MODEL, folder_of
from worker import RecipeError

ROOT = Path(__file__).parent.parent
ENGINES = {  # name -> (title, bits of each quantisation, file or folder of a model)
    "llama_cpp": ("llama.cpp", llama_cpp_peer.QUANTIZATIONS, lambda quantization: f"{quantization}.gguf"),
    "openvino": ("OpenVINO", openvino_peer.QUANTIZATIONS, lambda quantization: f"openvino-{quantization}"),
    "ctranslate2": ("CTranslate2", ctranslate2_peer.QUANTIZATIONS, lambda quantization: "ctranslate2-int8"),
}


@dataclass(frozen=True)
class Peer:
    """One engine at one width of weights."""

    engine: str
    quantization: str

    @property
    def name(self) -> str:
        return f"{self.engine}_{self.quantization.lower()}"

    @property
    def title(self) -> str:
        return f"{ENGINES[self.engine][0]} {self.quantization}"

    @property
    def bits(self) -> int:
        return ENGINES[self.engine][1][self.quantization]

    @property
    def model(self) -> str:
        return ENGINES[self.engine][2](self.quantization)


PEERS = {peer.name: peer for engine, (_, table, _) in ENGINES.items() for peer in (Peer(engine, name) for name in table)}


@dataclass(frozen=True)
class PeerJob:
    """What a peer loads and does, and the Python of the environment that it is installed in."""

    peer: Peer
    python: Path
    model_dir: Path
    threads: int
    workload: Workload
    prompt_ids: list[int] = field(repr=False, default_factory=list)


class PeerProcess:
    """`call("load" | "memory" | "block")` like `worker.WorkerProcess`; RecipeError if the peer fails, is missing or dies."""

    def __init__(self, job: PeerJob):
        self.job = job
        script = ROOT / "peers" / f"{job.peer.engine}_peer.py"
        command = [str(job.python), str(script), "--serve"]
        pipe = subprocess.PIPE
        try:
            self._process = subprocess.Popen(
                command,
                stdin=pipe,
                stdout=pipe,
                stderr=subprocess.DEVNULL,
                env=_environment(),
                text=True,
                start_new_session=True,
            )
        except OSError as error:
            reason = f"--peers-python {job.python}: {error.strerror}; peers/README.md says how to make the environment"
            raise RecipeError("unsupported", reason) from None
        try:
            self.version = self._ask("start")["version"]
        except RecipeError:
            self.close()
            raise

    def call(self, command: str) -> dict:
        if command == "load":
            return self._load()
        reply = self._ask(command)
        return rates(reply, self.job.workload) if command == "block" else reply

    def close(self) -> None:
        """End the process, whatever it is doing."""
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                stream.close()
        try:
            self._process.wait(2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _load(self) -> dict:
        job = self.job
        model = build_model(job)
        options = {"model": str(model), "quantization": job.peer.quantization, "threads": job.threads}
        reply = self._ask("load", **options, prompt_ids=job.prompt_ids, new_tokens=job.workload.new_tokens)
        reply["model_size_mb"] = records.file_size_mb(model)
        return reply

    def _ask(self, command: str, **options) -> dict:
        try:
            self._process.stdin.write(json.dumps({"cmd": command, **options}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except (OSError, ValueError):
            line = ""
        if not line:
            raise RecipeError(*self._reason_of_death(command))
        reply = json.loads(line)
        if "status" in reply:
            raise RecipeError(reply["status"], reply["reason"])
        return reply

    def _reason_of_death(self, command: str) -> tuple[str, str]:
        code = self._process.wait()
        if code == -signal.SIGKILL:
            return "oom", f"the peer was killed during {command}, most likely because memory ran out"
        ended = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return "failed", f"the peer ended during {command} ({ended})"


def build_model(job: PeerJob) -> Path:
    """The peer's model, converted in the peers' environment if the cache lacks it. RecipeError if that fails."""
    model = folder_of(job.model_dir, job.workload.seed) / job.peer.model
    if not model.exists():
        script = [str(job.python), str(ROOT / "peers" / "build_models.py")]
        flags = ["--model-dir", str(job.model_dir), "--only", job.peer.model, "--seed", str(job.workload.seed)]
        done = subprocess.run(script + flags, env=_environment(), capture_output=True, text=True, check=False)
        if not model.exists():
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise RecipeError("failed", f"its model could not be built: {last}")
    return model


def rates(reply: dict, workload: Workload) -> dict[str, float]:
    """A block's raw times as the four speed quantities of a record; RecipeError where tokens are missing."""
    if reply["tokens"] != workload.new_tokens:
        raise RecipeError("failed", f"{reply['tokens']} tokens were generated, {workload.new_tokens} were asked for")
    times = {key: reply[key] for key in ("prefill_s", "ttft_s", "decode_s")}
    return speeds(**times, prompt_tokens=workload.prompt_tokens, new_tokens=workload.new_tokens)


def new_record(peer: Peer, repro: str | None) -> dict:
    """The record before anything was measured."""
    options = {"quantization": peer.quantization, "bits": peer.bits}
    return records.new_record(
        name=peer.name, title=peer.title, status="interrupted", reason="the run ended here", model=MODEL, device="cpu",
        dtype=peer.quantization, random_weights=True, repro=repro, steps=[{"technique": peer.engine, "options": options}],
    )  # fmt: skip


def describe_loaded(record: dict, loaded: dict, version: str) -> None:
    """What the peer said of itself when it loaded."""
    record["evidence"] = {"engine": record["steps"][0]["technique"], "version": version, **(loaded.get("settings") or {})}
    for key in ("load_s", "runtime_memory_mb", "model_size_mb", "weights_mb", "parameters", "notes"):
        record[key] = loaded.get(key)


def _environment() -> dict[str, str]:
    """The repository on the path, nothing from the network, one OpenMP setting for all: the library's own defaults."""
    return os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
