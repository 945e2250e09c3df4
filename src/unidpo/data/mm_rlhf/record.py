"""What earlier fetches into a folder verified and unpacked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from unidpo.data.mm_rlhf.hubs import RemoteFile

_RECORD = ".unidpo-fetch.json"


class FetchRecord:
    """What earlier runs verified and unpacked, in a file beside the data: 15 GB are not hashed twice."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / _RECORD
        self.files: dict[str, Any] = {}
        self.unpacked: dict[str, Any] = {}
        try:
            saved = json.loads(self.path.read_text("utf-8"))
            self.files, self.unpacked = dict(saved["files"]), dict(saved["unpacked"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # without a record everything is verified again

    def has_file(self, remote: RemoteFile, place: Path) -> bool:
        """Whether a file was verified, and not touched since."""
        return bool(self.files.get(remote.path) == [remote.identity, *_state(place)])

    def has_unpacked(self, remote: RemoteFile) -> bool:
        return bool(self.unpacked.get(remote.path) == remote.identity)

    def add_file(self, remote: RemoteFile, place: Path) -> None:
        self.files[remote.path] = [remote.identity, *_state(place)]
        self._save()

    def add_unpacked(self, remote: RemoteFile) -> None:
        self.unpacked[remote.path] = remote.identity
        self._save()

    def _save(self) -> None:
        unfinished = self.path.with_name(f"{_RECORD}.unfinished")
        unfinished.write_text(json.dumps({"files": self.files, "unpacked": self.unpacked}, indent=1), "utf-8")
        unfinished.replace(self.path)


def _state(place: Path) -> list[int]:
    """What changes when a file is written. A copy can bring its old time of change along, but not that of its node."""
    stat = place.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
