"""Hubs that data sets are fetched from: the files of a repository, and their bytes."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeAlias, get_args

from unidpo.data.download import OnBytes, download_url, fetch_error, unfinished_of
from unidpo.errors import DataError, require_known

HubName = Literal["huggingface", "modelscope"]
_NAME = "unidpo"
"""The user agent that the Hugging Face hub sees."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository.

    Attributes:
        path: its path in the repository.
        size: in bytes.
        identity: names the content; a download is resumed only while this is the same.
        sha256: of the content, where the hub gives it (it does for every large file).
        git_blob: git's SHA-1 of the content, where the hub gives it (for small files).
    """

    path: str
    size: int
    identity: str
    sha256: str | None = None
    git_blob: str | None = None

    def has_size(self, place: Path) -> bool:
        """Whether a file on disk has this size."""
        return place.is_file() and place.stat().st_size == self.size


class HuggingFaceHub:
    """The Hugging Face hub, or a mirror of it."""

    name: HubName = "huggingface"

    def __init__(self, endpoint: str | None) -> None:
        import huggingface_hub

        self.api = huggingface_hub.HfApi(endpoint=endpoint, library_name=_NAME)
        self.revision = "main"

    def files(self, repo: str) -> list[RemoteFile]:
        """The files of a data set. Raises `DataError` for a wrong id, `FetchError` where the hub cannot be asked."""
        from huggingface_hub import RepoFile

        try:
            # One commit for all files, whatever is uploaded meanwhile.
            self.revision = self.api.dataset_info(repo).sha or "main"
            tree = list(self.api.list_repo_tree(repo, repo_type="dataset", revision=self.revision, recursive=True))
        except Exception as error:
            raise fetch_error(repo, error) from error
        return [
            RemoteFile(item.path, item.size, item.lfs.sha256, item.lfs.sha256)
            if item.lfs
            else RemoteFile(item.path, item.size, item.blob_id, git_blob=item.blob_id)
            for item in tree
            if isinstance(item, RepoFile)
        ]

    def download(self, repo: str, file: RemoteFile, place: Path, on_bytes: OnBytes) -> None:
        """Put a file in its place, whole, resuming what an earlier call left. Raises as `download_url`."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        url = hf_hub_url(repo, file.path, repo_type="dataset", revision=self.revision, endpoint=self.api.endpoint)
        unfinished, headers = unfinished_of(place, file.identity), build_hf_headers(library_name=_NAME)
        download_url(url, unfinished, file.size, on_bytes, name=f"{repo}/{file.path}", headers=headers)
        unfinished.replace(place)


class ModelScopeHub:
    """The ModelScope hub, through `modelscope_hub`, which resumes by itself."""

    name: HubName = "modelscope"

    def __init__(self, endpoint: str | None) -> None:
        try:
            module: Any = importlib.import_module("modelscope_hub")
        except ImportError as error:
            remedy = "install it (`pip install modelscope-hub`), or use `--source huggingface`"
            raise DataError(f"`--source modelscope` needs the package modelscope-hub; {remedy}") from error
        self.api: Any = module.HubApi(endpoint=endpoint)

    def files(self, repo: str) -> list[RemoteFile]:
        """As `HuggingFaceHub.files`."""
        try:
            listed = [item for item in self.api.list_repo_files(repo, "dataset") if not item.is_dir]
        except Exception as error:
            raise fetch_error(repo, error) from error
        return [RemoteFile(i.path, i.size, i.sha256 or i.blob_id or str(i.size), i.sha256) for i in listed]

    def download(self, repo: str, file: RemoteFile, place: Path, on_bytes: OnBytes) -> None:
        """As `HuggingFaceHub.download`."""
        folder = place.parents[len(PurePosixPath(file.path).parts) - 1]
        try:
            self.api.download_file(
                repo, "dataset", file.path, local_dir=folder, expected_sha256=file.sha256, file_size=file.size
            )
        except Exception as error:
            raise fetch_error(f"{repo}/{file.path}", error) from error
        on_bytes(file.size)


Hub: TypeAlias = HuggingFaceHub | ModelScopeHub


def open_hub(source: HubName, endpoint: str | None = None) -> Hub:
    """The hub of a name, at its usual address or another one.

    Raises:
        DataError: there is no hub of that name, or the package that speaks to it is not installed.
    """
    require_known("--source", "hub", [source], get_args(HubName))
    return HuggingFaceHub(endpoint) if source == "huggingface" else ModelScopeHub(endpoint)
