"""Prompt groups: read, checked, converted, fetched."""
