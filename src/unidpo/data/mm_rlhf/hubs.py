"""What a data hub is asked for: which files a repository has, and their bytes.

`huggingface_hub` names the files and carries the connection (endpoint, token, redirects). The bytes are written here,
because its own download begins again from nothing in a new process: an interrupted run would lose up to 15 GB.
"""

from __future__ import annotations

import importlib
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import unidpo
from unidpo.errors import DataError, UserError

Source = Literal["huggingface", "modelscope"]
OnBytes: TypeAlias = Callable[[int], None]
"""Called with how many bytes of a file are on disk."""

FAILURES_IN_A_ROW = 5
"""A download gives up after so many failures without a new byte in between."""
WAIT_SECONDS = 1.0
"""Before the first repetition; doubled for each further one."""
_WORTH_REPEATING = (408, 425, 429, 500, 502, 503, 504)


class FetchError(UserError):
    """The hub could not be reached, or did not send what it promised. Nothing is wrong with what the user gave."""

    exit_code = 1


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository.

    Attributes:
        path: its path in the repository.
        size: in bytes.
        identity: names the content; a part that was downloaded goes on only while this is the same.
        sha256: of the content, where the hub gives it (it does for every large file).
        git_blob: git's SHA-1 of the content, where the hub gives it (for small files).
    """

    path: str
    size: int
    identity: str
    sha256: str | None = None
    git_blob: str | None = None


class Hub(Protocol):
    """A place that data sets are fetched from."""

    def files(self, repo: str) -> list[RemoteFile]:
        """The files of a data set. Raises `DataError` for a wrong id, `FetchError` where the hub cannot be asked."""

    def on_disk(self, file: RemoteFile, place: Path) -> int:
        """How many bytes of a file a broken-off download has left."""

    def download(self, repo: str, file: RemoteFile, place: Path, on_bytes: OnBytes) -> None:
        """Put a file in its place, whole, going on where an earlier call was broken off. Raises `FetchError`."""


def open_hub(source: Source, endpoint: str | None = None) -> Hub:
    """The hub of a name, at its usual address or another one.

    Raises:
        DataError: there is no hub of that name, or the package that speaks to it is not installed.
    """
    if source == "huggingface":
        return HuggingFace(endpoint)
    if source == "modelscope":
        return ModelScope(endpoint)
    raise DataError(f"there is no source {source!r}; choose huggingface or modelscope")


class HuggingFace:
    """The Hugging Face hub, or a mirror of it."""

    def __init__(self, endpoint: str | None = None) -> None:
        import huggingface_hub

        self.api = huggingface_hub.HfApi(endpoint=endpoint, library_name="unidpo", library_version=unidpo.__version__)
        self.revision = "main"

    def files(self, repo: str) -> list[RemoteFile]:
        from huggingface_hub import RepoFile

        try:
            # One commit for all files, whatever is uploaded meanwhile.
            self.revision = self.api.dataset_info(repo).sha or "main"
            tree = list(self.api.list_repo_tree(repo, repo_type="dataset", revision=self.revision, recursive=True))
        except Exception as error:
            raise _hub_error(repo, error) from error
        return [
            RemoteFile(item.path, item.size, item.lfs.sha256, item.lfs.sha256)
            if item.lfs
            else RemoteFile(item.path, item.size, item.blob_id, git_blob=item.blob_id)
            for item in tree
            if isinstance(item, RepoFile)
        ]

    def on_disk(self, file: RemoteFile, place: Path) -> int:
        part = _part(file, place)
        return part.stat().st_size if part.is_file() else 0

    def download(self, repo: str, file: RemoteFile, place: Path, on_bytes: OnBytes) -> None:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        url = hf_hub_url(repo, file.path, repo_type="dataset", revision=self.revision, endpoint=self.api.endpoint)
        headers = build_hf_headers(library_name="unidpo", library_version=unidpo.__version__)
        try:
            download_url(url, _part(file, place), file.size, on_bytes, headers=headers)
        except Exception as error:
            raise _hub_error(repo, error, file.path) from error
        _part(file, place).replace(place)


def download_url(
    url: str, part: Path, size: int, on_bytes: OnBytes, *, headers: Mapping[str, str] | None = None
) -> None:
    """Fill a file with what an address gives, going on where an earlier call was broken off.

    Args:
        url: the address.
        part: the file; what it holds already is taken for the beginning.
        size: of the whole, in bytes.
        on_bytes: called with how many bytes are there.
        headers: sent with each request.

    Raises:
        FetchError: the connection broke too often, or more than `size` bytes came.
        Exception: whatever else the connection or the disk raises.
    """
    part.parent.mkdir(parents=True, exist_ok=True)
    failures = 0
    while (done := part.stat().st_size if part.is_file() else 0) != size or not part.exists():
        if done > size:
            part.unlink()
            continue
        try:
            _receive(url, dict(headers or {}), part, done, size, on_bytes)
            problem: Exception = FetchError("the connection ended early")
        except Exception as error:
            if not _is_passing(error):
                raise
            problem = error
        now = part.stat().st_size if part.is_file() else 0
        failures = 0 if now > done else failures + 1
        if failures >= FAILURES_IN_A_ROW:
            raise problem
        if now != size:
            time.sleep(WAIT_SECONDS * 2 ** max(0, failures - 1))


def _receive(url: str, headers: dict[str, str], part: Path, done: int, size: int, on_bytes: OnBytes) -> None:
    """Append to the part what one connection gives."""
    from huggingface_hub import get_session
    from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT
    from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]

    headers["Accept-Encoding"] = "identity"
    if done:
        headers["Range"] = f"bytes={done}-"
    with (
        get_session().stream(
            "GET", url, headers=headers, timeout=HF_HUB_DOWNLOAD_TIMEOUT, follow_redirects=True
        ) as response,
        part.open("ab") as sink,
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
                raise FetchError(f"the hub sends more than the {size:,} bytes it promised")
            sink.write(chunk)
            on_bytes(done)


class ModelScope:
    """The ModelScope hub, through `modelscope_hub`, which resumes by itself."""

    def __init__(self, endpoint: str | None = None) -> None:
        try:
            module: Any = importlib.import_module("modelscope_hub")
        except ImportError as error:
            remedy = "install it (`pip install modelscope-hub`), or use `--source huggingface`"
            raise DataError(f"`--source modelscope` needs the package modelscope-hub; {remedy}") from error
        self.api: Any = module.HubApi(endpoint=endpoint)

    def files(self, repo: str) -> list[RemoteFile]:
        try:
            listed = [item for item in self.api.list_repo_files(repo, "dataset") if not item.is_dir]
        except Exception as error:
            raise _hub_error(repo, error) from error
        return [RemoteFile(i.path, i.size, i.sha256 or i.blob_id or str(i.size), i.sha256) for i in listed]

    def on_disk(self, file: RemoteFile, place: Path) -> int:
        return 0  # its parts lie where only it knows

    def download(self, repo: str, file: RemoteFile, place: Path, on_bytes: OnBytes) -> None:
        root = place
        for _ in Path(file.path).parts:
            root = root.parent
        try:
            self.api.download_file(
                repo, "dataset", file.path, local_dir=root, expected_sha256=file.sha256, file_size=file.size
            )
        except Exception as error:
            raise _hub_error(repo, error, file.path) from error
        on_bytes(file.size)


def _part(file: RemoteFile, place: Path) -> Path:
    """Where a file lies until it is whole; another content has another part."""
    return place.with_name(f".{place.name}.{file.identity[:16]}.unfinished")


def _starts_at(response: Any, start: int) -> bool:
    sent = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return response.status_code == 206 and sent is not None and int(sent[1]) == start


def _status(error: Exception) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _is_passing(error: Exception) -> bool:
    """Whether the same request may go well a moment later."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return False
    status = _status(error)
    if status is not None:
        return status in _WORTH_REPEATING
    # The library below the hub's has changed with its versions (requests, httpx, httpx2), so its errors are known by
    # where they come from. A full disk is an OSError too, of its own class.
    return isinstance(error, (ConnectionError, TimeoutError)) or type(error).__module__.startswith(
        ("httpx", "httpcore")
    )


def _hub_error(repo: str, error: Exception, path: str | None = None) -> UserError:
    """A hub's error in our words."""
    where = f"{repo}/{path}" if path else repo
    status = _status(error)
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    if isinstance(error, UserError):
        return FetchError(f"{where}: {reason}; run the command again to go on")
    if type(error).__name__ == "OfflineModeIsEnabled":
        return DataError(f"{where}: HF_HUB_OFFLINE is set, so nothing can be fetched; unset it")
    if type(error).__name__ in ("HFValidationError", "InvalidParameter"):
        return DataError(f"{repo}: this is no repository id ({reason}); an id is owner/name")
    if status in (401, 403):
        return DataError(f"{where}: the hub refuses access ({reason}); log in (`hf auth login`), or check the id")
    if status == 404 or type(error).__name__ in ("RepositoryNotFoundError", "NotExistError"):
        return DataError(f"{where}: the hub has no such data set or file; check the id (`--repo`)")
    if (
        isinstance(error, OSError)
        and error.errno is not None
        and not isinstance(error, (ConnectionError, TimeoutError))
    ):
        return DataError(f"{where}: cannot be written: {error.strerror}")
    return FetchError(f"{where}: the hub cannot be reached, or broke off ({reason}); run the command again to go on")
