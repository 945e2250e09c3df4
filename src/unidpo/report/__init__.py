"""Run folders → one HTML page that anyone can open."""

from __future__ import annotations

from unidpo.report.page import MOST_RUNS, write_report

__all__ = ["MOST_RUNS", "write_report"]
