"""Benchmarks' files that are not there: what to download, and downloading it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

from unidpo.data.mm_rlhf.hubs import download_url
from unidpo.errors import UserError
from unidpo.evaluate.benchmarks import EvaluationError, EvaluationFailed
from unidpo.evaluate.own import file_checksum
from unidpo.evaluate.vlmeval import PAPER, Published

Progress: TypeAlias = Callable[[str, int, int], None]
_ASKING_SECONDS = 10.0
_MB = 1_000_000


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


def download(name: str, folder: Path, on_progress: Progress | None = None) -> Path:
    """Bring a benchmark's file to its place, unless it is there; goes on where an earlier call was broken off.

    Raises:
        EvaluationFailed: the server cannot be reached, breaks off, or sends something else than was published.
    """
    place = folder / f"{name}.tsv"
    if place.is_file():
        return place
    published = PAPER[name]
    part = place.with_name(f".{place.name}.{published.md5[:16]}.unfinished")
    size = size_of(published.url)
    total = max(1, -(-size // _MB))

    def tell(done: int) -> None:
        if on_progress is not None:
            on_progress(f"download {name}, MB", total if done >= size else done // _MB, total)

    try:
        download_url(published.url, part, size, tell)
    except Exception as error:
        raise _failed(published, error) from error
    if file_checksum(part) != published.md5:
        part.unlink()
        raise EvaluationFailed(f"{published.url}: what came has not the MD5 {published.md5}; it was deleted")
    part.replace(place)
    return place


def size_of(url: str) -> int:
    """Size of what an address gives, in bytes, without fetching it. Raises `EvaluationFailed`."""
    from huggingface_hub import get_session
    from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]

    try:
        with get_session().stream(
            "HEAD",
            url,
            headers={"Accept-Encoding": "identity"},
            timeout=_ASKING_SECONDS,
            follow_redirects=True,
        ) as response:
            hf_raise_for_status(response)
            return int(response.headers["Content-Length"])
    except Exception as error:
        raise EvaluationFailed(f"{url}: cannot be asked for its size ({_reason(error)}); try again") from error


def _failed(published: Published, error: Exception) -> EvaluationFailed:
    return EvaluationFailed(f"{published.url}: the download broke off ({_reason(error)}); run it again to go on")


def _reason(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
