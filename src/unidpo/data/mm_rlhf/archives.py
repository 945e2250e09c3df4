"""Unpack a zip archive that nobody has vouched for.

All entries are checked by their headers before the first byte is written, so a hostile archive unpacks nothing; and
what the headers claim is counted again while writing.
"""

from __future__ import annotations

import re
import stat
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, TypeAlias

from unidpo.errors import DataError, shown
from unidpo.files.regular import open_regular

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with a stage, how many are done and how many there are; `unidpo.progress.Stages.update` fits."""

RATIO_FREE_BYTES = 1 << 20
"""An entry of at most this size may be of any ratio by itself: a short run of one colour packs better than 100:1."""
_CHUNK = 1 << 20
_LOCAL_HEADER_BYTES = 30
_ENCRYPTED_FLAGS = 0x1 | 0x40 | 0x2000
# bzip2 and LZMA are left out because `zipfile` unpacks a whole compressed chunk of them at once, of any size.
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_DRIVE = re.compile(r"[A-Za-z]:")
_OURS = ".unidpo-"
"""How the names of files begin that fetching and unpacking write for themselves."""
_UNFINISHED = f"{_OURS}unpacking"


class ArchiveError(DataError):
    """An archive that is damaged, or that must not be unpacked. The message names the entry."""


@dataclass(frozen=True, slots=True)
class Extracted:
    """What an archive's unpacking came to.

    Attributes:
        files: files in the archive, all of them on disk now.
        written: how many of them were written; the rest was there before.
        bytes: size of all files.
        damaged: those of the files written that were there with the right size and other content.
    """

    files: int
    written: int
    bytes: int
    damaged: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Contents:
    """What an archive holds, by its headers, once `read_contents` found nothing against it.

    Attributes:
        files: each file's place under the target, and its entry.
        folders: the folders that are named by entries of their own.
        bytes: unpacked size of all files, as the headers claim.
    """

    files: dict[PurePosixPath, zipfile.ZipInfo]
    folders: list[PurePosixPath]
    bytes: int


def extract(
    archive: str | Path,
    target: str | Path,
    *,
    max_bytes: int,
    max_ratio: float = 100,
    on_progress: Progress | None = None,
) -> Extracted:
    """Unpack a zip archive into a folder, nothing outside of it, at most so many bytes.

    Files appear whole or not at all. A file that is there with the right size and checksum is left alone, so that a
    second call goes on where a first one was broken off, and mends what was damaged since.

    Args:
        archive: the zip file.
        target: the folder, made if there is none.
        max_bytes: the most its files may take up together.
        max_ratio: the most times its packed size a file (and all files together) may grow.
        on_progress: called with the stage, files done and files in all.

    Raises:
        ArchiveError: the archive cannot be read, or an entry must not be unpacked: it would lie outside the target
            (``..``, absolute, backslash, drive letter, through a link that is there), is a link or device, is
            encrypted or packed in an unusual way, stands twice or over another, has a name that is kept for files
            written here meanwhile, or is too large. If the headers say so, nothing is unpacked.
        DataError: the target cannot be written.
    """
    archive, target = Path(archive), Path(target)
    with _opened(archive) as zipped:
        contents = read_contents(zipped, archive, max_bytes=max_bytes, max_ratio=max_ratio)
        stage, total = f"unpack {archive.name}, files", len(contents.files)
        try:
            target.mkdir(parents=True, exist_ok=True)
            writer = _Writer(zipped, archive, target, max_bytes)
            for folder in contents.folders:
                writer.folder(folder)
            for done, (path, entry) in enumerate(contents.files.items()):
                if on_progress is not None:
                    on_progress(stage, done, total)
                writer.file(path, entry)
        except OSError as error:
            reason = error.strerror or str(error)
            raise DataError(
                f"{target}: {archive.name} cannot be unpacked here: {reason}; free space, or choose another folder"
            ) from error
    if on_progress is not None:
        on_progress(stage, total, total)
    return Extracted(total, writer.written, writer.bytes, tuple(writer.damaged))


def unpacked_size(archive: str | Path) -> int:
    """The size of an archive's files as its headers claim, before any check. Raises `ArchiveError`."""
    with _opened(Path(archive)) as zipped:
        return sum(entry.file_size for entry in zipped.infolist())


def top_folders(archive: str | Path) -> set[str]:
    """The first part of every name in an archive, as it stands there. Raises `ArchiveError`."""
    with _opened(Path(archive)) as zipped:
        return {entry.filename.removeprefix("./").partition("/")[0] for entry in zipped.infolist()}


def read_contents(zipped: zipfile.ZipFile, archive: Path, *, max_bytes: int, max_ratio: float) -> Contents:
    """Check every entry by its header. Nothing is unpacked. Raises `ArchiveError`, see `extract`."""
    files: dict[PurePosixPath, zipfile.ZipInfo] = {}
    folders: list[PurePosixPath] = []
    total = packed = 0
    for entry in zipped.infolist():
        problem = _entry_problem(entry, max_ratio)
        if problem:
            raise _refused(archive, entry, problem)
        path = _path_of(entry)
        if entry.is_dir():
            folders.append(path)
            continue
        if path in files:
            raise _refused(archive, entry, "stands in the archive twice")
        files[path] = entry
        total, packed = total + entry.file_size, packed + entry.compress_size
        if total > max_bytes:
            raise _refused(archive, entry, f"would bring the unpacked size over the bound of {max_bytes:,} bytes")
    if total > max(RATIO_FREE_BYTES, max_ratio * packed):
        raise ArchiveError(
            f"{archive}: its files unpack to {total:,} bytes from {packed:,}, more than {max_ratio:g} times; "
            "this is no archive of images, and nothing was unpacked"
        )
    for path in [*files, *folders]:
        for parent in path.parents:
            if parent in files:
                raise _refused(archive, files[parent], f"is a file, and the folder of {shown(str(path))}")
    for path in folders:
        if path in files:
            raise _refused(archive, files[path], "is a file and a folder")
    _refuse_overlaps(archive, zipped.infolist())
    return Contents(files, folders, total)


def _entry_problem(entry: zipfile.ZipInfo, max_ratio: float) -> str | None:
    """What speaks against an entry taken by itself."""
    # `filename` is already cut at a NUL and, on Windows, rewritten.
    name = entry.orig_filename
    kind = stat.S_IFMT(entry.external_attr >> 16)
    parts = name.split("/")
    if not name or _CONTROL.search(name):
        return "has no printable name"
    if "\\" in name:
        return "has a backslash in its name, which is a folder mark on Windows"
    if name.startswith("/") or _DRIVE.match(parts[0]):
        return "has an absolute path"
    if any(part != "." and part and not part.strip(" .") for part in parts):
        return "points outside the folder it is unpacked into"
    if any(part.lower().startswith(_OURS) for part in parts):
        return f"has a name that begins with {_OURS}, as files do that are written here meanwhile"
    if not _path_of(entry).parts and not entry.is_dir():
        return "has no name"
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a symbolic link" if kind == stat.S_IFLNK else "is a device or another special file"
    if (kind == stat.S_IFDIR) > entry.is_dir() or (kind == stat.S_IFREG and entry.is_dir()):
        return "is a file by its name and a folder by its attributes, or the other way round"
    if entry.flag_bits & _ENCRYPTED_FLAGS:
        return "is encrypted"
    if entry.compress_type not in _METHODS:
        return f"is packed by method {entry.compress_type}; only stored and deflated entries are unpacked"
    if entry.file_size < 0 or entry.compress_size < 0 or entry.header_offset < 0:
        return "has a size or place below zero"
    if entry.file_size > max(RATIO_FREE_BYTES, max_ratio * entry.compress_size):
        ratio = entry.file_size / max(1, entry.compress_size)
        return f"unpacks to {ratio:,.0f} times its size, more than {max_ratio:g} times"
    return None


def _refuse_overlaps(archive: Path, entries: Sequence[zipfile.ZipInfo]) -> None:
    """Entries that share packed bytes: a bomb whose files are each within the ratio."""
    end, before = 0, ""
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        if entry.header_offset < end:
            raise _refused(archive, entry, f"lies over the data of {shown(before)}")
        # The local header may be longer (extra fields), never shorter.
        end = entry.header_offset + _LOCAL_HEADER_BYTES + len(entry.orig_filename) + entry.compress_size
        before = entry.filename


class _Writer:
    """Puts entries of one archive under one folder, and counts."""

    def __init__(self, zipped: zipfile.ZipFile, archive: Path, target: Path, max_bytes: int) -> None:
        self.zipped = zipped
        self.archive = archive
        self.target = target
        self.max_bytes = max_bytes
        self.written = self.bytes = 0
        self.damaged: list[str] = []
        self._folders: set[PurePosixPath] = set()

    def folder(self, path: PurePosixPath) -> None:
        """Make a folder and those above it. A link among them could lead outside, whoever made it."""
        for part in [*reversed(path.parents), path]:
            if part in self._folders or not part.parts:
                continue
            place = self.target / part
            if place.is_symlink():
                raise ArchiveError(f"{place}: is a link, and nothing is unpacked through one; remove it")
            if place.exists() and not place.is_dir():
                raise ArchiveError(f"{place}: is a file where {self.archive.name} has a folder; remove it")
            place.mkdir(exist_ok=True)
            self._folders.add(part)

    def file(self, path: PurePosixPath, entry: zipfile.ZipInfo) -> None:
        place = self.target / path
        if place.is_symlink() or place.is_dir():
            raise ArchiveError(f"{place}: is a link or folder where {self.archive.name} has a file; remove it")
        self.folder(path.parent)
        if place.is_file() and place.stat().st_size == entry.file_size:
            if _checksum(place) == entry.CRC:
                self.bytes += entry.file_size
                return
            self.damaged.append(str(path))
        unfinished = self.target / _UNFINISHED
        unfinished.unlink(missing_ok=True)
        try:
            with self.zipped.open(entry) as source, unfinished.open("xb") as sink:
                self._copy(source, sink, entry)
            unfinished.replace(place)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            problem = f"is damaged ({error}); delete the archive and fetch it again"
            raise ArchiveError(f"{self.archive}: entry {shown(entry.filename)} {problem}") from error
        finally:
            unfinished.unlink(missing_ok=True)
        self.written += 1

    def _copy(self, source: IO[bytes], sink: IO[bytes], entry: zipfile.ZipInfo) -> None:
        size = 0
        while chunk := source.read(_CHUNK):
            size += len(chunk)
            if size > entry.file_size or self.bytes + size > self.max_bytes:
                problem = "holds more than its header says, or than the bound allows; unpacking stopped"
                raise ArchiveError(f"{self.archive}: entry {shown(entry.filename)} {problem}")
            sink.write(chunk)
        if size != entry.file_size:
            raise EOFError("it ends early")
        self.bytes += size


def _checksum(path: Path) -> int:
    checksum = 0
    with open_regular(path) as file:
        while chunk := file.read(_CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def _opened(archive: Path) -> zipfile.ZipFile:
    try:
        open_regular(archive).close()
        return zipfile.ZipFile(archive)
    except FileNotFoundError as error:
        raise ArchiveError(f"{archive}: there is no such archive") from error
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError) as error:
        problem = f"is no zip archive, or a damaged one ({error}); delete it and fetch it again"
        raise ArchiveError(f"{archive}: {problem}") from error
    except OSError as error:
        raise ArchiveError(f"{archive}: cannot be read: {error.strerror or error}") from error


def _path_of(entry: zipfile.ZipInfo) -> PurePosixPath:
    return PurePosixPath(*(part for part in entry.orig_filename.split("/") if part not in ("", ".")))


def _refused(archive: Path, entry: zipfile.ZipInfo, problem: str) -> ArchiveError:
    return ArchiveError(f"{archive}: entry {shown(entry.orig_filename)} {problem}; nothing was unpacked")
