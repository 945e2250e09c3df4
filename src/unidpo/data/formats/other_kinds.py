"""Kinds of files that hold tables and are not read, each with a command that makes one that is."""

from __future__ import annotations

import shlex
from pathlib import Path

from unidpo.errors import DataError

_TO_LINES = "to_json({1!r}, orient='records', lines=True, force_ascii=False)"
# Suffix: the kind, what Python does to read the file {0} and write {1}, and the suffix of that. What is imported comes
# with this package, but for Excel's `openpyxl`.
_TABLES = {
    ".csv": ("CSV", f"import pandas; pandas.read_csv({{0!r}}).{_TO_LINES}", ".jsonl"),
    ".tsv": ("TSV", f"import pandas; pandas.read_csv({{0!r}}, sep='\\t').{_TO_LINES}", ".jsonl"),
    ".xlsx": ("Excel", f"import pandas; pandas.read_excel({{0!r}}).{_TO_LINES}", ".jsonl"),
    ".feather": ("Feather", f"import pandas; pandas.read_feather({{0!r}}).{_TO_LINES}", ".jsonl"),
    ".arrow": ("Arrow", "import datasets; datasets.Dataset.from_file({0!r}).to_parquet({1!r})", ".parquet"),
    ".yaml": (
        "YAML",
        "import json, yaml; from pathlib import Path as P; "
        "P({1!r}).write_text(json.dumps(yaml.safe_load(P({0!r}).read_text())))",
        ".json",
    ),
}
_TABLES |= {".xls": _TABLES[".xlsx"], ".yml": _TABLES[".yaml"]}
_PACKED = {
    ".gz": "gunzip -k",
    ".bz2": "bunzip2 -k",
    ".xz": "unxz -k",
    ".zst": "unzstd",
    ".zip": "unzip",
    ".tar": "tar -xf",
    ".tgz": "tar -xzf",
}
_PICKLED = (".pkl", ".pickle", ".pt", ".pth", ".joblib")
_MAGIC = {b"version https://git-lfs": "lfs", b"\x1f\x8b": ".gz", b"PK\x03\x04": ".zip", b"\x28\xb5\x2f\xfd": ".zst"}
SUFFIXES = (*_TABLES, *_PACKED, *_PICKLED)


def refuse_other_kinds(path: Path, head: bytes) -> None:
    """Raise `DataError` for a file that by its suffix, or by how it begins, is of a kind that is not read."""
    suffix = next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), path.suffix.lower())
    if suffix == "lfs":
        problem = "this is a pointer of Git LFS, not the data; fetch what it points to: git lfs pull"
    elif suffix in _TABLES:
        kind, code, new = _TABLES[suffix]
        command = shlex.quote(code.format(str(path), str(path.with_suffix(new))))
        problem = f"{kind} is not read; convert it to JSONL, JSON or Parquet: python -c {command}"
    elif suffix in _PACKED:
        named = path if path.suffix.lower() == suffix else path.with_name(path.name + suffix)
        rename = "" if named == path else f"rename it to {named.name} and "
        problem = f"packed files are not read; {rename}unpack it: {_PACKED[suffix]} {shlex.quote(str(named))}"
    elif suffix in _PICKLED:
        problem = "pickled data is not read, because it can run any program; write JSONL where it was made"
    else:
        return
    raise DataError(f"{path}: {problem}")
