"""The results folder: one JSON a recipe, one that gathers them, nothing lost and nothing mixed.

Results that were measured differently (another workload, model, device or machine) are moved to `previous/`, never
overwritten and never shown in one table with new ones.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

from records import SCHEMA_VERSION, TARGETS, save_json

CONSOLIDATED = "consolidated_results.json"


class ResultsFolder:
    """Collects the records of one experiment; every `save` leaves complete files behind."""

    def __init__(self, folder: Path, *, environment: dict, workload: dict, identity: dict):
        self.folder = folder
        self._head = {"environment": environment, "workload": workload, "identity": identity}
        self.aa: dict | None = None
        self.records: dict[str, dict] = {}
        earlier = read_json(folder / CONSOLIDATED)
        if earlier is not None and earlier.get("identity") == identity:
            self.records = {record["name"]: record for record in earlier.get("results", [])}
            self.aa = earlier.get("aa")
        else:
            self._move_earlier()

    def save(self, record: dict) -> None:
        """Keep `record`: its own file first, then the file that gathers all."""
        self.records[record["name"]] = record
        save_json(self.folder / f"{record['name']}_results.json", record)
        save_json(self.folder / CONSOLIDATED, self.consolidated())

    def consolidated(self) -> dict:
        head = {"schema_version": SCHEMA_VERSION, **self._head, "targets": TARGETS, "aa": self.aa}
        return head | {"results": list(self.records.values())}

    def _move_earlier(self) -> None:
        earlier = list(self.folder.glob("*_results.json"))
        if earlier:
            destination = self.folder / "previous" / time.strftime("%Y%m%d-%H%M%S")
            destination.mkdir(parents=True)
            for path in earlier:
                shutil.move(path, destination / path.name)


def read_json(path: Path) -> dict | None:
    """The file's content, or None where it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
