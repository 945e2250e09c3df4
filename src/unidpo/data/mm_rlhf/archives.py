"""Unpack a zip archive from a source that is not trusted.

`zipfile` unpacks no more of an entry than its header claims, and compares its checksum. What the headers claim is held
against the rules here before the first byte is written, so a hostile archive unpacks nothing.
"""

from __future__ import annotations

import shutil
import stat
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from unidpo.errors import DataError, shown
from unidpo.files.regular import open_regular
from unidpo.progress import OnProgress

_CHUNK = 1 << 20
# bzip2 and LZMA are left out because `zipfile` unpacks a whole compressed chunk of them at once, of any size.
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_DAMAGED = (
    *(zipfile.BadZipFile, zlib.error, struct.error, EOFError),
    *(NotImplementedError, OverflowError, RuntimeError, ValueError),
)
"""What `zipfile` raises for an archive that is damaged or encrypted."""
_UNFINISHED = ".unidpo-unpacking"


class ArchiveError(DataError):
    """An archive that is damaged, or that must not be unpacked. The message names the entry."""


@dataclass(frozen=True, slots=True)
class Extracted:
    """The result of unpacking an archive.

    Attributes:
        files: files in the archive, all of them on disk now.
        written: how many of them were written; the rest was there before.
        damaged: those of the files written that were there with the right size and other content.
    """

    files: int
    written: int
    damaged: tuple[str, ...] = ()


def extract(
    archive: str | Path, target: str | Path, *, max_bytes: int, on_progress: OnProgress | None = None
) -> Extracted:
    """Unpack a zip archive into a folder, nothing outside of it, at most so many bytes.

    Files appear whole or not at all. A file that is there with the right size and checksum is left alone, so that a
    second call resumes an interrupted one, and replaces what was damaged since. Empty folders are not made.

    Args:
        archive: the zip file.
        target: the folder, made if there is none.
        max_bytes: the most its files may take up together.
        on_progress: called with the stage, files done and files in all.

    Raises:
        ArchiveError: the archive cannot be read, or an entry must not be unpacked: it would lie outside the target,
            is a link or a special file, is packed in an unusual way, or is too large. If the headers say so, nothing
            is unpacked.
        DataError: the target cannot be written.
    """
    archive, target = Path(archive), Path(target)
    written, damaged = 0, []
    with _opened(archive) as zipped:
        files = _checked(zipped, archive, target, max_bytes)
        stage = f"unpack {archive.name}, files"
        for done, (entry, place) in enumerate(files):
            if on_progress is not None:
                on_progress(stage, done, len(files))
            try:
                same_size = place.is_file() and place.stat().st_size == entry.file_size
                if same_size and _checksum(place) == entry.CRC:
                    continue
                _write(zipped, entry, place, target / _UNFINISHED)
            except OSError as error:
                problem = f"{archive.name} cannot be unpacked here: {error.strerror or error}"
                raise DataError(f"{target}: {problem}; free space, or choose another folder") from error
            except _DAMAGED as error:
                problem = f"is damaged ({error}); delete the archive and fetch it again"
                raise ArchiveError(f"{archive}: entry {shown(entry.filename)} {problem}") from error
            written += 1
            if same_size:
                damaged.append(entry.filename)
    if on_progress is not None:
        on_progress(stage, len(files), len(files))
    return Extracted(len(files), written, tuple(damaged))


def is_inside(folder: Path, place: Path) -> bool:
    """Whether a path leads to somewhere below a folder, with all links followed that are there."""
    return folder.resolve() in place.resolve().parents


def top_names(archive: str | Path) -> set[str]:
    """The first part of every name in an archive. Raises `ArchiveError`."""
    with _opened(Path(archive)) as zipped:
        return {entry.filename.removeprefix("./").partition("/")[0] for entry in zipped.infolist()}


def _opened(archive: Path) -> zipfile.ZipFile:
    try:
        open_regular(archive).close()
        return zipfile.ZipFile(archive)
    except OSError as error:
        raise ArchiveError(f"{archive}: cannot be read: {error.strerror or error}") from error
    except _DAMAGED as error:
        problem = f"is no zip archive, or a damaged one ({error}); delete it and fetch it again"
        raise ArchiveError(f"{archive}: {problem}") from error


def _checked(
    zipped: zipfile.ZipFile, archive: Path, target: Path, max_bytes: int
) -> list[tuple[zipfile.ZipInfo, Path]]:
    """The files of an archive and where each belongs, after all entries passed the rules."""
    files, total = [], 0
    for entry in zipped.infolist():
        if entry.filename.endswith("/"):
            continue
        place = target / entry.filename
        total += entry.file_size
        if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG):
            problem = "is a link or a special file"
        elif not is_inside(target, place):
            problem = "points outside the folder it is unpacked into"
        elif entry.compress_type not in _METHODS:
            problem = f"is packed by method {entry.compress_type}; only stored and deflated entries are unpacked"
        elif total > max_bytes:
            problem = f"would bring the unpacked size over the bound of {max_bytes:,} bytes"
        else:
            files.append((entry, place))
            continue
        raise ArchiveError(f"{archive}: entry {shown(entry.filename)} {problem}; nothing was unpacked")
    return files


def _write(zipped: zipfile.ZipFile, entry: zipfile.ZipInfo, place: Path, unfinished: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    unfinished.unlink(missing_ok=True)
    try:
        with zipped.open(entry) as source, unfinished.open("xb") as sink:
            shutil.copyfileobj(source, sink, _CHUNK)
        unfinished.replace(place)
    finally:
        unfinished.unlink(missing_ok=True)


def _checksum(path: Path) -> int:
    checksum = 0
    with open_regular(path) as file:
        while chunk := file.read(_CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    return checksum
