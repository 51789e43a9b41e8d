"""The results folder: one JSON a recipe, one that gathers them; nothing lost, nothing mixed, one writer at a time.

A finished recipe is skipped on the next run only if its options, workload, model, code and machine are the same.
Results that were measured differently, and files that are not JSON, are moved to `previous/`: never overwritten, and
never shown in one table with new ones.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
import time
from pathlib import Path

import filelock
import jsonschema

from records import RECORD_KEYS, SCHEMA, SCHEMA_VERSION, TARGETS, save_json, write_atomically

CONSOLIDATED = "consolidated_results.json"
WORKING_FILES = ".cache"
RESULT_FILES = "*_results.json"
# Of find.py, pruning_curve.py and layer_costs.py, which judge for themselves whether what they kept still holds.
OTHERS_FILES = ("find_results.json", "equal_bytes_results.json", "layer_costs_results.json")


class ResultsFolder:
    """Collects the records of one experiment; every `save` leaves complete files behind.

    `identity` is what two results must share to stand in one table. Raises ValueError if another run holds the folder.
    """

    def __init__(self, folder: Path, *, environment: dict, workload: dict, identity: dict, resume: bool = True):
        self.folder = folder
        self._lock = lock(folder)
        for leftover in folder.glob(".scratch-*"):  # of a run that was killed: nobody else can hold the lock
            shutil.rmtree(leftover, ignore_errors=True)
        self.cache = folder / WORKING_FILES
        self.cache.mkdir(exist_ok=True)
        self._head = {"environment": environment, "workload": workload, "identity": identity}
        self.aa: dict | None = None
        self.records: dict[str, dict] = {}
        self.notice: str | None = None
        earlier = read_json(folder / CONSOLIDATED)
        if resume and earlier is not None and earlier.get("identity") == identity:
            self.records = {record["name"]: record for record in earlier.get("results", []) if is_valid(record)}
            self.aa = earlier.get("aa")
        else:
            (self.cache / "reference.safetensors").unlink(missing_ok=True)
            ours = [path for path in folder.glob(RESULT_FILES) if path.name not in OTHERS_FILES]
            if moved_to := set_aside(folder, [*ours, *folder.glob("*_results.csv")]):
                self.notice = f"earlier results (measured differently, or unreadable) were moved to {moved_to}"

    def close(self) -> None:
        self._lock.release()

    def finished(self, name: str, steps: list[dict]) -> bool:
        """Whether `name` was measured to the end with exactly these resolved steps."""
        record = self.records.get(name)
        return record is not None and record["status"] in ("ok", "unsupported") and record["steps"] == steps

    def save(self, record: dict) -> None:
        """Keep `record`: its own file first, then those that gather all. Raises OSError when the disk is full.

        What is finished stays: a repetition that came to nothing does not replace it, other options move it to `previous/`.
        """
        validate(record)
        earlier = self.records.get(record["name"])
        if earlier is not None and earlier["status"] == "ok":
            if earlier["steps"] != record["steps"]:
                set_aside(self.folder, [self.folder / f"{record['name']}_results.json"])
            elif record["status"] != "ok":
                return
        self.records[record["name"]] = record
        save_json(self.folder / f"{record['name']}_results.json", record)
        save_json(self.folder / CONSOLIDATED, self.consolidated())
        write_atomically(self.folder / CONSOLIDATED.replace(".json", ".csv"), as_csv(self.records.values()))

    def consolidated(self) -> dict:
        head = {"schema_version": SCHEMA_VERSION, **self._head, "targets": TARGETS, "aa": self.aa}
        return head | {"results": list(self.records.values())}


def lock(folder: Path) -> filelock.FileLock:
    """Held until released or its holder ends, even killed. Raises ValueError if another run holds the folder."""
    held = filelock.FileLock(folder / ".lock")
    try:
        held.acquire(timeout=0)
    except filelock.Timeout:
        raise ValueError(f"--results-dir {folder}: another run is writing there; wait for it or choose another") from None
    return held


def set_aside(folder: Path, files: list[Path]) -> Path | None:
    """Move those of `files` that exist to `previous/<time>/` in the results folder; returns where to, None without any."""
    files = [path for path in files if path.exists()]
    if not files:
        return None
    destination = folder / "previous" / time.strftime("%Y%m%d-%H%M%S")
    destination.mkdir(parents=True, exist_ok=True)
    for path in files:
        shutil.move(path, destination / path.name)
    return destination


def read_json(path: Path) -> dict | None:
    """The file's content, or None where it is missing or is not a JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def validate(record: dict) -> None:
    """Raises jsonschema.ValidationError if `record` breaks the committed schema."""
    jsonschema.validate(record, SCHEMA)


def is_valid(record: dict) -> bool:
    try:
        validate(record)
    except jsonschema.ValidationError:
        return False
    return True


def as_csv(records) -> str:
    """One row a recipe, the scalar keys of the record as columns; intervals as two numbers joined by a space."""
    columns = [key for key in RECORD_KEYS if key not in ("samples", "steps", "evidence", "memory_phases", "quality_protocol",
               "continuations", "targets_met", "retention_verdicts", "notes", "axes", "speculation")]  # fmt: skip
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    for record in records:
        cells = (record.get(column) for column in columns)
        writer.writerow(" ".join(map(str, cell)) if isinstance(cell, list) else cell for cell in cells)
    return buffer.getvalue()
