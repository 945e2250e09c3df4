"""Download a file from a web address, resuming what an earlier process left.

`huggingface_hub` carries the connection (proxies, token, redirects). The bytes are written here: its own download
begins an interrupted file again from nothing in a new process.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from unidpo.errors import DataError, UserError
from unidpo.progress import OnProgress

OnBytes: TypeAlias = Callable[[int], None]
"""Called with how many bytes of a file are done."""

FAILURES_IN_A_ROW = 5
"""A download gives up after so many failures without a new byte in between."""
WAIT_SECONDS = 1.0
"""Before the first repetition; doubled for each further one."""
_ASKING_SECONDS = 10.0
_MB = 1_000_000


class FetchError(UserError):
    """A server could not be reached, or did not send what it announced. Nothing is wrong with what the user gave."""

    exit_code = 1


def unfinished_of(place: Path, identity: str) -> Path:
    """Where a file lies until it is whole. ``identity`` names its content: another content has another file."""
    return place.with_name(f".{place.name}.{identity[:16]}.unfinished")


def size_on_disk(file: Path) -> int:
    """Size in bytes, 0 where there is no file."""
    return file.stat().st_size if file.is_file() else 0


def in_megabytes(stage: str, size: int, on_progress: OnProgress | None) -> OnBytes:
    """Progress in bytes, passed on as megabytes of a stage."""
    total = max(1, -(-size // _MB))

    def on_bytes(done: int) -> None:
        if on_progress is not None:
            on_progress(f"{stage}, MB", total if done >= size else done // _MB, total)

    return on_bytes


def size_of(url: str) -> int:
    """Size in bytes of what an address gives, without downloading it. Raises as `download_url`."""
    from huggingface_hub import get_session
    from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]

    try:
        response = get_session().head(url, headers={"Accept-Encoding": "identity"}, timeout=_ASKING_SECONDS)
        hf_raise_for_status(response)
        return int(response.headers["Content-Length"])
    except Exception as error:
        raise fetch_error(url, error) from error


def download_url(
    url: str, file: Path, size: int, on_bytes: OnBytes, *, name: str = "", headers: Mapping[str, str] | None = None
) -> None:
    """Fill a file with what an address gives.

    Args:
        url: the address.
        file: filled; what it holds already is kept as the beginning.
        size: of the whole, in bytes.
        on_bytes: called with how many bytes are there.
        name: what messages call the file; the address by default.
        headers: sent with each request.

    Raises:
        FetchError: the connection broke too often, or more than ``size`` bytes came.
        DataError: the server refuses access or has no such file, or the disk cannot be written.
    """
    failures = 0
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        on_bytes(file.stat().st_size)
        while (before := file.stat().st_size) != size:
            try:
                _receive(url, dict(headers or {}), file, size, on_bytes)
                problem: Exception = FetchError("the connection ended early")
            except Exception as error:
                if not _may_pass(error):
                    raise
                problem = error
            failures = 0 if file.stat().st_size > before else failures + 1
            if failures >= FAILURES_IN_A_ROW:
                raise problem
            if failures:
                time.sleep(WAIT_SECONDS * 2 ** (failures - 1))
    except Exception as error:
        raise fetch_error(name or url, error) from error


def fetch_error(where: str, error: Exception) -> UserError:
    """What a hub, a connection or the disk raised, as an error for the user."""
    kind, status = type(error).__name__, _status(error)
    reason = str(error).strip().split("\n")[0] or kind
    if isinstance(error, UserError):
        return FetchError(f"{where}: {reason}; run the command again to resume")
    if kind == "OfflineModeIsEnabled":
        return DataError(f"{where}: HF_HUB_OFFLINE is set, so nothing can be fetched; unset it")
    if kind in ("HFValidationError", "InvalidParameter"):
        return DataError(f"{where}: this is no repository id ({reason}); an id is owner/name")
    if status in (401, 403):
        return DataError(f"{where}: the server refuses access ({reason}); log in (`hf auth login`), or check the id")
    if status == 404 or kind == "NotExistError":
        return DataError(f"{where}: there is no such data set or file; check the id (`--repo`) or the address")
    if isinstance(error, OSError) and error.errno and not isinstance(error, (ConnectionError, TimeoutError)):
        return DataError(f"{where}: cannot be written: {error.strerror}")
    problem = f"the server cannot be reached, or the connection was lost ({reason})"
    return FetchError(f"{where}: {problem}; run the command again to resume")


def _receive(url: str, headers: dict[str, str], file: Path, size: int, on_bytes: OnBytes) -> None:
    """Append to the file what one connection gives."""
    from huggingface_hub import get_session
    from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT
    from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]

    done = file.stat().st_size
    if done > size:
        done = 0
    headers["Accept-Encoding"] = "identity"
    if done:
        headers["Range"] = f"bytes={done}-"
    with (
        get_session().stream("GET", url, headers=headers, timeout=HF_HUB_DOWNLOAD_TIMEOUT) as response,
        file.open("ab") as sink,
    ):
        hf_raise_for_status(response)
        if done and not _starts_at(response, done):
            done = 0  # the server sends the whole file whatever it is asked
        sink.truncate(done)
        # As they arrive: chunks of a fixed size would lose what is collected when the connection breaks.
        for chunk in response.iter_bytes():
            done += len(chunk)
            if done > size:
                sink.truncate(0)
                raise FetchError(f"the server sends more than the {size:,} bytes it announced")
            sink.write(chunk)
            on_bytes(done)


def _starts_at(response: Any, start: int) -> bool:
    sent = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return response.status_code == 206 and sent is not None and int(sent[1]) == start


def _status(error: Exception) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _may_pass(error: Exception) -> bool:
    """Whether the same request may go well a moment later."""
    status = _status(error)
    if status is not None:
        return status in (408, 425, 429, 500, 502, 503, 504)
    # By name, because the library below huggingface_hub changes with its versions (httpx, httpx2).
    return type(error).__module__.startswith(("httpx", "httpcore"))
