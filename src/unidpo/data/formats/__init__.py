"""Read and write scored preference data: every layout people keep it in becomes prompt groups, and back."""

from __future__ import annotations

from unidpo.data.formats.convert import convert, write_pairs
from unidpo.data.formats.layouts import LAYOUTS, PUBLISHED, Layout
from unidpo.data.formats.mixture import Source, load_pairs, mix, select_pairs, split_by_prompt
from unidpo.data.formats.reading import ImageUse, Read, groups_of, read_groups
from unidpo.data.formats.relocate import relocate

__all__ = [
    "LAYOUTS",
    "PUBLISHED",
    "ImageUse",
    "Layout",
    "Read",
    "Source",
    "convert",
    "groups_of",
    "load_pairs",
    "mix",
    "read_groups",
    "relocate",
    "select_pairs",
    "split_by_prompt",
    "write_pairs",
]
