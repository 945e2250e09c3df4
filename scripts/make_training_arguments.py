"""Make the table of `transformers.TrainingArguments`, against which recipes are checked without importing torch.

python scripts/make_training_arguments.py     # remake src/unidpo/config/hf_arguments.json
"""

from __future__ import annotations

import json
import typing
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any

import transformers
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.utils.logging import get_log_levels_dict

TABLE = Path(__file__).parent.parent / "src" / "unidpo" / "config" / "hf_arguments.json"


def table() -> dict[str, Any]:
    """The version, the types that YAML can hold by argument, and the words of those that take no others."""
    hints = typing.get_type_hints(TrainingArguments)
    types, words = {}, {}
    for name in (field.name for field in fields(TrainingArguments)):
        kinds = typing.get_args(hints[name]) or (hints[name],)
        types[name] = " | ".join(map(_plain, kinds))
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, Enum):
                words[name] = [member.value for member in kind]
    words["report_to"] = ["none", "all", *INTEGRATION_TO_CALLBACK]
    words["log_level"] = words["log_level_replica"] = ["passive", *get_log_levels_dict()]
    return {"transformers": transformers.__version__, "types": types, "words": words}


def _plain(kind: Any) -> str:
    if kind == list[str]:
        return "list[str]"
    base = typing.get_origin(kind) or kind
    if base is typing.Literal:
        return str(typing.get_args(kind)[0])
    if base is type(None):
        return "None"
    return base.__name__ if base in (bool, int, float, str, list, dict) else "Any"


if __name__ == "__main__":
    TABLE.write_text(json.dumps(table(), indent=1) + "\n", "utf-8")
