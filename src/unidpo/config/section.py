"""What every section of a recipe is, and what is wrong between its values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

from pydantic import BaseModel, ConfigDict, model_validator


class Conflicts(ValueError):
    """Values that are right each by itself and do not go together.

    Attributes:
        found: for each conflict the key to change, within the section, and what is wrong.
    """

    def __init__(self, found: list[tuple[str, str]]) -> None:
        super().__init__("; ".join(message for _, message in found))
        self.found = found


class Section(BaseModel):
    """A part of a recipe: immutable, no unknown keys, no silent conversions, no infinities."""

    # A section's validator is built within the recipe's; building each alone as well would only cost time.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, defer_build=True)

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Values that do not go together: the key to change, and what is wrong."""
        return iter(())

    @model_validator(mode="after")
    def _values_go_together(self) -> Self:
        if found := list(self.conflicts()):
            raise Conflicts(found)
        return self
