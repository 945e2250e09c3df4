"""Fetch MM-RLHF, or the pairs Uni-DPO was trained on, from a hub: plan, download, verify, unpack."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal

from unidpo.data.download import FetchError, in_megabytes, size_on_disk, unfinished_of
from unidpo.data.mm_rlhf.archives import Extracted, extract, top_names
from unidpo.data.mm_rlhf.fetch_plan import FetchPlan, FetchRecord, FileStep
from unidpo.data.mm_rlhf.hubs import RemoteFile
from unidpo.errors import DataError, shown
from unidpo.files.locks import locked
from unidpo.progress import OnProgress

_NAMED = 20
"""Of damaged files so many are named."""
# Photographs compress little, so an archive unpacks to about its own size; a bound far above that stops a bomb.
_UNPACKED_BOUND = 10
_UNPACKED_BOUND_FREE = 1 << 30


@dataclass(frozen=True, slots=True)
class Fetched:
    """The result of a fetch.

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
        lines = [f"{decimal(self.downloaded)} downloaded to {self.plan.to}"]
        lines += [f"{path}: differed from the hub's checksum, fetched again" for path in self.damaged]
        lines += [f"{path}: {e.files:,} files, {e.written:,} new" for path, e in self.unpacked.items()]
        for path, extracted in self.unpacked.items():
            lines += [f"{path}: {shown(name)} was damaged, unpacked again" for name in extracted.damaged[:_NAMED]]
            if (more := len(extracted.damaged) - _NAMED) > 0:
                lines.append(f"{path}: ... and {more:,} more")
        for line in lines:
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def fetch(plan: FetchPlan, *, keep_archives: bool = True, on_progress: OnProgress | None = None) -> Fetched:
    """Download a data set, compare it with the hub's sizes and checksums, and unpack its archives beside it.

    An interrupted call is resumed by the next one. A call after a finished one brings only what was damaged since.

    Args:
        plan: what is to be done, by `plan_fetch`.
        keep_archives: keep the zip files once they are unpacked. Without them a later call does not fetch them again.
        on_progress: called with a stage, how much of it is done, and how much there is.

    Raises:
        DataError: the disk has too little room, or an archive must not be unpacked.
        FolderInUse: another process fetches into this folder.
        FetchError: the hub cannot be reached, failed too often, or sent something else than it announced.
    """
    plan.refuse_if_too_large()
    downloaded, unpacked, damaged = 0, {}, []
    try:
        with locked(plan.to):
            record = FetchRecord(plan.to)
            for step in plan.steps:
                if not step.verified:
                    there = step.remote.has_size(step.place)
                    received = _download(plan, step, on_progress)
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


def _download(plan: FetchPlan, step: FileStep, on_progress: OnProgress | None) -> int:
    """Bring a file to its place, as the hub promised it. Gives the bytes that were downloaded for it."""
    remote, place = step.remote, step.place
    # The file that is there may be incomplete, or of another version.
    if _is_right(place, remote, on_progress):
        return 0
    place.unlink(missing_ok=True)
    before = size_on_disk(unfinished_of(place, remote.identity))
    on_bytes = in_megabytes(f"download {remote.path}", remote.size, on_progress)
    plan.hub.download(plan.repo, remote, place, on_bytes)
    if not _is_right(place, remote, on_progress):
        place.unlink(missing_ok=True)
        problem = "what was received differs from the size or checksum the hub gives; it was deleted"
        raise FetchError(f"{place}: {problem}, run the command again to fetch it")
    return remote.size - min(before, remote.size)


def _is_right(place: Path, remote: RemoteFile, on_progress: OnProgress | None) -> bool:
    """Whether a file has the hub's size, and its checksum if the hub gives one."""
    if not remote.has_size(place):
        return False
    if remote.sha256 is None and remote.git_blob is None:
        return True
    # Large files are named by their content's SHA-256, small ones as git names them.
    git = hashlib.sha1(b"blob %d\0" % remote.size, usedforsecurity=False)
    on_bytes = in_megabytes(f"verify {remote.path}", remote.size, on_progress)
    on_bytes(0)
    with place.open("rb") as file:
        digest = hashlib.file_digest(file, hashlib.sha256 if remote.sha256 else lambda: git)
    on_bytes(remote.size)
    return digest.hexdigest() == (remote.sha256 or remote.git_blob)


def _unpack(step: FileStep, on_progress: OnProgress | None) -> Extracted:
    folder, name = step.place.parent, step.place.stem
    # `long.zip` belongs under `long/`, whether its entries begin with that or not.
    target = folder if top_names(step.place) <= {name, "__MACOSX"} else folder / name
    bound = _UNPACKED_BOUND * step.remote.size + _UNPACKED_BOUND_FREE
    return extract(step.place, target, max_bytes=bound, on_progress=on_progress)
