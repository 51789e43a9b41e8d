"""Techniques that go wrong on purpose, one `kind` each."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch

from devices import Unsupported


def apply(model, *, kind: str):
    """Do to the worker, or to the model, what `kind` says."""
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "out of memory":
        torch.empty(10**15)  # a petabyte: torch's allocator refuses
    elif kind == "nan":
        model.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.nan
    elif kind == "unsupported":
        raise Unsupported("this machine has no such thing")
    elif kind == "bug":
        raise KeyError("a bug in a technique")
    elif kind == "slow":
        Path(os.environ["TINYOPT_TEST_SLOW"]).touch()
        time.sleep(60)
    else:
        raise ValueError(f"unknown kind {kind}")
    return model
