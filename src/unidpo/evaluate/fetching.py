"""Benchmarks' files that are not there: what to download, and downloading it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from unidpo.data.download import FetchError, download_url, in_megabytes, part_of, size_of
from unidpo.evaluate.benchmarks import EvaluationError, md5_of
from unidpo.evaluate.vlmeval import PAPER
from unidpo.progress import OnProgress


def require(names: Sequence[str], folder: Path) -> None:
    """Raise `EvaluationError` that says what to download, from where, with which checksum, and where to."""
    places = {name: folder / f"{name}.tsv" for name in names}
    lines = [
        f"{name}: download {PAPER[name].url} (MD5 {PAPER[name].md5}) to {place}"
        for name, place in places.items()
        if not place.is_file()
    ]
    if lines:
        raise EvaluationError("\n".join([*lines, "add --download to have this done, or --data for another folder"]))


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
    if md5_of(part) != published.md5:
        part.unlink()
        raise FetchError(f"{published.url}: its MD5 is not the published {published.md5}; it was deleted")
    part.replace(place)
    return place
