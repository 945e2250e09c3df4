"""The model card: what a finished model was made of, written from its run folder into the model's `README.md`."""

from __future__ import annotations

import itertools
import json
import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from omegaconf import OmegaConf

from unidpo.run_folder.folder import RunFolder
from unidpo.run_folder.inputs import DataFile, began_with, data_file

TITLES = {"uni_dpo": "Uni-DPO", "dpo": "DPO", "simpo": "SimPO"}
HELD_OUT_ROWS = 12
"""Evaluations in the card; of more, evenly chosen ones."""


def write_card(folder: RunFolder, model: Path) -> None:
    """Write `README.md` into a model's folder, over what another library may have left there.

    Whatever came from the user's files stands as code: it cannot format the page, link or break a table. The user's
    home directory is shortened to `~`.

    Args:
        folder: the run, with its configuration, environment, metrics and ledger.
        model: where weights and processor lie.
    """
    config = json.loads(folder.config.read_text("utf-8"))
    starts = json.loads(folder.environment.read_text("utf-8"))["starts"]
    records = [json.loads(line) for line in folder.metrics.read_text("utf-8").splitlines()]
    evaluations = [record for record in records if "eval_loss" in record]
    trained = [record for record in records if "loss" in record]
    ledger = pq.read_table(folder.ledger) if any(folder.ledger.glob("*.parquet")) else None
    loss, base = config["loss"]["name"], config["model"]["name"]
    # As the run began with them: they may be others by now.
    files = began_with(folder.path) or [data_file(**source) for source in _sources(config["data"])]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("unidpo", "."),
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # Markdown; what is not ours goes through the filters
        keep_trailing_newline=True,
    )
    environment.filters |= {"code": _code, "cell": _cell, "number": _number, "fenced": _fenced}
    metadata = _metadata(base, loss, files, adapter=(model / "adapter_config.json").is_file())
    text = environment.get_template("card.md.j2").render(
        metadata=f"---\n{metadata.to_yaml()}\n---\n",
        title=f"{_plain(Path(base).name)}, {TITLES.get(loss, loss)}",
        base=_home(base),
        loss=loss,
        adapter=(model / "adapter_config.json").is_file(),
        best=_best(folder, config["train"]),
        sources=[replace(file, path=_home(file.path)) for file in files],
        visits=_visits(ledger),
        held_out=_thinned(evaluations),
        held_out_share=f"{config['data']['eval_fraction']:.0%}",
        last={name: value for name, value in trained[-1].items() if name != "epoch"} if trained else {},
        weights=_weights(ledger),
        gate_rates=_gate_rates(ledger),
        command=_home(_command(starts[-1]["command"])),
        recipe=_home(OmegaConf.to_yaml(OmegaConf.create(config))),
        python=starts[-1]["python"],
        packages={name: version for name, version in starts[-1]["packages"].items() if version},
    )
    (model / "README.md").write_text(text, "utf-8")


def _metadata(base: str, loss: str, files: Iterable[DataFile], *, adapter: bool) -> ModelCardData:
    """What the hub reads: only names that it can know."""
    sets = [re.split("[:@]", file.path)[0] for file in files]
    return ModelCardData(
        base_model=base if _on_hub(base) else None,
        datasets=[name for name in dict.fromkeys(sets) if _on_hub(name)] or None,
        license=_license(base),
        library_name="peft" if adapter else "transformers",
        tags=["unidpo", "preference-optimization", loss],
    )


def _on_hub(name: str) -> bool:
    if Path(name).exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _license(base: str) -> str | None:
    """The base model's, from its own card where that lies here."""
    card = Path(base) / "README.md"
    if not card.is_file():
        found = try_to_load_from_cache(base, "README.md") if _on_hub(base) else None
        if not isinstance(found, str):
            return None
        card = Path(found)
    try:
        name = ModelCard.load(card, ignore_metadata_errors=True).data.license
    except (OSError, ValueError):
        return None
    return name if isinstance(name, str) else None


def _sources(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    path = data["path"]
    several = [{"path": path, "weight": 1.0}] if isinstance(path, str) else path
    return [{"path": source["path"], "weight": source["weight"]} for source in several]


def _best(folder: RunFolder, train: Mapping[str, Any]) -> dict[str, Any] | None:
    """The step whose weights these are and by what it was chosen, where that is not the last."""
    state = folder.last_checkpoint
    if not train.get("load_best_model_at_end") or state is None:
        return None
    step = json.loads((state / "trainer_state.json").read_text("utf-8")).get("best_global_step")
    return None if step is None else {"step": step, "metric": train.get("metric_for_best_model") or "loss"}


def _visits(ledger: pa.Table | None) -> dict[str, int]:
    if ledger is None:
        return dict.fromkeys(("rows", "pairs", "visits", "steps"), 0)

    def distinct(*columns: str) -> int:
        return int(ledger.group_by(list(columns)).aggregate([]).num_rows)

    return {
        "rows": distinct("file", "row"),
        "pairs": distinct("file", "row", "chosen", "rejected"),
        "visits": ledger.num_rows,
        "steps": distinct("step"),
    }


def _weights(ledger: pa.Table | None) -> list[dict[str, Any]]:
    """Mean and quartiles of each weight; none for losses that weigh nothing."""
    if ledger is None:
        return []
    rows = []
    for name in ("quality_weight", "performance_weight"):
        values = ledger[name]
        if pc.all(pc.equal(values, 1.0)).as_py():
            continue
        quartiles = pc.quantile(values, q=[0.25, 0.5, 0.75]).to_pylist()
        rows.append({"name": name.replace("_", " "), "mean": pc.mean(values).as_py(), "quartiles": quartiles})
    return rows


def _gate_rates(ledger: pa.Table | None) -> list[float]:
    """Share of pairs with the NLL term on in each third of the training."""
    if ledger is None:
        return []
    gates = ledger.sort_by("step")["nll_gate"]
    cuts = [len(gates) * i // 3 for i in range(4)]
    thirds = (gates[a:b] for a, b in itertools.pairwise(cuts) if b > a)
    return [pc.mean(third).as_py() for third in thirds]


def _thinned(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if len(records) <= HELD_OUT_ROWS:
        return records
    return [records[round(i * (len(records) - 1) / (HELD_OUT_ROWS - 1))] for i in range(HELD_OUT_ROWS)]


def _command(argv: Iterable[str]) -> str:
    program, *arguments = argv
    return shlex.join([*(["python", "-m", "unidpo"] if program.endswith(".py") else ["unidpo"]), *arguments])


def _home(text: str) -> str:
    home = str(Path.home())
    return text if home == "/" else re.sub(rf"{re.escape(home)}(?=/|\b)", "~", text)


def _plain(text: str) -> str:
    """A name as it may stand in a heading."""
    return re.sub(r"[^\w .+-]", "_", text)


def _code(text: str, clean: Callable[[str], str] = lambda text: text) -> str:
    """On one line, between more backticks than there are inside."""
    line = clean(" ".join(str(text).split()))
    ticks = "`" * (_longest_ticks(line) + 1)
    return f"{ticks} {line} {ticks}" if "`" in line else f"`{line}`"


def _cell(text: str) -> str:
    return _code(text, lambda line: line.replace("|", "\\|"))


def _fenced(text: str, language: str) -> str:
    fence = "`" * max(3, _longest_ticks(text) + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}\n"


def _longest_ticks(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def _number(value: Any) -> str:
    if value is None:  # how metrics write what is not a number
        return "not a number"
    return str(value) if isinstance(value, int) else f"{value:.4g}"
