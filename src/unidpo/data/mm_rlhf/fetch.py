"""Fetch MM-RLHF, or the pairs Uni-DPO was trained on, from a hub: plan, download, verify, unpack."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal, TypeAlias

from rich.console import Console
from rich.table import Table
from rich.text import Text

from unidpo.data.mm_rlhf.archives import Extracted, Progress, extract, top_folders, unpacked_size
from unidpo.data.mm_rlhf.hubs import FetchError, Hub, RemoteFile, Source, open_hub
from unidpo.data.mm_rlhf.record import FetchRecord
from unidpo.errors import DataError, did_you_mean, shown
from unidpo.files.locks import locked

DataSet: TypeAlias = Literal["mm-rlhf", "uni-dpo"]

REPOS: dict[tuple[DataSet, Source], str] = {
    ("mm-rlhf", "huggingface"): "yifanzhang114/MM-RLHF",
    ("uni-dpo", "huggingface"): "psp-dada/Uni-DPO",
    ("uni-dpo", "modelscope"): "pspdada/Uni-DPO",
}
SUBSETS: dict[DataSet, tuple[str, ...]] = {
    "mm-rlhf": ("long", "short", "mcq", "safety", "video"),
    "uni-dpo": ("multimodal", "textual", "math"),
}
DEFAULT_SUBSETS: dict[DataSet, tuple[str, ...]] = {
    "mm-rlhf": ("long", "short", "mcq"),
    "uni-dpo": ("multimodal",),
}
_MM_RLHF_ALWAYS = ("data.jsonl", "dpo_pairs.jsonl")
_DATA_SUFFIXES = (".json", ".jsonl", ".parquet", ".zip")
_MB = 1_000_000
_NAMED = 20
"""Of damaged files so many are named."""
# Photographs hardly pack, so an archive unpacks to about its own size; a bound far above that stops a bomb.
_UNPACKED_ESTIMATE = 1.05
_UNPACKED_BOUND = 10
_UNPACKED_BOUND_FREE = 1 << 30
_SPARE_BYTES = 64 * _MB


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
        source: the hub.
        to: the folder everything goes to.
        steps: the files, in the order they are fetched.
        free: bytes free on the disk of `to`.
    """

    repo: str
    source: Source
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
                f"{self.to}: {_size(self.needed_bytes)} are needed ({_size(self.download_bytes)} to download, the rest "
                f"unpacked), but only {_size(self.free)} are free; free space, choose another folder, or fewer subsets"
            )

    def render(self, console: Console) -> None:
        """Print what will be downloaded, and how large it is."""
        table = Table(title=Text(f"{self.repo} ({self.source}) to {self.to}"), title_justify="left")
        for name, justify in (("file", "left"), ("size", "right"), ("to download", "right"), ("unpacks to", "right")):
            table.add_column(name, justify="right" if justify == "right" else "left")
        for step in self.steps:
            unpacks = f"about {_size(step.unpacks_to)}" if step.unpacks_to else ""
            missing = _size(step.missing) if step.missing else "there"
            table.add_row(Text(step.remote.path), _size(step.remote.size), missing, unpacks)
        console.print(table)
        verdict = f"{_size(self.download_bytes)} to download, about {_size(self.needed_bytes)} of disk needed"
        console.print(f"{verdict}, {_size(self.free)} free", markup=False, highlight=False, soft_wrap=True)


@dataclass(frozen=True, slots=True)
class Fetched:
    """What a fetch came to.

    Attributes:
        plan: what was planned.
        downloaded: bytes downloaded, 0 where everything was there.
        unpacked: what each archive unpacked to, by its path on the hub.
        damaged: files that were there, of the right size, with other content than the hub's; they were fetched again.
    """

    plan: FetchPlan
    downloaded: int = 0
    unpacked: dict[str, Extracted] = field(default_factory=dict)
    damaged: tuple[str, ...] = ()

    def render(self, console: Console) -> None:
        """Print what was fetched, and what can be done next."""
        lines = [f"{_size(self.downloaded)} downloaded to {self.plan.to}"]
        lines += [f"{path}: differed from the hub's checksum, fetched again" for path in self.damaged]
        lines += [f"{path}: {e.files:,} files, {e.written:,} new" for path, e in self.unpacked.items()]
        for path, extracted in self.unpacked.items():
            lines += [f"{path}: {shown(name)} was damaged, unpacked again" for name in extracted.damaged[:_NAMED]]
            if (more := len(extracted.damaged) - _NAMED) > 0:
                lines.append(f"{path}: ... and {more:,} more")
        for line in lines:
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def plan_fetch(
    dataset: DataSet,
    to: str | Path,
    *,
    source: Source = "huggingface",
    subsets: Sequence[str] | None = None,
    repo: str | None = None,
    endpoint: str | None = None,
) -> FetchPlan:
    """Ask the hub what there is, look at the disk, and say what a fetch would do. Nothing is downloaded.

    Args:
        dataset: ``mm-rlhf`` (ratings, pairs and images) or ``uni-dpo`` (the reference's scored pairs, without images:
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
    return _plan(dataset, Path(to), open_hub(source, endpoint), source, subsets, repo)


def fetch(
    dataset: DataSet,
    to: str | Path,
    *,
    source: Source = "huggingface",
    subsets: Sequence[str] | None = None,
    repo: str | None = None,
    endpoint: str | None = None,
    keep_archives: bool = True,
    dry_run: bool = False,
    on_plan: Callable[[FetchPlan], None] | None = None,
    on_progress: Progress | None = None,
) -> Fetched:
    """Download a data set, compare it with the hub's sizes and checksums, and unpack its archives beside it.

    A call that was broken off anywhere goes on where it was. A call after a finished one brings only what was damaged
    since.

    Args:
        dataset: see `plan_fetch`, as are `to`, `source`, `subsets`, `repo` and `endpoint`.
        to: the folder everything goes to.
        source: the hub.
        subsets: the parts of the data set.
        repo: another id on the hub.
        endpoint: another address of the hub.
        keep_archives: keep the zip files once they are unpacked. Without them a later call does not fetch them again.
        dry_run: plan, and stop there.
        on_plan: called with the plan before the disk is checked and the first byte is downloaded.
        on_progress: called with a stage, how much of it is done, and how much there is.

    Raises:
        DataError: as `plan_fetch`; the disk has too little room, or an archive must not be unpacked.
        FolderInUse: another process fetches into this folder.
        FetchError: the hub cannot be reached, broke off too often, or sent something else than it promised.
    """
    hub = open_hub(source, endpoint)
    plan = _plan(dataset, Path(to), hub, source, subsets, repo)
    if on_plan is not None:
        on_plan(plan)
    plan.refuse_if_too_large()
    if dry_run:
        return Fetched(plan)
    try:
        with locked(plan.to):
            record = FetchRecord(plan.to)
            downloaded, unpacked, damaged = 0, {}, []
            for step in plan.steps:
                if not step.verified:
                    there = step.place.is_file() and step.place.stat().st_size == step.remote.size
                    received = _download(hub, plan.repo, step, on_progress)
                    damaged += [step.remote.path] if there and received else []
                    downloaded += received
                    record.add_file(step.remote, step.place)
            for step in plan.steps:
                if step.unpack:
                    unpacked[step.remote.path] = _unpack(step, on_progress)
                    record.add_unpacked(step.remote)
                    if not keep_archives:
                        step.place.unlink()
    except OSError as error:
        raise DataError(f"{plan.to}: cannot be written: {error.strerror or error}; choose another folder") from error
    return Fetched(plan, downloaded, unpacked, tuple(damaged))


def _plan(
    dataset: DataSet, to: Path, hub: Hub, source: Source, subsets: Sequence[str] | None, repo: str | None
) -> FetchPlan:
    if dataset not in SUBSETS:
        raise DataError(f"there is no data set {shown(dataset)} to fetch; choose mm-rlhf or uni-dpo")
    wanted = tuple(dict.fromkeys(DEFAULT_SUBSETS[dataset] if subsets is None else subsets))
    for subset in wanted:
        if subset not in SUBSETS[dataset]:
            known = SUBSETS[dataset]
            hint = did_you_mean(subset, known)
            raise DataError(f"{dataset} has no subset {shown(subset)}; there are {', '.join(known)}{hint}")
    repo = repo or REPOS.get((dataset, source))
    if repo is None:
        raise DataError(f"it is not known under which id {source} has {dataset}; give it with `--repo owner/name`")
    existing = next(folder for folder in [to.absolute(), *to.absolute().parents] if folder.exists())
    if not existing.is_dir():
        raise DataError(f"{to}: {existing} is a file; choose a folder")

    files = {file.path: file for file in hub.files(repo)}
    chosen = _mm_rlhf(wanted) if dataset == "mm-rlhf" else _uni_dpo(files, wanted)
    missing = [path for path in chosen if path not in files]
    if missing or not chosen:
        what = ", ".join(missing) or f"no data file of {', '.join(wanted)}"
        raise DataError(f"{repo}: the repository does not have {what}; check the id (`--repo`) and the subsets")
    record = FetchRecord(to)
    steps = tuple(_step(hub, files[path], to, record) for path in chosen)
    return FetchPlan(repo, source, to, steps, shutil.disk_usage(existing).free)


def _mm_rlhf(subsets: Sequence[str]) -> list[str]:
    return [*_MM_RLHF_ALWAYS, *(f"{subset}.zip" for subset in subsets)]


def _uni_dpo(files: Collection[str], subsets: Sequence[str]) -> list[str]:
    """The text sets lie in folders of their name; everything else is multimodal."""

    def subset(path: str) -> str:
        first = path.partition("/")[0].lower()
        return first if first in ("textual", "math") else "multimodal"

    return sorted(path for path in files if path.endswith(_DATA_SUFFIXES) and subset(path) in subsets)


def _step(hub: Hub, remote: RemoteFile, to: Path, record: FetchRecord) -> FileStep:
    path = PurePosixPath(remote.path)
    if path.is_absolute() or not path.parts or ".." in path.parts or "\\" in remote.path:
        raise DataError(
            f"{shown(remote.path)}: this name on the hub points outside the folder; check the id (`--repo`)"
        )
    place = to / path
    if place.is_symlink() or place.is_dir():
        raise DataError(f"{place}: a link or folder lies where the file belongs; remove it")
    is_archive = path.suffix == ".zip"
    there = place.is_file() and place.stat().st_size == remote.size
    if is_archive and not place.exists() and record.has_unpacked(remote):
        return FileStep(remote, place, remote.size, verified=True, unpacks_to=0, unpack=False)
    verified = there and record.has_file(remote, place)
    unpacks_to = 0
    if is_archive and not record.has_unpacked(remote):
        unpacks_to = unpacked_size(place) if verified else int(remote.size * _UNPACKED_ESTIMATE)
    present = remote.size if there else min(remote.size, hub.on_disk(remote, place))
    return FileStep(remote, place, present, verified, unpacks_to, is_archive)


def _download(hub: Hub, repo: str, step: FileStep, on_progress: Progress | None) -> int:
    """Bring a file to its place, as the hub promised it. Gives the bytes that were downloaded for it."""
    name, size, place = step.remote.path, step.remote.size, step.place
    megabytes = max(1, -(-size // _MB))

    def tell(stage: str, done: int) -> None:
        if on_progress is not None:
            on_progress(f"{stage} {name}, MB", megabytes if done >= size else done // _MB, megabytes)

    # What lies there may be of another version, or broken off by another program.
    if place.is_file() and place.stat().st_size == size and _is_right(step, tell):
        return 0
    place.unlink(missing_ok=True)
    before = hub.on_disk(step.remote, place)
    tell("download", before)
    hub.download(repo, step.remote, place, lambda done: tell("download", done))
    if not place.is_file() or place.stat().st_size != size or not _is_right(step, tell):
        place.unlink(missing_ok=True)
        problem = "what was received differs from the size or checksum the hub gives; it was deleted"
        raise FetchError(f"{place}: {problem}, run the command again to fetch it")
    return size - min(before, size)


def _is_right(step: FileStep, tell: Callable[[str, int], None]) -> bool:
    """Whether a file's content has the hub's checksum, if the hub gives one."""
    remote = step.remote
    if remote.sha256 is None and remote.git_blob is None:
        return True
    # Large files are named by their content's SHA-256, small ones as git names them.
    digest = hashlib.sha256() if remote.sha256 else hashlib.sha1(b"blob %d\0" % remote.size, usedforsecurity=False)
    done = 0
    with step.place.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
            done += len(chunk)
            tell("verify", done)
    return digest.hexdigest() == (remote.sha256 or remote.git_blob)


def _unpack(step: FileStep, on_progress: Progress | None) -> Extracted:
    name = step.place.stem
    # `long.zip` belongs under `long/`, whether its entries begin with that or not.
    target = step.place.parent if top_folders(step.place) <= {name, "__MACOSX"} else step.place.parent / name
    bound = _UNPACKED_BOUND * step.remote.size + _UNPACKED_BOUND_FREE
    return extract(step.place, target, max_bytes=bound, on_progress=on_progress)


def _size(count: int) -> str:
    """A number of bytes in decimal units, as the hubs show them."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:,.1f} {unit}"
    return f"{count} bytes"
