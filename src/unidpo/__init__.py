"""Preference training for vision-language models on scored pairs."""

__version__ = "0.1.0"
