"""The peer's end of the pipe: JSON lines in on stdin, JSON lines out on stdout, idle in between.

Imports nothing but the standard library, so that what a process occupies and computes with is the peer's own. A peer is
an object with `import_library()`, `load(**options) -> dict` and `block() -> dict`:

    {"cmd": "start"}      -> {"version": ...}: the library is imported, which is the runtime's share of memory
    {"cmd": "load", ...}  -> {"load_s": ..., "runtime_memory_mb": ..., what `load` returns}
    {"cmd": "block"}      -> {"prefill_s": ..., "ttft_s": ..., "decode_s": ..., "tokens": N}
    {"cmd": "memory"}     -> {"peak_memory_mb": ...} of one block, above what was resident before loading

An exception becomes {"status": "unsupported" | "oom" | "failed", "reason": ...}. Libraries print on stdout as they please:
their output is sent to stderr, and the replies go out by a file descriptor of their own.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

MB = 1e6


class Unsupported(RuntimeError):
    """What this peer cannot run on this machine; the message becomes the record's reason."""


def serve(peer) -> None:
    """Answer commands until stdin ends. Leaves without destructors: some peers' threads abort in them."""
    replies = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    state: dict[str, float | None] = {"runtime_mb": None}
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = _answer(peer, request.pop("cmd"), request, state)
        except (ImportError, Unsupported) as error:
            reply = {"status": "unsupported", "reason": _sentence(error)}
        except MemoryError as error:
            reply = {"status": "oom", "reason": _sentence(error)}
        except Exception as error:  # whatever a library raises is the record's reason; the parent goes on
            reply = {"status": "failed", "reason": f"{type(error).__name__}: {_sentence(error)}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
    os._exit(0)


def _answer(peer, command: str, options: dict, state: dict) -> dict:
    if command == "start":
        version = peer.import_library()
        state["runtime_mb"] = _status_mb("VmRSS")
        return {"version": version}
    if command == "load":
        start = time.perf_counter()
        return peer.load(**options) | {"load_s": time.perf_counter() - start, "runtime_memory_mb": state["runtime_mb"]}
    if command == "memory":
        return {"peak_memory_mb": _peak_mb(peer, state["runtime_mb"])}
    return peer.block()


def _peak_mb(peer, runtime_mb: float | None) -> float | None:
    """Highest resident set of one block above the runtime's, kept by the kernel; None where it keeps none."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    peer.block()
    peak_mb = _status_mb("VmHWM")
    return None if peak_mb is None or runtime_mb is None else peak_mb - runtime_mb


def _status_mb(key: str) -> float | None:
    """A memory figure of this process in MB (10^6 bytes), from /proc; None elsewhere than on Linux."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 / MB for line in lines if line.startswith(key)), None)


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
