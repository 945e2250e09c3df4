"""What fetching a data set from a hub is going to do: which files, what of them is there, how much room they need."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from unidpo.data.download import size_on_disk, unfinished_of
from unidpo.data.mm_rlhf.archives import is_inside
from unidpo.data.mm_rlhf.hubs import Hub, HubName, RemoteFile, open_hub
from unidpo.data.mm_rlhf.ratings import DEFAULT_SUBSETS, SUBSETS
from unidpo.errors import DataError, require_known, shown
from unidpo.files.writing import write_json

DataSet: TypeAlias = Literal["mm-rlhf", "uni-dpo"]


_REPOS: dict[tuple[DataSet, HubName], str] = {
    ("mm-rlhf", "huggingface"): "yifanzhang114/MM-RLHF",
    ("uni-dpo", "huggingface"): "psp-dada/Uni-DPO",
    ("uni-dpo", "modelscope"): "pspdada/Uni-DPO",
}
_SUBSETS: dict[DataSet, tuple[str, ...]] = {"mm-rlhf": SUBSETS, "uni-dpo": ("multimodal", "textual", "math")}
_DEFAULT_SUBSETS: dict[DataSet, tuple[str, ...]] = {"mm-rlhf": DEFAULT_SUBSETS, "uni-dpo": ("multimodal",)}
_MM_RLHF_ALWAYS = ("data.jsonl", "dpo_pairs.jsonl")
_DATA_SUFFIXES = (".json", ".jsonl", ".parquet", ".zip")
_RECORD = ".unidpo-fetch.json"
# Photographs compress little: an archive unpacks to about its own size.
_UNPACKED_ESTIMATE = 1.05
_SPARE_BYTES = 64_000_000


@dataclass(frozen=True, slots=True)
class FileStep:
    """What is to be done about one file.

    Attributes:
        remote: the file on the hub.
        place: where it belongs on disk.
        present: how many of its bytes are there; all of them if nothing is to be downloaded.
        verified: whether an earlier run compared it with the hub's checksum.
        unpacks_to: about how many bytes it still has to unpack to, 0 if it is no archive.
        unpack: whether it is an archive to unpack (what is unpacked already is skipped file by file).
    """

    remote: RemoteFile
    place: Path
    present: int
    verified: bool
    unpacks_to: int
    unpack: bool

    @property
    def missing(self) -> int:
        """Bytes to download."""
        return self.remote.size - self.present


@dataclass(frozen=True, slots=True)
class FetchPlan:
    """What a fetch is going to do, known before it starts.

    Attributes:
        repo: the data set's id on the hub.
        hub: where it lies.
        to: the folder everything goes to.
        steps: the files, in the order they are fetched.
        free: bytes free on the disk of `to`.
    """

    repo: str
    hub: Hub
    to: Path
    steps: tuple[FileStep, ...]
    free: int

    @property
    def download_bytes(self) -> int:
        """Bytes to download."""
        return sum(step.missing for step in self.steps)

    @property
    def needed_bytes(self) -> int:
        """About how much room downloads and unpacked files take that are not there yet."""
        return self.download_bytes + sum(step.unpacks_to for step in self.steps)

    def refuse_if_too_large(self) -> None:
        """Raise `DataError` if the disk has too little room."""
        if self.needed_bytes and self.needed_bytes + _SPARE_BYTES > self.free:
            raise DataError(
                f"{self.to}: {decimal(self.needed_bytes)} are needed ({decimal(self.download_bytes)} to download, the "
                f"rest unpacked), but only {decimal(self.free)} are free; free space, choose another folder, or fewer "
                "subsets"
            )

    def render(self, console: Console) -> None:
        """Print what will be downloaded, and how large it is."""
        table = Table(title=Text(f"{self.repo} ({self.hub.name}) to {self.to}"), title_justify="left")
        table.add_column("file")
        for name in ("size", "to download", "unpacks to"):
            table.add_column(name, justify="right")
        for step in self.steps:
            unpacks = f"about {decimal(step.unpacks_to)}" if step.unpacks_to else ""
            missing = decimal(step.missing) if step.missing else "there"
            table.add_row(Text(step.remote.path), decimal(step.remote.size), missing, unpacks)
        console.print(table)
        verdict = f"{decimal(self.download_bytes)} to download, about {decimal(self.needed_bytes)} of disk needed"
        console.print(f"{verdict}, {decimal(self.free)} free", markup=False, highlight=False, soft_wrap=True)


def plan_fetch(
    dataset: DataSet,
    to: str | Path,
    *,
    source: HubName = "huggingface",
    subsets: Sequence[str] | None = None,
    repo: str | None = None,
    endpoint: str | None = None,
) -> FetchPlan:
    """Ask the hub what there is, look at the disk, and say what a fetch would do. Nothing is downloaded.

    Args:
        dataset: ``mm-rlhf`` (ratings, pairs and images) or ``uni-dpo`` (the authors' scored pairs, without images:
            those are MM-RLHF's).
        to: the folder everything goes to; it need not exist.
        source: the hub.
        subsets: of ``mm-rlhf`` long, short, mcq, safety, video, the first three by default; of ``uni-dpo``
            multimodal, textual, math, the first by default.
        repo: the data set's id on the hub, where it is not the usual one.
        endpoint: the hub's address, where it is not the usual one (a mirror).

    Raises:
        DataError: a name is unknown, the repository has not the files, or `to` is a file.
        FetchError: the hub cannot be reached.
    """
    hub, to = open_hub(source, endpoint), Path(to)
    require_known("data fetch", "data set", [dataset], _SUBSETS)
    wanted = tuple(dict.fromkeys(_DEFAULT_SUBSETS[dataset] if subsets is None else subsets))
    require_known("--subsets", "subset", wanted, _SUBSETS[dataset])
    repo = repo or _REPOS.get((dataset, source))
    if repo is None:
        raise DataError(f"it is not known under which id {source} has {dataset}; give it with `--repo owner/name`")
    existing = next(folder for folder in [to.absolute(), *to.absolute().parents] if folder.exists())
    if not existing.is_dir():
        raise DataError(f"{to}: {existing} is a file; choose a folder")

    files = {file.path: file for file in hub.files(repo)}
    mm_rlhf = [*_MM_RLHF_ALWAYS, *(f"{subset}.zip" for subset in wanted)]
    chosen = mm_rlhf if dataset == "mm-rlhf" else _uni_dpo(files, wanted)
    missing = [path for path in chosen if path not in files]
    if missing or not chosen:
        what = ", ".join(missing) or f"no data file of {', '.join(wanted)}"
        raise DataError(f"{repo}: the repository does not have {what}; check the id (`--repo`) and the subsets")
    record = FetchRecord(to)
    steps = tuple(_step(files[path], to, record) for path in chosen)
    return FetchPlan(repo, hub, to, steps, shutil.disk_usage(existing).free)


def _uni_dpo(files: Collection[str], subsets: Sequence[str]) -> list[str]:
    """The text sets lie in folders of their name; everything else is multimodal."""
    chosen = []
    for path in files:
        folder = path.partition("/")[0].lower()
        subset = folder if folder in ("textual", "math") else "multimodal"
        if subset in subsets and path.endswith(_DATA_SUFFIXES):
            chosen.append(path)
    return sorted(chosen)


def _step(remote: RemoteFile, to: Path, record: FetchRecord) -> FileStep:
    place = to / remote.path
    if not is_inside(to, place):
        problem = "this name on the hub points outside the folder; check the id (`--repo`)"
        raise DataError(f"{shown(remote.path)}: {problem}")
    is_archive, is_unpacked = place.suffix == ".zip", record.has_unpacked(remote)
    if is_unpacked and not place.exists():
        return FileStep(remote, place, remote.size, verified=True, unpacks_to=0, unpack=False)
    there = remote.has_size(place)
    return FileStep(
        remote,
        place,
        present=remote.size if there else min(remote.size, size_on_disk(unfinished_of(place, remote.identity))),
        verified=there and record.has_file(remote, place),
        unpacks_to=int(remote.size * _UNPACKED_ESTIMATE) if is_archive and not is_unpacked else 0,
        unpack=is_archive,
    )


class FetchRecord:
    """What earlier calls verified and unpacked, in a file beside the data: 15 GB are not hashed twice."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / _RECORD
        self.kept: dict[str, dict[str, Any]] = {"files": {}, "unpacked": {}}
        try:
            saved = json.loads(self.path.read_text("utf-8"))
            self.kept = {part: dict(saved[part]) for part in self.kept}
        except (OSError, ValueError, KeyError, TypeError):
            pass  # without a record everything is verified again

    def has_file(self, remote: RemoteFile, place: Path) -> bool:
        """Whether a file was verified, and not touched since."""
        return bool(self.kept["files"].get(remote.path) == [remote.identity, *_state(place)])

    def has_unpacked(self, remote: RemoteFile) -> bool:
        return bool(self.kept["unpacked"].get(remote.path) == remote.identity)

    def add_file(self, remote: RemoteFile, place: Path) -> None:
        self.kept["files"][remote.path] = [remote.identity, *_state(place)]
        write_json(self.path, self.kept)

    def add_unpacked(self, remote: RemoteFile) -> None:
        self.kept["unpacked"][remote.path] = remote.identity
        write_json(self.path, self.kept)


def _state(place: Path) -> list[int]:
    """What changes when a file is written. A copy can bring its old time of change along, but not that of its node."""
    stat = place.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
