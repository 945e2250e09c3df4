"""Secrets that must not be written down: a run folder is shared, and its model card is uploaded."""

from __future__ import annotations

import re

_NAMES = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|(API|ACCESS|PRIVATE|AUTH)_?KEY", re.IGNORECASE)
_VALUES = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bsk-[\w-]{16,}|\bgh[opsru]_[A-Za-z0-9]{16,}|\bgithub_pat_\w{16,}|\bglpat-[\w-]{16,}"
    r"|\bAKIA[A-Z0-9]{16}\b|(?<=://)[^/\s@]+(?=@)"
)
"""Tokens of hubs and services by their first letters, and what stands before the `@` of an address."""


def names_a_secret(name: str) -> bool:
    """Whether a variable or key is called like one that holds a secret."""
    return _NAMES.search(name) is not None


def holds_a_secret(text: str) -> bool:
    """Whether a token or password stands in a text."""
    return _VALUES.search(text) is not None


def redacted(text: str) -> str:
    """A word of a command line with `***` for tokens and passwords, and for values of keys that are named like one."""
    name, equals, _ = text.partition("=")
    return f"{name}=***" if equals and names_a_secret(name) else _VALUES.sub("***", text)
