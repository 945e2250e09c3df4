"""VLMEvalKit's questions and scorers, in a process of their own. Run by path; imports nothing of unidpo.

Reads one JSON object per line from standard input and answers each with one on standard output, `{"ok": ...}` or
`{"error": ...}`:

    {"do": "questions", "name": "MME", "data": TSV, "images": FOLDER, "limit": null}    unpacks the images, too
    {"do": "score", "name": "MME", "data": TSV, "answers": {INDEX: TEXT}}               after its questions

Importing VLMEvalKit switches certificate checks off, so this process opens no connection at all. Its scorers `eval`
the answers of a benchmark, and carry tables through Excel files, which change "None" and "007": here they get literals
instead of expressions, and tables that stay in memory.
"""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import runpy
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
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
    work: dict[str, Callable[..., Any]] = {"questions": kit.questions, "score": kit.score}
    print(json.dumps({"ok": importlib.metadata.version("ms-vlmeval")}), file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"ok": work[request.pop("do")](**request)}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=replies, flush=True)


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
        # VLMEvalKit's wording for Qwen2-VL, without importing all of its models.
        wording = runpy.run_path(f"{vlmeval.__path__[0]}/vlm/qwen2_vl/prompt.py")
        self.prompts = wording["Qwen2VLPromptMixin"]()
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

    def questions(self, name: str, data: str, images: str, limit: int | None) -> list[dict[str, Any]]:
        """A benchmark's questions, with the wording VLMEvalKit has for Qwen2-VL; their images are unpacked."""
        columns = self.pandas.read_csv(data, sep="\t", nrows=0).columns
        missing = [column for column in ("index", "question", "answer") if column not in columns]
        missing += [] if {"image", "image_path"} & set(columns) else ["image"]
        if missing:
            raise ValueError(f"there is no column {', '.join(missing)}")
        table = self.read(data)
        # pandas reads an answer "None" as no answer, and a column of "007" as numbers.
        spelled = self.pandas.read_csv(data, sep="\t", dtype=str, keep_default_na=False, usecols=["answer"])
        table["answer"] = spelled["answer"]
        cls = getattr(self.dataset, CLASSES[name])
        dataset = type(cls.__name__, (cls,), {"load_data": lambda *_: table})(name)
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
        has_wording = self.prompts.use_custom_prompt(name)

        def built(rows: list[int]) -> list[dict[str, Any]]:
            found = []
            for line in (dataset.data.iloc[row] for row in rows):
                parts = self.prompts.build_prompt(line, name) if has_wording else dataset.build_prompt(line)
                parts = [{"text" if part["type"] == "text" else "image": str(part["value"])} for part in parts]
                found.append({"index": str(line["index"]), "parts": parts, "choices": choices(name, line)})
            return found

        self.opened[data] = dataset
        # Images of a unit may be one file, so a unit is one thread's work.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return [question for unit in pool.map(built, units_of(name, dataset.data, limit)) for question in unit]

    def score(self, name: str, data: str, answers: dict[str, str]) -> dict[str, Any]:
        """Have VLMEvalKit score answers; questions without one are left out."""
        dataset = self.opened[data]
        asked = [str(index) in answers for index in dataset.data["index"]]
        frame = dataset.data[asked].drop(columns="image", errors="ignore").copy()
        frame["prediction"] = [answers[str(index)] for index in frame["index"]]
        read = {
            "ImageMCQDataset": self.multiple_choice,
            "ImageYORNDataset": self.yes_or_no,
            "ImageVQADataset": self.free_answers,
            "OCRBench": self.ocrbench,
        }[CLASSES[name]]
        self.tables.clear()
        # The folder stays empty but for a table or two that are written past `dump`.
        with tempfile.TemporaryDirectory() as folder:
            self.dump(frame.copy(), f"{folder}/answers.xlsx")
            table = dataset.evaluate(f"{folder}/answers.xlsx", model="exact_matching", nproc=1)
            result = read(name, frame, table, folder)
        self.tables.clear()
        return {"best": 100.0, **result, "table": cells(table)}

    def multiple_choice(self, name: str, frame: Any, table: Any, folder: str) -> dict[str, Any]:
        """A question is right if all its rolls are."""
        from vlmeval.dataset.utils.multiple_choice import prefetch_answer

        rows = self.tables[f"{folder}/answers_exact_matching_result.xlsx"]
        hits = {unit_of(name, line): float(line["hit"]) for _, line in rows.iterrows()}
        judged = []
        for _, line in frame.iterrows():
            said = prefetch_answer(line) or ""
            matched = said not in ("", "Z")
            judged.append(judged_answer(name, line, hits[unit_of(name, line)], said, matched))
        overall = [float(value) for value in table["Overall"]]
        value, parts = sum(hits.values()) / len(hits), {}
        if len(overall) == 1:
            value = overall[0]
            names = [column for column in table.columns if column not in ("split", "Overall")]
            parts = {n: 100 * float(table[n].iloc[0]) for n in names}
        metric = "circular accuracy" if name.startswith("MMBench") else "accuracy"
        return {"metric": metric, "value": 100 * value, "parts": parts, "judged": judged}

    def yes_or_no(self, name: str, frame: Any, table: Any, folder: str) -> dict[str, Any]:
        """POPE's F1, in which a question counts once for each category it belongs to; MME's sum over categories."""
        judged = []
        for _, line in self.tables[f"{folder}/answers_auxmatch.xlsx"].iterrows():
            category, said, truth = text(line.get("category")), line["extracted"], line["answer"].lower()
            for each in category.split(",") if name == "POPE" else [category]:
                matched = said != "Unknown"
                judged.append(
                    judged_answer(name, line, line["score"], said.lower(), matched, category=each, truth=truth)
                )
        if name == "POPE":
            first, *others = (line for _, line in table.iterrows())
            parts = {key: float(first[key]) for key in ("acc", "precision", "recall")}
            parts |= {f"F1 {line['split']}": float(line["Overall"]) for line in others}
            value = float(first["Overall"])
            return {"metric": "F1", "value": value, "parts": parts, "judged": judged, "statistic": "f1"}
        parts = {column: float(table[column].iloc[0]) for column in table.columns}
        value = parts["perception"] + parts["reasoning"]
        result = {"metric": "perception + reasoning", "value": value, "best": 200.0 * (len(parts) - 2), "parts": parts}
        return {**result, "judged": judged, "statistic": "mme"}

    def free_answers(self, name: str, frame: Any, table: Any, folder: str) -> dict[str, Any]:
        """ChartQA takes the best of the accepted answers, TextVQA the mean over ten people."""
        is_chart = name.startswith("ChartQA")
        judged = []
        for _, line in self.tables[f"{folder}/answers_results.xlsx"].iterrows():
            matches, said = line["eval_match"], str(line["eval_pred"])
            value = max(matches) if is_chart else sum(matches) / len(matches)
            judged.append(judged_answer(name, line, value, said, bool(said.strip())))
        parts = {column: float(table[column].iloc[0]) for column in table.columns}
        metric = "relaxed accuracy" if is_chart else "VQA score"
        return {"metric": metric, "value": parts.pop("Overall"), "parts": parts, "judged": judged}

    def ocrbench(self, name: str, frame: Any, table: Any, folder: str) -> dict[str, Any]:
        """OCRBench counts right answers, and keeps no record of single ones: each is scored alone once more."""
        judged = []
        for i, (_, line) in enumerate(frame.iterrows()):
            self.dump(frame.iloc[i : i + 1], f"{folder}/one.xlsx")
            value = self.dataset.OCRBench.evaluate(f"{folder}/one.xlsx")["Final Score"]
            said = str(line["prediction"])
            judged.append(judged_answer(name, line, value, said, bool(said.strip())))
        parts = {key: float(value) for key, value in table.items() if not key.startswith("Final Score")}
        value, best = float(table["Final Score"]), float(len(frame))
        return {"metric": "score", "value": value, "best": best, "parts": parts, "judged": judged}


def judged_answer(name: str, line: Any, value: Any, said: str, matched: bool, **more: str) -> dict[str, Any]:
    """What became of one answer, as `unidpo.evaluate.benchmarks.Judged` has it."""
    category = text(line.get("split" if CLASSES[name] == "ImageVQADataset" else "category"))
    question = {"index": str(line["index"]), "unit": unit_of(name, line), "category": category}
    return {**question, "value": float(value), "matched": matched, "said": said, **more}


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
