"""Names that are a folder here, or else a name of a hub."""

from __future__ import annotations

import re
from pathlib import Path

from unidpo.errors import did_you_mean, shown

DECLARATION = "dataset_info.json"
"""LLaMA-Factory's file that gives data sets names."""
DECLARED_IN = (".", "data")
"""Where a name alone is looked up; the latter is LLaMA-Factory's own `dataset_dir`."""
_HUB_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*")


def missing_here(name: str | Path, what: str = "folder", *, hub: bool = True) -> str | None:
    """Why a name is a file or folder that is missing; `None` where it is there, or can be meant as a name of a hub.

    A name of a hub is `owner/name`. With an `owner` that is a folder here, it is one that was mistyped.

    Args:
        hub: whether the name may be one of a hub.
    """
    text = str(name)
    path = Path(text).expanduser()
    try:
        if path.exists():
            return None
        if hub and _HUB_NAME.fullmatch(text) and not path.parent.is_dir():
            return None
        first = next(p for p in [*reversed(path.parents), path] if not p.exists())
        beside = [p.name for p in first.parent.iterdir()] if first.parent.is_dir() else []
    except (OSError, ValueError) as error:
        return f"there is no such {what}: {shown(text)} ({getattr(error, 'strerror', None) or error})"
    hint = did_you_mean(first.name, beside)
    if hub and not hint and _HUB_NAME.fullmatch(text):
        hint = f" in `{path.parent}`, which is a folder here; a name of a hub cannot begin like one"
    elif hub and not hint and "/" not in text and not path.suffix:
        hint = "; a name of a hub has the form owner/name"
    elif first != path:
        hint = f", nor {shown(str(first))}{hint}"
    return f"there is no such {what}: {shown(text)}{hint}"
