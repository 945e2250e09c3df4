"""The measured parts of docs/performance.md, from the last records under benchmarks/results."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.curves import CURVES
from benchmarks.records import last_record
from benchmarks.variants import VARIANTS

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "performance.md"
BLOCK = re.compile(r"(?<=<!-- measured: )([\w-]+)( -->\n).*?(?=<!-- end -->)", re.DOTALL)
# The published setting's epoch: pairs, prompts.
EPOCH = (50_555, 12_503)
# Times faster than, parts of the memory of: the padded rows with logits of responses, the loop with all logits.
AIMS = {
    "pair packs": (2.2, 7.0),
    "pair packs, features": (2.2, 7.0),
    "prompt packs": (10.0, 30.0),
    "prompt packs, features": (10.0, 30.0),
}
MEMORY_AIMS = (0.6, 0.4)
GPU_HEAD = ("variant", "pairs/s", "FLOP utilisation", "peak GiB", "epoch", "with the reference pass")
# Assumed of an H100: operations a second in matrix products (less and more) and at its peak, bytes a second elsewhere,
# seconds that the host needs for the launch of a kernel.
MATRIX_RATES, PEAK_RATE, ELEMENTWISE_RATE, LAUNCH = (450e12, 620e12), 989e12, 2.7e12, 8e-6
Record = Mapping[str, Any]


def write() -> None:
    DOCUMENT.write_text(rendered(DOCUMENT.read_text("utf-8")), "utf-8")


def rendered(text: str) -> str:
    """The page with each measured part made anew."""
    return BLOCK.sub(lambda found: f"{found[1]}{found[2]}{PARTS[found[1]](last_record(found[1]))}\n", text)


def _cpu(record: Record | None, shape: str = "cpu") -> str:
    if record is None:
        return _not_yet(["variant", "CPU s/pair"], f"--shape {shape}")
    others = [other for other in ("selective", "loop") if other in record["variants"]]
    rows = []
    for name, found in record["variants"].items():
        seconds = found["cpu_seconds_per_pair"]
        first = seconds + (found["reference_cpu_seconds_per_pair"] or 0)
        speeds = [
            f"{record['variants'][other]['cpu_seconds_per_pair'] / own:.1f}"
            for other in others
            for own in (first, seconds)
        ]
        rows.append(
            [
                VARIANTS[name].title,
                f"{seconds:.2f}",
                *speeds,
                f"{found['pairs_per_second']:.2f}",
                f"{found['work_per_pair'] / 1e9:,.0f}",
                f"{found['peak_bytes'] / 2**20:,.0f}",
                *(_part(record, name, other) for other in others),
            ]
        )
    than = [_short(other) for other in others]
    speeds = [f"{run} ÷ {other}" for other in than for run in ("first run, speed", "later runs, speed")]
    head = [
        "variant",
        "CPU s/pair",
        *speeds,
        "pairs/s",
        "GFLOP/pair",
        "peak MiB",
        *(f"memory ÷ {other}" for other in than),
    ]
    parts = [_where(record), _table(head, rows), _stored(record)]
    return "\n\n".join([*parts, _aims(record)] if shape == "cpu" else parts)


def _gpu(record: Record | None) -> str:
    if record is None:
        return _not_yet(GPU_HEAD, "--shape gpu")
    rows = []
    for name, found in record["variants"].items():
        per_second = found["pairs_per_second"]
        used = found["work_per_pair"] * per_second / record["matmul_per_second"]
        # All pairs of a prompt take one pass, whether there are six of them or, as in this data, four.
        passes = 6 * EPOCH[1] if VARIANTS[name].layout == "prompts" else EPOCH[0]
        minutes = [passes * seconds / 60 for seconds in (1 / per_second, found["reference_wall_seconds_per_pair"] or 0)]
        cells = [f"{per_second:.2f}", f"{used:.0%}", f"{found['peak_bytes'] / 2**30:.1f}"]
        rows.append([VARIANTS[name].title, *cells, f"{minutes[0]:,.0f} min", f"{sum(minutes):,.0f} min"])
    rate = f"A plain {record['dtype']} matrix product reaches {record['matmul_per_second'] / 1e12:,.0f} TFLOP/s."
    return "\n\n".join([f"{_where(record)} {rate}", _table(GPU_HEAD, rows)])


def _checks(record: Record | None) -> str:
    if record is None:
        return "Not measured yet: `make gpu` on a machine with a CUDA GPU."
    rows = [[f"`{done['command']}`", done["outcome"], f"{done['seconds']:,.0f}"] for done in record["checks"].values()]
    return f"{record['date']}: {record['gpu']}.\n\n{_table(['command', 'outcome', 'seconds'], rows)}"


def _memory(record: Record | None) -> str:
    if record is None:
        return "Not measured yet: `python -m benchmarks.memory`."
    rows = []
    for name, found in record["variants"].items():
        row = [VARIANTS[name].title, f"{found['peak_bytes'] / 2**20:,.0f}"]
        for less in (0, record["libraries_bytes"]):
            of = (record["variants"][other]["peak_bytes"] - less for other in ("selective", "loop"))
            row += [f"{(found['peak_bytes'] - less) / each:.2f}" for each in of]
        rows.append(row)
    head = ["variant", "peak MiB", "÷ selective", "÷ all logits"]
    head += [f"{each}, without libraries" for each in head[2:]]
    libraries = f"{record['libraries_bytes'] / 2**20:,.0f} MiB of each are the loaded libraries."
    return "\n\n".join([f"{_machine(record)}. {libraries}", _table(head, rows)])


def _profile(record: Record | None) -> str:
    if record is None:
        return "Not measured yet: `python -m benchmarks.profile`."
    rows = []
    for name, found in record["variants"].items():
        kinds = found["cpu_seconds_per_pair"]
        total, work = sum(kinds.values()), found["work_per_pair"] / 1e9
        seconds = [f"{value:.2f}" for value in (total, *kinds.values(), found["system_seconds_per_pair"])]
        rows.append([VARIANTS[name].title, *seconds, f"{work:,.0f}", f"{work / total:.0f}"])
    head = ["variant", "CPU s/pair", "matrix products", "attention", "other operations", "outside of them"]
    rate = f"A plain matrix product of 1,024 × 1,024 reaches {record['matmul_per_second'] / 1e9:.0f} GFLOP/s."
    table = _table([*head, "system's part", "GFLOP/pair", "GFLOP/s"], rows)
    return "\n\n".join([f"{_machine(record)}. {rate}", table])


def _curves(record: Record | None) -> str:
    if record is None:
        return _not_yet(["curve", "R² of a straight line"], "--curves")
    rows, plots = [], []
    for name, curve in record["curves"].items():
        straight = ", ".join(f"{VARIANTS[each].title} {value:.3f}" for each, value in curve["r_squared"].items())
        rows.append([CURVES[name].label, straight])
        plots.append(f"![CPU seconds per step against {CURVES[name].label}](images/speed-{name}.svg)")
    return "\n\n".join(
        [f"{_machine(record)}; {_runs(record)}.", _table(["cost against", "R² of a straight line"], rows), *plots]
    )


def _pretended(record: Record | None) -> str:
    if record is None:
        return "Not measured yet: `python -m benchmarks.pretend`."
    before = last_record("pretend-before") or {"cases": {}}
    asked, cost = [], []
    for title, now in record["cases"].items():
        then, compiled = before["cases"].get(title, now), now["compiled"]
        useful = record["cases"][title.replace(", checkpointing", "")]["work"]
        waits = [f"{each['waits']} + {each['blocking_copies']}" for each in (then, now)]
        kernels = [f"{each['kernels']:,.0f}" for each in (then, now, compiled)]
        moved = [f"{each['other_bytes'] / 1e9:,.0f}" for each in (then, now, compiled)]
        peaks = [f"{each['peak_bytes'] / 1e9:.1f}" for each in (then, now)]
        asked.append([title, f"{now['tokens']:,}", *map(" → ".join, (waits, kernels, moved, peaks))])
        ways = (then, now, now | compiled)
        cost.append([title, f"{now['work'] / 1e12:.0f}", *(_utilisation(way, useful) for way in ways)])
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    head = ["micro-batch", "tokens", "waits + blocking copies", "kernels", "elementwise GB", "peak GB"]
    estimated = ["micro-batch", "TFLOP", "utilisation before", "now", "now, layers compiled"]
    where = (
        f"{record['date']}: counted on {record['processor']}; {versions}. Before: commit 8489962, by the same counter."
    )
    return "\n\n".join([where, _table(head, asked), _table(estimated, cost)])


def _utilisation(asked: Mapping[str, float], useful: float) -> str:
    """Of an H100, from the slower rate of matrix products to the faster."""
    elsewhere = asked["other_bytes"] / ELEMENTWISE_RATE
    seconds = [max(asked["work"] / rate + elsewhere, asked["kernels"] * LAUNCH) for rate in MATRIX_RATES]
    return "–".join(f"{useful / each / PEAK_RATE:.0%}" for each in seconds)


PARTS = {
    "speed-cpu": _cpu,
    "speed-answers": partial(_cpu, shape="answers"),
    "speed-gpu": _gpu,
    "gpu": _checks,
    "pretend": _pretended,
    "memory-cpu": _memory,
    "profile-cpu": _profile,
    "speed-curves": _curves,
}


def _where(record: Record) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    checkpointing = f"{'with' if record['gradient_checkpointing'] else 'without'} gradient checkpointing"
    sizes = f"{record['pairs_per_step']} pairs a step, {record['pairs_per_pass']} a pass"
    differences = ", ".join(f"{what} {value:.0e}" for what, value in record["largest_difference"].items())
    return (
        f"{_machine(record)}; {versions}; {record['parameters'] / 1e6:,.0f} million parameters, {record['dtype']}, "
        f"{checkpointing}, {sizes}; {_runs(record)}. Largest relative difference between the variants: {differences}."
    )


def _machine(record: Record) -> str:
    threads = f"{record['threads']} thread{'s' * (record['threads'] > 1)}"
    return f"{record['date']}: {record['gpu'] or record['processor']}, {threads}"


def _runs(record: Record) -> str:
    return "one run" if record["runs"] == 1 else f"medians of {record['runs']} interleaved runs"


def _stored(record: Record) -> str:
    found = [
        f"{name} {seconds:.2f}"
        for name, variant in record["variants"].items()
        if (seconds := variant["reference_cpu_seconds_per_pair"]) is not None
    ]
    return (
        f"The first run over some data also makes the passes that store the reference and image features, which later "
        f"runs find on disk; they cost, in CPU seconds per pair: {'; '.join(found)}. The other variants compute their "
        f"reference in each step."
    )


def _aims(record: Record) -> str:
    rows = []
    others = ("selective", "loop")
    for name in filter(record["variants"].__contains__, AIMS):
        for other, aim in zip(others, AIMS[name], strict=True):
            got = _ratio(record, other, name, "cpu_seconds_per_pair")
            rows.append([_short(name), f"CPU time, {_short(other)}", f"≥ {aim:g} × faster", f"{got:.1f} ×", got >= aim])
        for other, aim in zip(others, MEMORY_AIMS, strict=True):
            got = _ratio(record, name, other, "peak_bytes")
            rows.append([_short(name), f"peak memory, {_short(other)}", f"≤ {aim:g}", f"{got:.2f}", got <= aim])
    shown = [[*row[:4], "yes" if row[4] else "no"] for row in rows]
    return _table(["of", "against", "aim", "measured", "reached"], shown)


def _short(name: str) -> str:
    return {"selective": "logits of responses", "loop": "all logits"}.get(name, name)


def _ratio(record: Record, name: str, other: str, key: str) -> float:
    return float(record["variants"][name][key] / record["variants"][other][key])


def _part(record: Record, name: str, other: str) -> str:
    return f"{_ratio(record, name, other, 'peak_bytes'):.2f}"


def _not_yet(head: Sequence[str], options: str) -> str:
    rows = [[variant.title, *["not measured yet"] * (len(head) - 1)] for variant in VARIANTS.values()]
    return f"Not measured yet. `python -m benchmarks.speed {options}` fills this in.\n\n{_table(head, rows)}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


if __name__ == "__main__":
    write()
