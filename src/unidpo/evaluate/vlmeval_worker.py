"""VLMEvalKit's questions and scorers, in a process of their own. Run by path; imports nothing of unidpo.

Reads one JSON object per line from standard input and answers each with one on standard output:

    {"do": "open", "name": "MME", "data": TSV, "images": FOLDER, "limit": null, "to": JSONL}    writes questions
    {"do": "score", "name": "MME", "data": TSV, "answers": JSON, "to": JSON}                    of an open benchmark

Importing VLMEvalKit switches certificate checks off, so this process opens no connection at all. Its scorers `eval`
the answers of a benchmark, and carry tables through Excel files, which change "None" and "007": here they get literals
instead of expressions, and tables that stay in memory.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import os
import socket
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

CLASSES = {
    "ChartQA_TEST": "ImageVQADataset",
    "MMBench_DEV_CN": "ImageMCQDataset",
    "MMBench_DEV_EN": "ImageMCQDataset",
    "MME": "ImageYORNDataset",
    "OCRBench": "OCRBench",
    "POPE": "ImageYORNDataset",
    "ScienceQA_TEST": "ImageMCQDataset",
    "SEEDBench_IMG": "ImageMCQDataset",
    "TextVQA_VAL": "ImageVQADataset",
}
"""Which of VLMEvalKit's classes a benchmark belongs to: its own guess goes wrong for some."""
ROLLS = 1_000_000
"""Circular multiple choice: rows whose index is the same modulo this are one question, its options rolled."""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def main() -> None:
    """Answer requests until standard input ends."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no reply
    sys.addaudithook(refuse_connections)
    kit = Kit()
    reply(replies, {"ok": True, "version": importlib.metadata.version("ms-vlmeval")})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "open":
                answer = kit.open(
                    request["name"], request["data"], request["images"], request["limit"], Path(request["to"])
                )
            else:
                answer = kit.score(request["name"], request["data"], Path(request["answers"]), Path(request["to"]))
        except Exception as error:
            import traceback

            traceback.print_exc()
            answer = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        reply(replies, answer)


def reply(replies: Any, answer: dict[str, Any]) -> None:
    """One line, at once."""
    replies.write(json.dumps(answer) + "\n")
    replies.flush()


def refuse_connections(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook."""
    if event == "socket.connect" and arguments[0].family != getattr(socket, "AF_UNIX", None):
        raise PermissionError(f"the scorer opens no connections ({arguments[1]})")


class Kit:
    """VLMEvalKit, imported, and the benchmarks that are open."""

    def __init__(self) -> None:
        make_torchvision_importable()
        import pandas
        import vlmeval.dataset
        from vlmeval.dataset import image_base, image_vqa
        from vlmeval.dataset.utils import vqa_eval
        from vlmeval.smp import file, misc

        self.pandas = pandas
        self.dataset = vlmeval.dataset
        self.read, write = file.load, file.dump
        self.prompts = prompt_mixin()
        self.opened: dict[str, Any] = {}
        self.tables: dict[str, Any] = {}
        unpack = image_base.decode_base64_to_image_file

        def unpack_whole(encoded: str, path: str) -> None:
            """Without half an image where the process is ended; one that can be opened is not unpacked again."""
            partial = str(Path(path).with_stem(f".{Path(path).stem}.{os.getpid()}"))
            unpack(encoded, partial)
            Path(partial).replace(path)

        image_base.decode_base64_to_image_file = unpack_whole
        for module in (misc, vqa_eval, image_vqa):
            module.eval = ast.literal_eval
        image_vqa.mp = SimpleNamespace(Pool=lambda _: SimpleNamespace(map=lambda *work: list(map(*work))))
        for name, module in list(sys.modules.items()):
            if name.startswith("vlmeval") and getattr(module, "load", None) is self.read:
                module.load = self.load  # type: ignore[attr-defined]
            if name.startswith("vlmeval") and getattr(module, "dump", None) is write:
                module.dump = self.dump  # type: ignore[attr-defined]

    def load(self, path: str, *_: Any) -> Any:
        """In place of VLMEvalKit's own."""
        found = self.tables[str(path)]
        return found.copy() if isinstance(found, self.pandas.DataFrame) else found

    def dump(self, table: Any, path: str, **_: Any) -> None:
        """In place of VLMEvalKit's own."""
        self.tables[str(path)] = table

    def open(self, name: str, data: str, images: str, limit: int | None, to: Path) -> dict[str, Any]:
        """Write a benchmark's questions, with the wording VLMEvalKit has for Qwen2-VL, and unpack their images."""
        cls = getattr(self.dataset, CLASSES[name])
        columns = self.pandas.read_csv(data, sep="\t", nrows=0).columns
        missing = [column for column in ("index", "question", "answer") if column not in columns]
        missing += [] if {"image", "image_path"} & set(columns) else ["image"]
        if missing:
            raise ValueError(f"there is no column {', '.join(missing)}")
        lost = 0

        def load_data(_: Any, __: str) -> Any:
            nonlocal lost
            table = self.read(data)
            spelled = self.pandas.read_csv(
                data, sep="\t", dtype=str, keep_default_na=False, usecols=lambda c: c == "answer" or c in list(LETTERS)
            )
            # pandas reads an answer "None" as no answer, and a column of "007" as numbers.
            table["answer"] = spelled["answer"]
            options = [c for c in spelled.columns if c != "answer"]
            lost = int(((spelled[options] != "") & table[options].isna()).sum().sum())
            return table

        dataset = type(cls.__name__, (cls,), {"load_data": load_data})(name)
        dataset.img_root = images
        dump_image = dataset.dump_image

        def dumped(line: Any) -> list[str]:
            try:
                return list(dump_image(line))
            except Exception as error:  # one damaged image is one question less, not a benchmark less
                sys.stderr.write(f"{name}, {line['index']}: {error}\n")
                return [str(Path(images) / f"{line['index']}.unreadable")]

        dataset.dump_image = dumped
        self.prompts.set_dump_image(dumped)
        build = self.prompts.build_prompt if self.prompts.use_custom_prompt(name) else None

        def lines(rows: list[int]) -> str:
            written = ""
            for line in (dataset.data.iloc[row] for row in rows):
                built = dataset.build_prompt(line) if build is None else build(line, name)
                parts = [{"text" if part["type"] == "text" else "image": str(part["value"])} for part in built]
                written += (
                    json.dumps({"index": str(line["index"]), "parts": parts, "choices": choices(name, line)}) + "\n"
                )
            return written

        # Images of a unit may be one file, so a unit is one thread's work.
        with to.open("w", encoding="utf-8") as file, ThreadPoolExecutor(os.cpu_count()) as pool:
            for written in pool.map(lines, units_of(name, dataset.data, limit)):
                file.write(written)
        self.opened[data] = dataset
        return {"ok": True, "lost_options": lost}

    def score(self, name: str, data: str, answers: Path, to: Path) -> dict[str, Any]:
        """Have VLMEvalKit score answers; questions without one are left out."""
        dataset = self.opened[data]
        given: dict[str, str] = json.loads(answers.read_text("utf-8"))
        asked = [str(index) in given for index in dataset.data["index"]]
        frame = dataset.data[asked].drop(columns="image", errors="ignore").copy()
        frame["prediction"] = [given[str(index)] for index in frame["index"]]
        self.tables.clear()
        # The folder stays empty but for a table or two that are written past `dump`.
        with tempfile.TemporaryDirectory() as folder:
            self.dump(frame.copy(), f"{folder}/answers.xlsx")
            table = dataset.evaluate(f"{folder}/answers.xlsx", model="exact_matching", nproc=1)
            result = getattr(self, f"_{CLASSES[name]}")(name, frame, table, folder)
        to.write_text(json.dumps({**result, "table": cells(table)}), "utf-8")
        self.tables.clear()
        return {"ok": True}

    def _ImageMCQDataset(self, name: str, frame: Any, table: Any, folder: str) -> dict[str, Any]:  # noqa: N802
        from vlmeval.dataset.utils.multiple_choice import prefetch_answer

        rows = self.tables[f"{folder}/answers_exact_matching_result.xlsx"]
        hits = {unit_of(name, line): float(line["hit"]) for _, line in rows.iterrows()}
        judged = []
        for _, line in frame.iterrows():
            said = prefetch_answer(line)
            unit, matched = unit_of(name, line), bool(said) and said != "Z"
            row = {"value": hits[unit], "matched": matched, "category": text(line.get("category")), "said": said or ""}
            judged.append({"index": str(line["index"]), "unit": unit, **row})
        overall = [float(value) for value in table["Overall"]]
        value = overall[0] if len(overall) == 1 else sum(hits.values()) / len(hits)
        names = [column for column in table.columns if column not in ("split", "Overall")]
        parts = {n: 100 * float(table[n].iloc[0]) for n in names} if len(overall) == 1 else {}
        metric = "circular accuracy" if name.startswith("MMBench") else "accuracy"
        return {"metric": metric, "value": 100 * value, "best": 100.0, "parts": parts, "judged": judged}

    def _ImageYORNDataset(self, name: str, frame: Any, table: Any, folder: str) -> dict[str, Any]:  # noqa: N802
        rows = self.tables[f"{folder}/answers_auxmatch.xlsx"]
        judged = []
        for _, line in rows.iterrows():
            category = text(line.get("category"))
            row = {"value": float(line["score"]), "matched": line["extracted"] != "Unknown"}
            row |= {"truth": line["answer"].lower(), "said": line["extracted"].lower()}
            row |= {"index": str(line["index"]), "unit": unit_of(name, line)}
            # POPE counts a question once for each category it belongs to.
            judged += [{**row, "category": each} for each in (category.split(",") if name == "POPE" else [category])]
        if name == "POPE":
            first = table.iloc[0]
            parts = {key: float(first[key]) for key in ("acc", "precision", "recall")}
            parts |= {f"F1 {line['split']}": float(line["Overall"]) for _, line in list(table.iterrows())[1:]}
            value = float(first["Overall"])
            return {"metric": "F1", "value": value, "best": 100.0, "parts": parts, "judged": judged, "statistic": "f1"}
        parts = {column: float(table[column].iloc[0]) for column in table.columns}
        value = parts["perception"] + parts["reasoning"]
        best = 200.0 * (len(parts) - 2)
        result = {"metric": "perception + reasoning", "value": value, "best": best, "parts": parts}
        return {**result, "judged": judged, "statistic": "mme"}

    def _ImageVQADataset(self, name: str, frame: Any, table: Any, folder: str) -> dict[str, Any]:  # noqa: N802
        rows = self.tables[f"{folder}/answers_results.xlsx"]
        best_of = max if name.startswith("ChartQA") else lambda matches: sum(matches) / len(matches)
        judged = []
        for _, line in rows.iterrows():
            value, said = float(best_of(line["eval_match"])), str(line["eval_pred"])
            row = {"value": value, "matched": bool(said.strip()), "category": text(line.get("split")), "said": said}
            judged.append({"index": str(line["index"]), "unit": unit_of(name, line), **row})
        parts = {column: float(table[column].iloc[0]) for column in table.columns}
        metric = "relaxed accuracy" if name.startswith("ChartQA") else "VQA score"
        value = parts.pop("Overall")
        return {"metric": metric, "value": value, "best": 100.0, "parts": parts, "judged": judged}

    def _OCRBench(self, name: str, frame: Any, table: Any, folder: str) -> dict[str, Any]:  # noqa: N802
        judged = []
        for i, (_, line) in enumerate(frame.iterrows()):
            self.dump(frame.iloc[i : i + 1], f"{folder}/one.xlsx")  # it keeps no record of single answers
            value = float(self.dataset.OCRBench.evaluate(f"{folder}/one.xlsx")["Final Score"])
            said = str(line["prediction"])
            row = {"value": value, "matched": bool(said.strip()), "category": text(line["category"]), "said": said}
            judged.append({"index": str(line["index"]), "unit": unit_of(name, line), **row})
        parts = {key: float(value) for key, value in table.items() if not key.startswith("Final Score")}
        value = float(table["Final Score"])
        return {"metric": "score", "value": value, "best": float(len(frame)), "parts": parts, "judged": judged}


def choices(name: str, line: Any) -> dict[str, str]:
    """What an answer can mean, and what stands behind it; empty where answers are free."""
    if CLASSES[name] == "ImageYORNDataset":
        return {"yes": "", "no": ""}
    if CLASSES[name] == "ImageMCQDataset":
        return {letter: option for letter in LETTERS if (option := text(line.get(letter)))}
    return {}


def units_of(name: str, data: Any, limit: int | None) -> list[list[int]]:
    """Row numbers by unit; of the first units that have `limit` rows together."""
    units: dict[str, list[int]] = {}
    for row in range(len(data)):
        units.setdefault(unit_of(name, data.iloc[row]), []).append(row)
    chosen: list[list[int]] = []
    for rows in units.values():
        if limit is not None and sum(map(len, chosen)) >= limit:
            break
        chosen.append(rows)
    return chosen


def unit_of(name: str, line: Any) -> str:
    """Rows of one unit are scored together: the rolls of a question, the two questions on a picture of MME."""
    if name.startswith("MMBench"):
        return str(int(line["index"]) % ROLLS)
    if name == "MME":
        return f"{line['category']}/{line['image_path']}"
    return str(line["index"])


def text(value: Any) -> str:
    """A cell as text; an empty one is NaN."""
    return "" if value is None or value != value else str(value)


def cells(table: Any) -> list[list[str]]:
    """A scorer's own table as rows of text."""
    if isinstance(table, dict):
        return [list(table), [str(value) for value in table.values()]]
    return [list(map(str, table.columns)), *([str(cell) for cell in row] for row in table.itertuples(index=False))]


def prompt_mixin() -> Any:
    """VLMEvalKit's wording for Qwen2-VL, without importing all of its models."""
    spec = importlib.util.find_spec("vlmeval")
    assert spec is not None
    assert spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0]) / "vlm" / "qwen2_vl" / "prompt.py"
    loading = importlib.util.spec_from_file_location("qwen2_vl_prompt", path)
    assert loading is not None
    assert loading.loader is not None
    module = importlib.util.module_from_spec(loading)
    loading.loader.exec_module(module)
    return module.Qwen2VLPromptMixin()


def make_torchvision_importable() -> None:
    """Beside a CPU-only torch, torchvision registers kernels for operators that nobody defined."""
    import torch

    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
    else:
        return
    for operator in ("nms", "qnms"):
        torch.library.define(f"torchvision::{operator}", "(Tensor boxes, Tensor scores, float threshold) -> Tensor")


if __name__ == "__main__":
    main()
