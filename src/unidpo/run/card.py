"""The model card: what a finished model was made of, written from its run folder into the model's `README.md`."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import ModelCardData
from omegaconf import OmegaConf

from unidpo.run_folder.folder import RunFolder
from unidpo.run_folder.inputs import began_with

TITLES = {"uni_dpo": "Uni-DPO", "dpo": "DPO", "simpo": "SimPO"}
HELD_OUT_ROWS = 12
"""Evaluations in the card, the last ones."""


def write_card(folder: RunFolder, model: Path) -> None:
    """Write `README.md` into a model's folder, over what another library may have left there.

    Whatever came from the user's files stands as code: it cannot format the page, link or break a table. The user's
    home directory is shortened to `~`.

    Args:
        folder: the run, with its configuration, environment, metrics and ledger.
        model: where weights and processor lie.
    """
    config = json.loads(folder.config.read_text("utf-8"))
    start = json.loads(folder.environment.read_text("utf-8"))["starts"][-1]
    records = [json.loads(line) for line in folder.metrics.read_text("utf-8").splitlines()]
    trained = [record for record in records if "loss" in record]
    loss, base = config["loss"]["name"], config["model"]["name"]
    name = re.sub(r"[^\w .+-]", "_", Path(base).name)  # as it may stand in a heading
    adapter = (model / "adapter_config.json").is_file()
    sources = began_with(folder.path)
    data_sets = dict.fromkeys(re.split("[:@]", source.path)[0] for source in sources)
    metadata = ModelCardData(
        base_model=base if _on_hub(base) else None,
        datasets=[name for name in data_sets if _on_hub(name)] or None,
        library_name="peft" if adapter else "transformers",
        tags=["unidpo", "preference-optimization", loss],
    )
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # Markdown; what is not ours goes through the filters
        keep_trailing_newline=True,
    )
    templates.filters |= {"code": _code, "cell": _cell, "number": _number, "fenced": _fenced}
    text = templates.get_template("card.md.j2").render(
        metadata=f"---\n{metadata.to_yaml()}\n---\n",
        title=f"{name}, {TITLES.get(loss, loss)}",
        base=_home(base),
        loss=loss,
        adapter=adapter,
        best=_best(folder, config["train"]),
        sources=[replace(source, path=_home(source.path)) for source in sources],
        held_out=[record for record in records if "eval_loss" in record][-HELD_OUT_ROWS:],
        held_out_share=f"{config['data']['eval_fraction']:.0%}",
        last={name: value for name, value in trained[-1].items() if name != "epoch"} if trained else {},
        command=_home(shlex.join(["unidpo", *start["command"][1:]])),
        recipe=_home(OmegaConf.to_yaml(OmegaConf.create(config))),
        python=start["python"],
        packages={name: version for name, version in start["packages"].items() if version},
        **_counts(pq.read_table(folder.ledger)),
    )
    (model / "README.md").write_text(text, "utf-8")


def _on_hub(name: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None and not Path(name).exists()


def _best(folder: RunFolder, train: Mapping[str, Any]) -> dict[str, Any] | None:
    """The step whose weights these are and by what it was chosen, where that is not the last."""
    state = folder.last_checkpoint
    if not train.get("load_best_model_at_end") or state is None:
        return None
    step = json.loads((state / "trainer_state.json").read_text("utf-8")).get("best_global_step")
    return None if step is None else {"step": step, "metric": train.get("metric_for_best_model") or "loss"}


def _counts(ledger: pa.Table) -> dict[str, int]:
    """How much was trained on."""

    def distinct(*columns: str) -> int:
        return int(ledger.group_by(list(columns)).aggregate([]).num_rows)

    return {
        "rows": distinct("file", "row"),
        "pairs": distinct("file", "row", "chosen", "rejected"),
        "visits": ledger.num_rows,
        "steps": distinct("step"),
    }


def _home(text: str) -> str:
    home = str(Path.home())
    return text if home == "/" else re.sub(rf"{re.escape(home)}(?=/|\b)", "~", text)


def _code(text: str) -> str:
    """On one line, between more backticks than there are inside."""
    line = " ".join(text.split())
    ticks = "`" * (_longest_ticks(line) + 1)
    return f"{ticks} {line} {ticks}" if "`" in line else f"`{line}`"


def _cell(text: str) -> str:
    return _code(text).replace("|", "\\|")


def _fenced(text: str, language: str) -> str:
    fence = "`" * max(3, _longest_ticks(text) + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}\n"


def _longest_ticks(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def _number(value: Any) -> str:
    if value is None:  # how metrics write what is not a number
        return "not a number"
    return str(value) if isinstance(value, int) else f"{value:.4g}"
