"""Benchmarks' files that are not there: what to download, and downloading it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from unidpo.data.download import FetchError, download_url, in_megabytes, part_of, size_of
from unidpo.errors import UserError
from unidpo.evaluate.benchmarks import EvaluationError
from unidpo.evaluate.own import file_checksum
from unidpo.evaluate.vlmeval import PAPER
from unidpo.progress import OnProgress


def require(names: Sequence[str], folder: Path) -> None:
    """Raise `EvaluationError` with a line for each benchmark whose file is missing. Only then servers are asked."""
    lines = [missing_line(name, folder) for name in names if not (folder / f"{name}.tsv").is_file()]
    if lines:
        raise EvaluationError("\n".join([*lines, "add --download to have this done, or --data for another folder"]))


def missing_line(name: str, folder: Path) -> str:
    """What to download for a benchmark, from where, how large, with which checksum, and where to."""
    published = PAPER[name]
    try:
        size = f"{size_of(published.url):,} bytes"
    except UserError:
        size = "size not known here, the server does not answer"
    return f"{name}: download {published.url} ({size}, MD5 {published.md5}) to {folder / f'{name}.tsv'}"


def download(name: str, folder: Path, on_progress: OnProgress | None = None) -> Path:
    """Bring a benchmark's file to its place, unless it is there, resuming what an earlier call left.

    Raises:
        FetchError: the server cannot be reached, breaks off, or sends something else than was published.
        DataError: the server has no such file, or the folder cannot be written.
    """
    place = folder / f"{name}.tsv"
    if place.is_file():
        return place
    published = PAPER[name]
    part, size = part_of(place, published.md5), size_of(published.url)
    download_url(published.url, part, size, in_megabytes(f"download {name}", size, on_progress))
    if file_checksum(part) != published.md5:
        part.unlink()
        raise FetchError(f"{published.url}: its MD5 is not the published {published.md5}; it was deleted")
    part.replace(place)
    return place
