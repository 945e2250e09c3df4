"""Where benchmark scripts keep what they measured: one list of records per script, with date and hardware."""

from __future__ import annotations

import datetime
import json
import os
import platform
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def last_record(name: str) -> dict[str, Any] | None:
    """The last of benchmarks/results/NAME.json, where there is one."""
    path = RESULTS / f"{name}.json"
    return dict(json.loads(path.read_text())[-1]) if path.exists() else None


def add_record(name: str, *, instead_of_last: bool = False, **values: Any) -> None:
    """Append a record to benchmarks/results/NAME.json, or put it in the place of the last one."""
    path = RESULTS / f"{name}.json"
    record = {
        "date": datetime.date.today().isoformat(),
        "processors": os.cpu_count(),
        "processor": processor(),
        "python": platform.python_version(),
        **values,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    records = json.loads(path.read_text()) if path.exists() else []
    kept = records[:-1] if instead_of_last else records
    path.write_text(json.dumps([*kept, record], indent=2) + "\n")
    print(f"added to {path}")


def processor() -> str:
    """The processor's name, where Linux tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
