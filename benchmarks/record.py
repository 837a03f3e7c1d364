"""How results are kept: one JSON file a benchmark, with the machine and the versions it was measured on."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

from backend.commands.bench import machine

RESULTS = Path(__file__).resolve().parent / "results"


def write(name: str, results: dict[str, Any]) -> Path:
    """Record results under benchmarks/results/NAME.json, replacing the earlier record."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    document = {"benchmark": name, "date": datetime.date.today().isoformat(), "machine": machine(), "results": results}
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return path
