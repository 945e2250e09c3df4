"""Data sets by the names that LLaMA-Factory's ``dataset_info.json`` gives them."""

from __future__ import annotations

from pathlib import Path

from unidpo.data.formats.files import loads
from unidpo.errors import DataError
from unidpo.files.regular import read_regular


def declared_data(name: str, folder: str | Path) -> str | None:
    """The file, or the name on the hub, of a data set; `None` where the folder's declaration does not name it.

    Raises:
        DataError: the declaration cannot be read.
    """
    info = Path(folder, "dataset_info.json")
    try:
        entries = loads(read_regular(info).decode("utf-8-sig"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{info}: not readable as JSON; mend it") from error
    entry = entries.get(name) if isinstance(entries, dict) else None
    if not isinstance(entry, dict):
        return None
    hub = entry.get("hf_hub_url") or entry.get("ms_hub_url")
    if not isinstance(hub, str):
        return str(Path(folder, entry["file_name"])) if isinstance(entry.get("file_name"), str) else None
    parts = {":": entry.get("subset"), "@": entry.get("split")}
    return hub + "".join(f"{mark}{part}" for mark, part in parts.items() if part)
