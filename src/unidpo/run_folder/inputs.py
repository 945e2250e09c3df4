"""What a run was begun with, by its content: the data group by group, the base model, the reference, the processor.

Paths identify nothing here: a folder may move, and a file may change under its name.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from unidpo.data.images import content_digest
from unidpo.data.pairs import PromptGroup
from unidpo.errors import Finding, ImageError, RunError, from_findings
from unidpo.files.writing import write_atomically, write_json

_LOG = logging.getLogger(__name__)
_DIGEST = 8
_CONTENTS = {
    "prompt": "prompt text",
    "images": "images",
    "responses": "responses",
    "scores": "scores",
    "pairs": "pairs",
}
"""Columns of digests, and what a message calls them."""
_SCHEMA = pa.schema(
    [
        pa.field("held_out", pa.bool_(), metadata={"description": "whether it is measured on, and not trained on"}),
        pa.field("file", pa.string(), metadata={"description": "data file of the group's first pair"}),
        pa.field("rows", pa.list_(pa.int32()), metadata={"description": "rows of the file that its pairs come from"}),
        *(
            pa.field(name, pa.binary(_DIGEST), metadata={"description": f"digest of {what}"})
            for name, what in _CONTENTS.items()
        ),
    ]
)
_MODELS = {
    "model": "the base model's weights",
    "reference": "the reference model's weights",
    "processor": "the processor or the chat template",
}
_SHOWN_ROWS = 8


class _Group(NamedTuple):
    """One line of `inputs.parquet`: where a group comes from, what it is for, and digests of what it holds."""

    held_out: bool
    file: str | None
    rows: tuple[int, ...]
    contents: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class DataFile:
    """A data set as the recipe names it, with the SHA-256 of its content where it is a file."""

    path: str
    weight: float
    sha256: str | None


class Inputs:
    """Records what a run is begun with, or refuses what it would go on with.

    Args:
        run: the run folder, with `inputs.parquet` (the data) and `inputs.json` (files and models).
        resume: compare with what is recorded; else record.
    """

    def __init__(self, run: Path, *, resume: bool) -> None:
        self._run = run
        self._groups = run / "inputs.parquet"
        self._record = run / "inputs.json"
        self._resume = resume

    def see_data(
        self,
        groups: Sequence[PromptGroup],
        held_out: Sequence[PromptGroup],
        sources: Iterable[tuple[str, float]],
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> dict[str, str]:
        """Record the data, or compare it with what was recorded.

        Args:
            groups: to train on, in their order.
            held_out: to measure on.
            sources: path and weight of each data set.
            on_progress: told groups done and groups to do.

        Returns:
            The name that the run knows each data file by, where that is another than now.

        Raises:
            RunError: the data is another; says what of it, and where.
        """
        marked = [(group, False) for group in groups] + [(group, True) for group in held_out]
        described = []
        for done, (group, is_held_out) in enumerate(marked, start=1):
            described.append(_described(group, held_out=is_held_out))
            on_progress(done, len(marked))
        files = [data_file(path, weight) for path, weight in sources]
        order = {file.path: at for at, file in enumerate(files)}
        described.sort(key=lambda group: (order.get(group.file or "", 0), group.rows[0]))
        if not self._resume or not self._groups.is_file():
            if self._resume and any(self._run.glob("checkpoint-*")):
                _LOG.warning("%s: is gone; whether the data is what the run began with is unknown", self._groups)
            self._write_groups(described)
            self._add({"data": [{"path": f.path, "weight": f.weight, "sha256": f.sha256} for f in files]})
            return {}
        differences = _differences(self._read_groups(), described)
        self._refuse([Finding("changed-data", what, file=file) for file, what in differences])
        return {now.path: then.path for then, now in zip(began_with(self._run), files, strict=False)}

    def see_models(self, digests: Mapping[str, str]) -> None:
        """Record digests of `model`, `reference` or `processor`, or compare them. Raises `RunError`."""
        record, version = self._read(), importlib.metadata.version("transformers")
        recorded, before = record.get("digests", {}), record.get("transformers", version)
        changed = [name for name, digest in digests.items() if recorded.get(name, digest) != digest]
        hint = "" if version == before else f" (transformers was {before}, is {version})"
        self._refuse([Finding("changed-model", _MODELS[name] + hint) for name in changed])
        if digests.keys() - recorded.keys():
            self._add({"transformers": before, "digests": {**digests, **recorded}})

    def _refuse(self, findings: Sequence[Finding]) -> None:
        if findings:
            title = (
                f"{self._run}: this run began with something else; put it back, or give another `output`. What differs:"
            )
            raise from_findings(RunError, title, findings)

    def _write_groups(self, groups: Sequence[_Group]) -> None:
        columns: dict[str, Any] = {name: [getattr(group, name) for group in groups] for name in _Group._fields[:-1]}
        columns |= {name: [group.contents[at] for group in groups] for at, name in enumerate(_CONTENTS)}
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(columns, schema=_SCHEMA), sink, write_page_checksum=True)
        write_atomically(self._groups, sink.getvalue())

    def _read_groups(self) -> list[_Group]:
        try:
            table = pq.read_table(self._groups, schema=_SCHEMA, page_checksum_verification=True)
        except (OSError, pa.ArrowException) as error:
            reason = " ".join(str(error).split())
            raise RunError(f"{self._groups}: is damaged ({reason}); delete it to go on with data as it is") from error
        contents = zip(*(table[name].to_pylist() for name in _CONTENTS), strict=True)
        columns = (table[name].to_pylist() for name in _Group._fields[:-1])
        return [
            _Group(held_out, file, tuple(rows), digests)
            for held_out, file, rows, digests in zip(*columns, contents, strict=True)
        ]

    def _read(self) -> dict[str, Any]:
        return _read_record(self._record)

    def _add(self, more: Mapping[str, Any]) -> None:
        write_json(self._record, {**self._read(), **more})


def began_with(run: Path) -> list[DataFile]:
    """The data files that a run was begun with. Raises `RunError` where their record is damaged."""
    return [DataFile(**file) for file in _read_record(run / "inputs.json").get("data", [])]


def _read_record(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text("utf-8"))) if path.is_file() else {}
    except (ValueError, TypeError) as error:
        raise RunError(f"{path}: is damaged ({error}); delete it to go on with models as they are") from error


def data_file(path: str, weight: float) -> DataFile:
    """A data set as it is now."""
    digest = None
    if Path(path).is_file():
        with Path(path).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    return DataFile(path, weight, digest)


# --- what a group holds -----------------------------------------------------------------------------------------------


def _described(group: PromptGroup, *, held_out: bool) -> _Group:
    first = group.pairs[0]
    prompt = [part for message in group.messages for part in (message.role, message.text)]
    scores = [b"none" if r.score is None else struct.pack("<d", r.score) for r in group.responses]
    contents = (
        _digest(prompt),
        _digest(map(_image_digest, group.images)),
        _digest(response.text for response in group.responses),
        _digest(scores),
        _digest(f"{pair.chosen} {pair.rejected}" for pair in group.pairs),
    )
    rows = tuple(dict.fromkeys(pair.row for pair in group.pairs))
    return _Group(held_out, None if first.file is None else str(first.file), rows, contents)


def _image_digest(source: Any) -> bytes:
    try:
        return content_digest(source)
    except ImageError:  # since the check; the run stops or goes on without it, as the recipe says
        return b"unreadable"


def _digest(parts: Iterable[str | bytes]) -> bytes:
    digest = hashlib.blake2b(digest_size=_DIGEST)
    for part in parts:
        data = part.encode(errors="surrogatepass") if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.digest()


# --- what differs -----------------------------------------------------------------------------------------------------


def _differences(before: Sequence[_Group], now: Sequence[_Group]) -> list[tuple[str | None, str]]:
    """What was recorded against what is there, both in the order of files and rows.

    Each difference with the data file it is in; none where both hold the same in the same order.
    """
    lost, new = _without(before, now), _without(now, before)
    if len(before) != len(now):
        then, there = (sum(len(group.rows) for group in groups) for groups in (before, now))
        differences: list[tuple[str | None, str]] = []
        if then != there:
            rows = "1 row" if abs(there - then) == 1 else f"{abs(there - then)} rows"
            said = f"{rows} {'fewer' if there < then else 'more'} ({there}, and {then} at the start)"
            differences.append((None, said))
        differences += [(file, f"{where} gone") for file, where in _places(lost)]
        return differences + [(file, f"{where} added") for file, where in _places(new)]
    moved = [(was, is_) for was, is_ in zip(before, now, strict=True) if was.contents != is_.contents]
    if len(lost) < len(moved):
        elsewhere = [is_ for _, is_ in moved]
        differences = [(file, f"order of the rows: {where} stand elsewhere") for file, where in _places(elsewhere)]
        return differences + [(file, f"{where} with other content") for file, where in _places(new)]
    differences = []
    for at, name in enumerate(_CONTENTS.values()):
        changed = [is_ for was, is_ in moved if was.contents[at] != is_.contents[at]]
        differences += [(file, f"{name} of {where}") for file, where in _places(changed)]
    if differences:
        return differences
    pairs = list(zip(before, now, strict=True))
    renumbered = [is_ for was, is_ in pairs if was.rows != is_.rows]
    other_side = [is_ for was, is_ in pairs if was.held_out != is_.held_out]
    return [(file, f"numbers of {where}") for file, where in _places(renumbered)] + [
        (file, f"{where} held out, or no longer so") for file, where in _places(other_side)
    ]


def _without(groups: Sequence[_Group], others: Sequence[_Group]) -> list[_Group]:
    """Groups whose content is not among the others, each as often as it is missing there."""
    left = Counter(group.contents for group in others)
    missing = []
    for group in groups:
        left[group.contents] -= 1
        if left[group.contents] < 0:
            missing.append(group)
    return missing


def _places(groups: Iterable[_Group]) -> list[tuple[str | None, str]]:
    """Files with the rows of these groups in them."""
    rows: dict[str | None, dict[int, None]] = {}
    for group in groups:
        rows.setdefault(group.file, {}).update(dict.fromkeys(group.rows))
    return [(file, _listed(list(found))) for file, found in rows.items()]


def _listed(rows: Sequence[int]) -> str:
    if len(rows) == 1:
        return f"row {rows[0]}"
    shown = ", ".join(map(str, rows[:_SHOWN_ROWS]))
    return f"rows {shown}{', ...' if len(rows) > _SHOWN_ROWS else ''} ({len(rows)} rows)"
