"""From another tool's configuration to a recipe, with every key accounted for."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from omegaconf import OmegaConf

from unidpo.config.loading import recipe_from
from unidpo.config.neighbours import TRL
from unidpo.config.neighbours.table import OPEN, Given, Neighbour, NoEqual, NotNeeded, Outcome, Taken
from unidpo.config.schema import Recipe
from unidpo.errors import RecipeError, did_you_mean
from unidpo.losses import LOSSES
from unidpo.redaction import holds_a_secret, names_a_secret

Kind = Literal["open", "no-equal", "differs", "taken", "default", "not-needed"]
TITLES: Mapping[Kind, str] = {
    "open": "to fill in: the recipe holds ??? there",
    "no-equal": "without an equal: the run differs in this",
    "differs": "taken, with a difference",
    "taken": "taken",
    "default": "not given: {name}'s own default, written into the recipe",
    "not-needed": "not needed here: the run is the same without",
}
"""What can become of a key, from what asks most of the reader to what asks nothing."""
_REQUIRED = {"output": "the run folder", "model.name": "the model", "data.path": "the data"}
_SECTIONS = ("output", "model", "data", "loss", "reference", "lora", "train", "eval")


@dataclass(frozen=True, slots=True)
class Line:
    """What became of one key.

    Attributes:
        key, value: as the configuration has them; a value that may be a secret is `***`.
        kind: one of `TITLES`.
        ours: the dotted keys of ours it went into, with their values.
        note: what differs, why there is no equal, and what to do.
    """

    key: str
    value: Any
    kind: Kind
    ours: Mapping[str, Any]
    note: str = ""

    def __str__(self) -> str:
        """The key as it was given, what it became, and the note, on one line."""
        given = self.key if self.value is None else f"{self.key}: {_text(self.value)}"
        became = f" → {', '.join(f'{key}: {_text(value)}' for key, value in self.ours.items())}" if self.ours else ""
        return f"{given}{became}{f' ({self.note})' if self.note else ''}"


@dataclass(frozen=True, slots=True)
class Converted:
    """A recipe made of another tool's configuration.

    Attributes:
        name: of the tool.
        values: the recipe as plain values; a key that has to be filled in holds ``???``.
        lines: what became of each key, and of the tool's defaults that are not ours.
        processes: how many the configuration is started with, where it says so.
    """

    name: str
    values: Mapping[str, Any]
    lines: tuple[Line, ...]
    processes: int | None = None

    @property
    def recipe(self) -> Recipe:
        """The recipe. Raises `RecipeError` where something has to be filled in."""
        if left := [line for line in self.lines if line.kind == "open"]:
            raise RecipeError("\n".join([f"{self.name}: to fill in", *map(str, left)]))
        return recipe_from(self.values)

    def to_yaml(self) -> str:
        """The recipe as a file."""
        return OmegaConf.to_yaml(OmegaConf.create(dict(self.values)))

    def report(self) -> str:
        """Every key, under what became of it."""
        parts = []
        for kind, title in TITLES.items():
            if lines := [line for line in self.lines if line.kind == kind]:
                parts.append("\n  ".join([f"{title.format(name=self.name)} ({len(lines)})", *map(str, lines)]))
        return "\n".join(parts)


def convert(
    neighbour: Neighbour,
    values: Mapping[str, Any],
    *,
    processes: int | None = None,
    find_data: Callable[[str, str], str | None] = lambda name, folder: None,
) -> Converted:
    """A recipe of what another tool's configuration says.

    Args:
        neighbour: the tool.
        values: its keys.
        processes: how many it is started with, where that is known.
        find_data: the file or hub name of a data set that is named in a ``dataset_info.json``, by name and folder.
    """
    left_out = {key for key in neighbour.defaults.keys() & values.keys() if values[key] is None}
    left_out = {key for key in left_out if not neighbour.rows[key].null}
    values = {key: value for key, value in values.items() if key not in left_out}
    given = Given({**neighbour.defaults, **values}, processes, find_data)
    lines = [_line(neighbour, key, value, given) for key, value in values.items()]
    for key, value in neighbour.defaults.items():
        if key not in values:
            line = _line(neighbour, key, value, given)
            lines.append(replace(line, kind="default", value=value) if line.kind in ("taken", "differs") else line)
    lines += [Line(key, None, "default", {key: value}, note) for key, (value, note) in neighbour.always.items()]
    lines = _completed(_without_strangers(lines))
    return Converted(neighbour.name, _nested(lines), tuple(_said(lines, values)), processes)


def recipe_from_trl_config(config: Any, *, model: str, data: str, peft_config: Any = None) -> Converted:
    """A recipe of TRL's `DPOConfig`, or of its values as a mapping; `.recipe` is the recipe, `.report()` says the rest.

    Args:
        config: the configuration. Of an object only what differs from its class's defaults is a key.
        model: what the trainer was given as `model`.
        data: what it was given as `train_dataset`, as a file or a hub name.
        peft_config: peft's `LoraConfig` where one was given.
    """
    values = dict(config) if isinstance(config, Mapping) else _changed(config)
    values |= {"model_name_or_path": model, "data.path": data}
    if peft_config is not None:
        ours = {"lora_r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "use_rslora": "use_rslora"}
        ours |= {"use_dora": "use_dora", "lora_target_modules": "target_modules"}
        settings = {theirs: getattr(peft_config, name, None) for theirs, name in ours.items()}
        targets = settings["lora_target_modules"]
        settings["lora_target_modules"] = sorted(targets) if isinstance(targets, set) else targets
        values |= {"use_peft": True, **{key: value for key, value in settings.items() if value is not None}}
    return convert(TRL, values)


def _changed(config: Any) -> dict[str, Any]:
    """What an object of `TrainingArguments` says beyond the defaults of its class."""
    plain = {"bf16": config.bf16, "fp16": config.fp16, "use_cpu": config.use_cpu}
    with warnings.catch_warnings(action="ignore"):  # of defaults that nobody here chose
        usual = type(config)(output_dir=config.output_dir, **plain).to_dict()
    said = {key: value for key, value in config.to_dict().items() if value != usual.get(key)}
    return {"output_dir": config.output_dir, "bf16": bool(config.bf16), "fp16": bool(config.fp16)} | said


def _line(neighbour: Neighbour, key: str, value: Any, given: Given) -> Line:
    row = neighbour.row(key)
    shown = "***" if names_a_secret(key) or holds_a_secret(str(value)) else value
    if key in _REQUIRED and row is None:  # ours, from Python
        return Line(key, shown, "taken", {key: value})
    if row is None:
        return Line(key, shown, "no-equal", {}, f"{neighbour.name} has no such key{did_you_mean(key, neighbour.rows)}")
    if _is_variable(value):
        ours = {row.ours: OPEN} if row.ours else {}
        kind: Kind = "open" if ours or row.take is not None else "not-needed"
        return Line(key, shown, kind, ours, f"its value is not in the file: give {key}=VALUE behind it")
    return _of(key, shown, row.outcome(value, given))


def _of(key: str, value: Any, outcome: Outcome) -> Line:
    match outcome:
        case Taken(values, note):
            return Line(key, value, "differs" if note else "taken", values, note)
        case NoEqual(reason, leaves_open):
            return Line(
                key, value, "open" if leaves_open else "no-equal", {leaves_open: OPEN} if leaves_open else {}, reason
            )
        case NotNeeded(reason):
            return Line(key, value, "not-needed", {}, reason)


def _is_variable(value: Any) -> bool:
    return isinstance(value, str) and ("$" in value or "`" in value)


def _without_strangers(lines: list[Line]) -> list[Line]:
    """Lines about knobs of a loss, or of an adapter, that the recipe does not have are not needed."""
    values = _dotted(lines)
    loss, adapter = str(values.get("loss.name", "uni_dpo")), "lora" not in values
    known = LOSSES[loss].model_fields if loss in LOSSES else {}
    reasons = {
        "loss": f"is no knob of the loss {loss}" if loss != OPEN else "goes with the loss, which is to be filled in"
    }
    reasons |= {} if adapter else {"lora": "there is no adapter"}
    kept = []
    for line in lines:
        for section, reason in reasons.items():
            inside = [key.partition(".")[2] for key in line.ours if key.startswith(f"{section}.")]
            if (section == "lora" and inside) or any(name not in {"name", *known} for name in inside):
                line = replace(line, kind="not-needed", ours={}, note=reason)
        kept.append(line)
    return kept


def _completed(lines: list[Line]) -> list[Line]:
    """With a line for what every recipe needs, and without values that a recipe refuses."""
    for key, name in _REQUIRED.items():
        if key not in _dotted(lines):
            lines = [*lines, Line(key, None, "open", {key: OPEN}, f"{name} is not in the file")]
    for _ in lines:
        refused = _refused(lines)
        if not refused:
            break
        lines = [_refuse(line, refused) for line in lines]
    return lines


def _refused(lines: list[Line]) -> dict[str, str]:
    """Dotted keys whose values a recipe does not take, each with the reason."""
    flat = {key: value for key, value in _dotted(lines).items() if value != OPEN}
    flat = {**_REQUIRED, "loss.name": "uni_dpo", **flat}
    try:
        recipe_from(_tree(flat))
    except RecipeError as error:
        return {str(finding.key): finding.message for finding in error.findings}
    return {}


def _refuse(line: Line, refused: Mapping[str, str]) -> Line:
    for key, reason in refused.items():
        if taken := [ours for ours in line.ours if key == ours or key.startswith((f"{ours}.", f"{ours}["))]:
            left = {ours: value for ours, value in line.ours.items() if ours not in taken}
            return replace(line, kind="no-equal", ours=left, note=f"`{key}` {reason}")
    return line


def _said(lines: list[Line], values: Mapping[str, Any]) -> list[Line]:
    """The lines that a reader needs: all keys that were given, and defaults that are not ours."""
    bare = recipe_from({"output": "o", "model": {"name": "m"}, "data": {"path": "p"}}).resolved()
    loss = LOSSES.get(str(_dotted(lines).get("loss.name")), LOSSES["uni_dpo"])
    knobs = {f"loss.{key}": field.default for key, field in loss.model_fields.items()}
    ours = _flat(bare) | knobs | {"loss.name": "uni_dpo"}
    return [
        line
        for line in lines
        if line.key in values
        or line.kind in ("open", "no-equal")
        or (line.kind == "default" and any(ours.get(key) != value for key, value in line.ours.items()))
    ]


def _dotted(lines: list[Line]) -> dict[str, Any]:
    return {key: value for line in lines for key, value in line.ours.items()}


def _nested(lines: list[Line]) -> dict[str, Any]:
    return _tree(_dotted(lines))


def _tree(dotted: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in sorted(dotted.items(), key=_place):
        section, _, name = key.partition(".")
        if name:
            inside = tree.setdefault(section, {})
            if isinstance(inside, dict):
                inside[name] = value
        else:
            tree[section] = value
    return tree


def _place(item: tuple[str, Any]) -> tuple[int, bool]:
    """Where a key stands in a recipe: by its section, names and paths in front."""
    section, _, key = item[0].partition(".")
    return _SECTIONS.index(section), key not in ("name", "path")


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        f"{section}.{key}" if key else section: value
        for section, inside in values.items()
        for key, value in (inside.items() if isinstance(inside, Mapping) else [("", inside)])
    }


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)
