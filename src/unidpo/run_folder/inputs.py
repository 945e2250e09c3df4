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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from unidpo.data.images import content_digest
from unidpo.data.pairs import PromptGroup
from unidpo.errors import Finding, ImageError, RunError, from_findings
from unidpo.files.writing import replacing, write_json

_LOG = logging.getLogger(__name__)
_DIGEST = 8
_FILE = "inputs.json"
_CONTENTS = ("prompt", "images", "responses", "scores", "pairs")
"""Columns of digests."""
_SCHEMA = pa.schema(
    [
        pa.field("held_out", pa.bool_(), metadata={"description": "whether it is measured on, and not trained on"}),
        pa.field("file", pa.string(), metadata={"description": "data file of the group's first pair"}),
        pa.field("rows", pa.list_(pa.int32()), metadata={"description": "rows of the file that its pairs come from"}),
        *(pa.field(name, pa.binary(_DIGEST), metadata={"description": f"digest of {name}"}) for name in _CONTENTS),
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
    prompt: bytes
    images: bytes
    responses: bytes
    scores: bytes
    pairs: bytes

    @property
    def contents(self) -> tuple[bytes, ...]:
        return self[3:]


@dataclass(frozen=True, slots=True)
class DataFile:
    """A data set as the recipe names it, with the SHA-256 of its content where it is a file."""

    path: str
    weight: float
    sha256: str | None


class Inputs:
    """Records what a run is begun with, or refuses to resume it with something else.

    Args:
        run: the run folder, with `inputs.parquet` (the data) and `inputs.json` (files and models).
        resume: compare with what is recorded; else record.
    """

    def __init__(self, run: Path, *, resume: bool) -> None:
        self._run = run
        self._groups = run / "inputs.parquet"
        self._resume = resume

    def check_data(
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
            on_progress: called with groups done and groups to do.

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
            with replacing(self._groups) as unfinished:
                table = pa.Table.from_pylist([group._asdict() for group in described], schema=_SCHEMA)
                pq.write_table(table, unfinished, write_page_checksum=True)
            self._add({"data": [asdict(file) for file in files]})
            return {}
        self._refuse(_differences(self._read_groups(), described))
        return {now.path: then.path for then, now in zip(began_with(self._run), files, strict=False)}

    def check_models(self, digests: Mapping[str, str]) -> None:
        """Record digests of `model`, `reference` or `processor`, or compare them. Raises `RunError`."""
        record, version = _read_file(self._run), importlib.metadata.version("transformers")
        recorded, before = record.get("digests", {}), record.get("transformers", version)
        changed = [name for name, digest in digests.items() if recorded.get(name, digest) != digest]
        hint = "" if version == before else f" (transformers was {before}, is {version})"
        self._refuse([Finding("changed-model", _MODELS[name] + hint) for name in changed])
        if digests.keys() - recorded.keys():
            self._add({"transformers": before, "digests": {**digests, **recorded}})

    def _refuse(self, findings: Sequence[Finding]) -> None:
        if findings:
            remedy = "put it back, or give another `output`. What differs:"
            raise from_findings(RunError, f"{self._run}: this run began with something else; {remedy}", findings)

    def _read_groups(self) -> list[_Group]:
        try:
            table = pq.read_table(self._groups, schema=_SCHEMA, page_checksum_verification=True)
        except (OSError, pa.ArrowException) as error:
            reason = " ".join(str(error).split())
            raise RunError(
                f"{self._groups}: is damaged ({reason}); delete it to resume with the data as it is"
            ) from error
        return [_Group(**{**row, "rows": tuple(row["rows"])}) for row in table.to_pylist()]

    def _add(self, more: Mapping[str, Any]) -> None:
        write_json(self._run / _FILE, {**_read_file(self._run), **more})


def began_with(run: Path) -> list[DataFile]:
    """The data files that a run was begun with. Raises `RunError` where their record is damaged."""
    return [DataFile(**file) for file in _read_file(run).get("data", [])]


def _read_file(run: Path) -> dict[str, Any]:
    path = run / _FILE
    try:
        return dict(json.loads(path.read_text("utf-8"))) if path.is_file() else {}
    except (ValueError, TypeError) as error:
        raise RunError(f"{path}: is damaged ({error}); delete it to resume with the models as they are") from error


def data_file(path: str, weight: float) -> DataFile:
    """A data set as it is now."""
    digest = None
    if Path(path).is_file():
        with Path(path).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    return DataFile(path, weight, digest)


# --- what a group holds -----------------------------------------------------------------------------------------------


def _described(group: PromptGroup, *, held_out: bool) -> _Group:
    file = group.pairs[0].file
    scores = [b"none" if r.score is None else struct.pack("<d", r.score) for r in group.responses]
    return _Group(
        held_out,
        None if file is None else str(file),
        tuple(dict.fromkeys(pair.row for pair in group.pairs)),
        prompt=_digest(part for message in group.messages for part in (message.role, message.text)),
        images=_digest(map(_image_digest, group.images)),
        responses=_digest(response.text for response in group.responses),
        scores=_digest(scores),
        pairs=_digest(f"{pair.chosen} {pair.rejected}" for pair in group.pairs),
    )


def _image_digest(source: Any) -> bytes:
    try:
        return content_digest(source)
    except ImageError:  # since the check; the run stops or leaves it out, as the recipe says
        return b"unreadable"


def _digest(parts: Iterable[str | bytes]) -> bytes:
    digest = hashlib.blake2b(digest_size=_DIGEST)
    for part in parts:
        data = part.encode(errors="surrogatepass") if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.digest()


# --- what differs -----------------------------------------------------------------------------------------------------


def _differences(before: Sequence[_Group], now: Sequence[_Group]) -> list[Finding]:
    """What was recorded against what is there, both in the order of files and rows; nothing where they are the same."""
    then, here = _by_place(_without(before, now), before), _by_place(_without(now, before), now)
    if not then and not here:
        moved = [is_ for was, is_ in zip(before, now, strict=True) if was._replace(file=is_.file) != is_]
        return _at("order of the rows, or which are held out: {}", moved)
    changed = [(then[place], here[place]) for place in here if place in then]
    findings: list[Finding] = []
    for at, what in enumerate(_CONTENTS):
        findings += _at(f"{what} of {{}}", [is_ for was, is_ in changed if was.contents[at] != is_.contents[at]])
    findings += _at("{} gone", [group for place, group in then.items() if place not in here])
    return findings + _at("{} added", [group for place, group in here.items() if place not in then])


def _by_place(groups: Iterable[_Group], among: Iterable[_Group]) -> dict[tuple[int, tuple[int, ...]], _Group]:
    """Groups by the number of their file, which may have another name now, and their rows."""
    files = list(dict.fromkeys(group.file for group in among))
    return {(files.index(group.file), group.rows): group for group in groups}


def _without(groups: Sequence[_Group], others: Sequence[_Group]) -> list[_Group]:
    """Groups whose content is not among the others, each as often as it is missing there."""
    left = Counter(group.contents for group in others)
    missing = []
    for group in groups:
        left[group.contents] -= 1
        if left[group.contents] < 0:
            missing.append(group)
    return missing


def _at(what: str, groups: Iterable[_Group]) -> list[Finding]:
    """A finding per file that says what is with the rows of these groups, which stand in place of `{}`."""
    rows: dict[str | None, dict[int, None]] = {}
    for group in groups:
        rows.setdefault(group.file, {}).update(dict.fromkeys(group.rows))
    return [Finding("changed-data", what.format(_listed(list(found))), file=file) for file, found in rows.items()]


def _listed(rows: Sequence[int]) -> str:
    if len(rows) == 1:
        return f"row {rows[0]}"
    shown = ", ".join(map(str, rows[:_SHOWN_ROWS]))
    return f"rows {shown}{', ...' if len(rows) > _SHOWN_ROWS else ''} ({len(rows)} rows)"
