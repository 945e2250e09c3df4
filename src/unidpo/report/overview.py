"""What stands at the head of the page: a run's state, what it was, and its few telling numbers."""

from __future__ import annotations

import datetime
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from unidpo.losses import LOSSES
from unidpo.redaction import redacted
from unidpo.report.pairs import OUTCOMES, Pairs
from unidpo.report.reading import Note, Run
from unidpo.run_folder.folder import MAY_CHANGE_ON_RESUME, flat

TITLES = {"uni_dpo": "Uni-DPO", "dpo": "DPO", "simpo": "SimPO", "mm_dpo": "MM-DPO", "odpo": "ODPO", "rpo": "RPO"}
_STAGES = {"checking": "check", "digests": "check", "tokenizing": "tokenize"} | {
    name: name for name in ("features", "reference", "training")
}
"""First word of a stage, as `Stages` is given it, to what the page counts it under."""
MOST_DIFFERENCES = 4
"""Settings in the name of a run."""


@dataclass(frozen=True, slots=True)
class Tile:
    """A telling number: a key of `words.json` after `tile-`, the number, and what is said below it."""

    key: str
    value: str
    note: Note


@dataclass(frozen=True, slots=True)
class Overview:
    """The head of one run.

    Attributes:
        name: of the folder, or of the settings that set it apart.
        said: its state in sentences.
        summary: what was trained on what.
        tiles: its telling numbers.
        facts: further ones, by keys of `words.json` after `fact-`; plain text or a note.
        stages: what took how much of the time, as key, seconds and share.
        commands: each start, as it is given to a shell.
        recipe: the resolved recipe in YAML.
        compared: whether it is known what the policy thought of the pairs before.
    """

    run: Run
    name: str
    said: list[Note]
    summary: Note
    tiles: list[Tile]
    facts: dict[str, str | Note]
    stages: list[tuple[str, str, float]]
    commands: list[str]
    recipe: str
    compared: bool


def names_of(runs: Sequence[Run]) -> list[str]:
    """What tells runs apart: the settings in which they differ, or their folders."""
    folders = [run.path.resolve().name for run in runs]
    if len(runs) == 1:
        return folders
    settings = [flat(run.config) for run in runs]
    shared = set.intersection(*(set(each) for each in settings)) - MAY_CHANGE_ON_RESUME
    differing = [key for key in settings[0] if key in shared and len({str(each[key]) for each in settings}) > 1]
    if len(differing) > MOST_DIFFERENCES:  # then of each run what it has apart from most
        usual = {key: statistics.mode(str(each[key]) for each in settings) for key in differing}
        apart = [[key for key in differing if str(each[key]) != usual[key]] for each in settings]
    else:
        apart = [differing] * len(runs)
    named = [
        ", ".join(f"{_short(key)} {_said(each[key])}" for key in keys[:MOST_DIFFERENCES]) or folder
        for each, keys, folder in zip(settings, apart, folders, strict=True)
    ]
    if len(set(named)) == len(named):
        return named
    return folders if len(set(folders)) == len(folders) else [str(run.path) for run in runs]


def _short(key: str) -> str:
    section, _, name = key.rpartition(".")
    return section.rpartition(".")[2] if name == "name" else name


def _said(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else Path(str(value)).name


def overview(run: Run, name: str, pairs: Pairs) -> Overview:
    """The head of one run."""
    seconds, about = _seconds(run)
    by_stage = _seconds_by_stage(run)
    training = by_stage.get("training", 0.0)
    return Overview(
        run=run,
        name=name,
        said=_state(run),
        summary=Note(
            "trained",
            {
                "model": Path(str(run.config.get("model", {}).get("name", "?"))).name,
                "pairs": f"{pairs.total:,}",
                "data": ", ".join(Path(each.path).name for each in run.data) or "?",
                "loss": _loss(run.loss),
            },
        ),
        tiles=_tiles(run, pairs, seconds, about=about, training=training),
        facts=_facts(run, pairs, training),
        stages=[(key, clock(taken), taken / seconds) for key, taken in _shown_stages(by_stage, seconds).items()],
        commands=[shlex.join(["unidpo", *map(redacted, start.get("command", ["", "?"])[1:])]) for start in run.starts],
        recipe=OmegaConf.to_yaml(OmegaConf.create(dict(run.config))),
        compared=_compared(pairs),
    )


def _compared(pairs: Pairs) -> bool:
    """Whether there is a reference, or a first visit before the last."""
    return not np.isnan(pairs.columns["chosen_moved"]).all() or bool(np.any(pairs.columns["visits"] > 1))


def _state(run: Run) -> list[Note]:
    values = {"steps": f"{run.last_step:,}"}
    known = run.total_steps is not None and run.state != "finished"
    said = [Note(f"said-{run.state}{'-of' if known else ''}", values | {"total": f"{run.total_steps or 0:,}"})]
    return said + ([Note("said-resumed", {"n": len(run.starts)})] if len(run.starts) > 1 else [])


def _loss(loss: Mapping[str, Any]) -> str:
    """The loss with the settings in which it departs from its defaults, and β."""
    name = str(loss.get("name", "?"))
    fields = LOSSES[name].model_fields if name in LOSSES else {}
    shown = [
        f"{key} {_said(value)}"
        for key, value in loss.items()
        if key != "name" and (key == "beta" or key not in fields or fields[key].default != value)
    ]
    return f"{TITLES.get(name, name)} ({', '.join(shown)})" if shown else TITLES.get(name, name)


def _tiles(run: Run, pairs: Pairs, seconds: float, *, about: bool, training: float) -> list[Tile]:
    tiles = []
    # At the first step nothing has moved yet.
    late = [record for record in run.trained if record["step"] > max(run.last_step * 0.75, 1)]
    for key, logged, show in (("accuracy", "rewards/accuracies", "{:.1%}"), ("margin", "rewards/margins", "{:+.2f}")):
        values = [record[logged] for record in late if record.get(logged) is not None]
        if values:
            tiles.append(Tile(key, show.format(np.mean(values)).replace("-", "−"), Note(f"tile-{key}-note")))
    held = [(r["step"], r["eval_rewards/accuracies"]) for r in run.evaluated if r.get("eval_rewards/accuracies")]
    if held:
        step, best = max(held, key=lambda point: point[1])
        note = Note("tile-held-note", {"n": len(held), "best": f"{best:.1%}", "step": step})
        tiles.insert(1, Tile("held", f"{held[-1][1]:.1%}", note))
    if pairs.total and _compared(pairs):
        counts = {name: int(np.sum(pairs.outcome == place)) for place, name in enumerate(OUTCOMES)}
        net = counts["learnt"] - counts["unlearnt"]
        said = {name: f"{count:,}" for name, count in counts.items()} | {"pairs": f"{len(pairs.outcome):,}"}
        tiles.append(Tile("taught", f"{net:+,}".replace("-", "−"), Note("tile-taught-note", said)))
    rate = f"{len(run.ledger['step']) / training:,.3g}" if training else None
    note = Note("tile-time-note", {"rate": rate}) if rate else Note("tile-time-about" if about else "")
    return [*tiles, Tile("time", clock(seconds), note)]


def _facts(run: Run, pairs: Pairs, training: float) -> dict[str, str | Note]:
    last = run.starts[-1] if run.starts else {}
    facts: dict[str, str | Note] = {"folder": str(run.path)}
    if run.starts:
        facts["started"] = _when(run.starts[0].get("time"))
    facts["ended" if "ended" in last else "last-written"] = _when(last.get("ended", run.last_written.isoformat()))
    visits = {"visits": f"{len(run.ledger['step']):,}", "pairs": f"{pairs.total:,}", "steps": f"{run.last_step:,}"}
    facts["visits"] = Note("fact-visits-value", visits)
    if training:
        tokens = float(np.sum(run.ledger["chosen_tokens"]) + np.sum(run.ledger["rejected_tokens"]))
        values = {"pairs": f"{len(run.ledger['step']) / training:,.3g}", "tokens": f"{tokens / training:,.0f}"}
        facts["speed"] = Note("fact-speed-value", values)
    if "peak_memory" in last:
        facts["memory"] = ", ".join(f"{name} {size / 2**30:,.2f} GiB" for name, size in last["peak_memory"].items())
    facts["data"] = "; ".join(
        f"{each.path}{f' × {each.weight:g}' if each.weight != 1 else ''}"
        f"{f' (SHA-256 {each.sha256[:12]}…)' if each.sha256 else ''}"
        for each in run.data
    )
    if run.held_out:
        facts["held"] = Note("fact-held-value", {"n": f"{run.held_out:,}"})
    if last:
        hardware = {name: last.get(name, "?") for name in ("processes", "threads", "platform")}
        devices = ", ".join(dict.fromkeys(map(str, last.get("devices", ["?"]))))
        facts["hardware"] = Note(
            "fact-hardware-value", hardware | {"devices": devices, "cpus": last.get("cpu_count", "?")}
        )
        packages = {"python": last.get("python")} | dict(last.get("packages", {}))
        facts["versions"] = ", ".join(f"{name} {version}" for name, version in packages.items() if version)
    return {key: fact for key, fact in facts.items() if fact}


def _seconds(run: Run) -> tuple[float, bool]:
    """Wall-clock time of all starts, and whether it is taken from the times of files."""
    total, about = 0.0, not run.starts
    for start in run.starts:
        began = datetime.datetime.fromisoformat(start["time"])
        if "ended" in start:
            total += (datetime.datetime.fromisoformat(start["ended"]) - began).total_seconds()
        elif start is run.starts[-1]:
            total, about = total + max((run.last_written - began).total_seconds(), 0), True
        else:
            about = True
    return total, about


def _seconds_by_stage(run: Run) -> dict[str, float]:
    """Seconds of all starts by what they went into; nothing where no file says it."""
    found: dict[str, float] = {}
    for start in run.starts:
        for stage, taken in start.get("seconds", {}).items():
            key = _stage(stage)
            found[key] = found.get(key, 0.0) + taken
    return found


def _shown_stages(by_stage: Mapping[str, float], seconds: float) -> dict[str, float]:
    """The stages with what of the whole time is none of them, without those that took next to nothing."""
    if not by_stage or seconds <= 0:
        return {}
    found = dict(by_stage)
    found["other"] = found.pop("other", 0.0) + max(seconds - sum(by_stage.values()), 0.0)
    return {key: taken for key, taken in found.items() if taken >= 0.005 * seconds}


def _stage(name: str) -> str:
    return _STAGES.get(name.split()[0].rstrip(","), "other") if name.split() else "other"


def _when(time: str | None) -> str:
    return datetime.datetime.fromisoformat(time).strftime("%Y-%m-%d %H:%M UTC") if time else "?"


def clock(seconds: float) -> str:
    """Hours, minutes and seconds, the larger ones only where there are any."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
