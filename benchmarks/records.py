"""Where benchmark scripts keep what they measured: one list of records per script, with date and hardware."""

from __future__ import annotations

import datetime
import json
import os
import platform
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def add_record(name: str, **values: Any) -> None:
    """Append a record to benchmarks/results/NAME.json."""
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
    path.write_text(json.dumps([*records, record], indent=2) + "\n")
    print(f"added to {path}")


def processor() -> str:
    """The processor's name, where Linux tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
