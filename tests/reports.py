"""Run folders without a training, and the page that is drawn of them, taken apart."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from unidpo.report import write_report
from unidpo.run_folder.folder import RunFolder
from unidpo.run_folder.records import LEDGER_COLUMNS, Ledger, Metrics

ROW: dict[str, Any] = {
    "epoch": 0.0, "file": "gone.json", "chosen": 0, "rejected": 1, "chosen_score": 5.0, "rejected_score": 2.0,
    "chosen_logps": -1.0, "rejected_logps": -2.0, "ref_chosen_logps": -1.0, "ref_rejected_logps": -1.5,
    "chosen_tokens": 10, "rejected_tokens": 10, "quality_weight": 0.9, "performance_weight": 0.5, "nll_gate": 0.0,
    "preference": 0.5, "nll": 0.0, "loss": 0.2,
}  # fmt: skip
UNI_DPO = {"name": "uni_dpo", "beta": 2.0, "nll_weight": 0.001, "tau_good": 2.5}


def make_run(
    path: Path,
    *,
    rows: list[dict[str, Any]] = [],  # noqa: B006 -- never changed
    records: list[dict[str, Any]] = [],  # noqa: B006
    loss: dict[str, Any] = UNI_DPO,
    data: list[dict[str, Any]] = [],  # noqa: B006
    finished: bool = True,
    **config: Any,
) -> Path:
    """A run folder: `rows` of its ledger and `records` of its metrics as overrides of ordinary ones."""
    folder = RunFolder(path)
    sections = {"model": {"name": "org/base"}, "data": {"path": "gone.json"}, "loss": loss}
    folder.create({**sections, "train": {"learning_rate": 1e-6}, **config}, {"devices": ["CPU"], "processes": 1})
    metrics, ledger = Metrics(folder.metrics), Ledger(folder.ledger)
    for record in records:
        metrics.add(record)
    complete = [ROW | {"step": 1, "row": number} | row for number, row in enumerate(rows, start=1)]
    if complete:
        ledger.add({column.name: [row[column.name] for row in complete] for column in LEDGER_COLUMNS})
    ledger.flush()
    (path / "inputs.json").write_text(json.dumps({"data": data}))
    if finished:
        folder.model.mkdir()
    return path


def trained(steps: int = 40, per_step: int = 8, **changes: Any) -> dict[str, Any]:
    """Rows and records of a good run. `changes` of a row may be functions of how far the run is, from 0 to 1."""
    rows, records = [], []
    for step in range(1, steps + 1):
        done = step / steps
        for pair in range(per_step):
            longer = (7 * pair) % 5 - 2  # has nothing to do with the margin
            row: dict[str, Any] = {
                "step": step,
                "row": (step - 1) * per_step + pair + 1,
                "chosen_tokens": 10 + longer,
                "chosen_logps": -1.0 + 0.05 * done * (pair % 3),
                "rejected_logps": -1.5 - 0.3 * done * (1 + pair % 2),
                "nll_gate": float(pair % 4 == 0),
            }
            rows.append(row | {key: value(done, pair) if callable(value) else value for key, value in changes.items()})
        records.append({"step": step, "loss": 0.3, "rewards/accuracies": 0.5 + 0.4 * done, "rewards/margins": done})
    return {"rows": rows, "records": records}


class Page(HTMLParser):
    """A page as a browser would see it without running it.

    Attributes:
        tags: every element with its attributes.
        text: what stands outside of scripts and styles.
        data: what the page's script is given.
        scripts, styles: their texts.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self.data: Any = None
        self.alerts: list[str] = []
        self._texts: list[str] = []
        self._inside = ""
        self.feed(html)
        self.text = " ".join(" ".join(self._texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append((tag, given))
        self.alerts += [str(given["data-alert"])] if "data-alert" in given else []
        self._inside = "json" if given.get("type") == "application/json" else tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        match self._inside:
            case "json":
                self.data = json.loads(data)
            case "script":
                self.scripts.append(data)
            case "style":
                self.styles.append(data)
            case _:
                self._texts.append(data)

    def policy(self) -> str:
        return next(str(a["content"]) for t, a in self.tags if t == "meta" and "http-equiv" in a)


def drawn(*runs: Path, to: Path | None = None, **options: Any) -> Page:
    page = write_report(runs, to or runs[0] / "report.html", **options)
    return Page(page.read_text("utf-8"))
