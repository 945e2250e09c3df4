"""The embedded default: real handwritten digits, a small vision-language model, and the story of mending it."""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
"""The base model that ships with the package; ``scripts/make_demo_checkpoint.py`` makes it."""
