"""What a step costs against response length, prompt length, responses per prompt and batch, with a plot of each."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import correlation, median
from typing import Any

from benchmarks.measure import in_own_process
from benchmarks.settings import Setting
from benchmarks.shapes import SHAPES, Lengths, save_model
from benchmarks.variants import VARIANTS, run

IMAGES = Path(__file__).parents[1] / "docs" / "images"
NAMES = ("prompt packs", "pair packs", "selective")
BASE = Lengths(image=(256, 256), prompt=(64, 64), response=(64, 64), responses=4)


@dataclass(frozen=True, slots=True)
class Curve:
    """What is varied; `linear` are the variants whose arithmetic grows with it in a straight line.

    Attention grows with the square of a length, but is a small part at these lengths.
    """

    label: str
    values: tuple[int, ...]
    linear: tuple[str, ...] = NAMES

    def lengths(self, name: str, value: int) -> Lengths:
        if name == "batch":
            return BASE
        return replace(BASE, **{name: value if name == "responses" else (value, value)})


CURVES = {
    "response": Curve("tokens of each response", (16, 64, 128, 192, 256)),
    "prompt": Curve("tokens of the question, beside 256 of the image", (32, 256, 512, 768, 1024)),
    # Pairs grow with the square of the responses.
    "responses": Curve("responses per prompt", (2, 3, 4, 6, 8), linear=("prompt packs",)),
    "batch": Curve("prompts in a step, with 6 pairs each", (1, 2, 3, 4, 6)),
}


def measure(runs: int) -> dict[str, Any]:
    """CPU seconds of a step's passes: the median of runs, interleaved, each in a process of its own."""
    shape = SHAPES["small"]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        in_own_process(save_model, shape, model, device="cpu")
        for curve_name, curve in CURVES.items():
            points: dict[str, list[float]] = {name: [] for name in NAMES}
            for value in curve.values:
                lengths = curve.lengths(curve_name, value)
                prompts = value if curve_name == "batch" else 1
                pairs = prompts * lengths.responses * (lengths.responses - 1) // 2
                sized = replace(shape, lengths=lengths)
                seconds: dict[str, list[float]] = {name: [] for name in NAMES}
                for number in range(runs):
                    for name in NAMES:
                        work = Path(folder) / f"{curve_name} {value} {number} {name}"
                        setting = Setting(sized, model, work, pairs=pairs, prompts=prompts, steps=2)
                        taken = in_own_process(run, name, setting, device="cpu")
                        assert taken.passes is not None
                        seconds[name].append(taken.passes.cpu)
                for name in NAMES:
                    points[name].append(median(seconds[name]))
                print(curve_name, value, {name: round(points[name][-1], 3) for name in NAMES})
            straight = {n: correlation(curve.values, points[n]) ** 2 for n in curve.linear}
            found[curve_name] = {"values": list(curve.values), "cpu_seconds_per_step": points, "r_squared": straight}
    return {"model": "small", "runs": runs, "curves": found}


def plot(record: Mapping[str, Any]) -> None:
    """One SVG per curve under docs/images."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "unidpo"  # the same file for the same numbers
    IMAGES.mkdir(parents=True, exist_ok=True)
    for curve_name, curve in record["curves"].items():
        figure = Figure(figsize=(6, 3.6), layout="constrained")
        axes = figure.subplots()
        for name, seconds in curve["cpu_seconds_per_step"].items():
            axes.plot(curve["values"], seconds, marker="o", label=VARIANTS[name].title)
        axes.set(xlabel=CURVES[curve_name].label, ylabel="CPU seconds per step", ylim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        figure.savefig(IMAGES / f"speed-{curve_name}.svg", metadata={"Date": None})
