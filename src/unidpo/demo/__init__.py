"""The embedded default: real handwritten digits, a small vision-language model, and the story of mending it."""

import importlib.util
from pathlib import Path

from unidpo.errors import UserError

CHECKPOINT = Path(__file__).parent / "checkpoint"
"""The base model that ships with the package; ``scripts/make_demo_checkpoint.py`` makes it."""


def require_digits() -> None:
    """Raise `UserError` where scikit-learn, which carries the scans, is not installed. Imports nothing."""
    if importlib.util.find_spec("sklearn") is None:
        raise UserError("the demo needs the handwritten digits of scikit-learn: pip install scikit-learn")
