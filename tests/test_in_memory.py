"""Data sets that are in memory: what files hold, as `datasets.Dataset` and as lists, says the same."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from trainers import trainer_of
from unidpo.data.formats import LAYOUTS, groups_of, read_groups, write_pairs
from unidpo.data.images import open_image
from unidpo.errors import DataError
from worlds import GOLDEN, group

ROWS = json.loads((GOLDEN / "data" / "golden48.json").read_text("utf-8"))[:4]


def rows() -> list[dict[str, Any]]:
    """Four rows of the golden data with whole paths."""
    return [row | {"images": [str(GOLDEN / "data" / image) for image in row["images"]]} for row in ROWS]


def encoded(path: str) -> bytes:
    return Path(path).read_bytes()


def as_pil(path: str) -> Image.Image:
    return Image.open(io.BytesIO(encoded(path)))


def with_images(change: Callable[[str], Any]) -> list[dict[str, Any]]:
    return [row | {"images": [change(image) for image in row["images"]]} for row in rows()]


def image_dataset() -> datasets.Dataset:
    """A table whose images are an `Image` feature."""
    features = datasets.Features(
        {name: datasets.Value("string") for name in ("instruction", "chosen", "rejected")}
        | {name: datasets.Value("float64") for name in ("score_chosen", "score_rejected")}
        | {"images": datasets.List(datasets.Image())}
    )
    kept = [{name: row[name] for name in features} for row in with_images(as_pil)]
    return datasets.Dataset.from_list(kept, features=features)


def transformed() -> datasets.Dataset:
    """Rows that the user's own function makes, columns and all."""
    made = {name: [row[name] for row in with_images(as_pil)] for name in rows()[0]}
    return datasets.Dataset.from_list([{"n": i} for i in range(len(ROWS))]).with_transform(
        lambda batch: {name: [values[i] for i in batch["n"]] for name, values in made.items()}
    )


WAYS: dict[str, Callable[[], Any]] = {
    "paths": rows,
    "Path objects": lambda: with_images(Path),
    "bytes": lambda: with_images(encoded),
    "PIL": lambda: with_images(as_pil),
    "a Dataset of paths": lambda: datasets.Dataset.from_list(rows()),
    "a Dataset of images": image_dataset,
    "a Dataset in another order": lambda: image_dataset().select([3, 2, 1, 0]).select([3, 2, 1, 0]),
    "a Dataset with a function": transformed,
}


@pytest.mark.parametrize("way", WAYS)
def test_it_says_what_the_file_says(way: str) -> None:
    expected = read_groups(GOLDEN / "data" / "golden48.json").groups[: len(ROWS)]
    found = groups_of(WAYS[way](), name="train_dataset", require_scores=True)
    assert [(g.messages, g.responses, g.pairs) for g in found] == [(g.messages, g.responses, g.pairs) for g in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for image, file in zip(ours.images, theirs.images, strict=True):
            assert open_image(image).tobytes() == open_image(file).tobytes()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read(tmp_path: Path, layout: Any) -> None:
    write_pairs([group(images=0, row=1), group(images=0, seed=1, row=2)], tmp_path / "pairs.jsonl", layout=layout)
    values = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text("utf-8").splitlines()]
    expected = read_groups(tmp_path / "pairs.jsonl").groups
    for given in (values, datasets.Dataset.from_list(values)):
        assert groups_of(given, name="train_dataset") == expected


def test_a_trainer_takes_a_dataset_and_names_its_rows(tmp_path: Path) -> None:
    seen: list[Any] = []
    trainer = trainer_of(
        tmp_path / "out",
        image_dataset(),  # type: ignore[arg-type]
        eval_dataset=with_images(as_pil)[:1],
        eval_strategy="steps",
        eval_steps=1,
        shuffle=False,
        max_steps=1,
        on_pairs=seen.append,
        cache=tmp_path / "cache",
    )
    trainer.train()
    assert (seen[0]["file"], seen[0]["row"]) == (["train_dataset"] * 4, [1, 2, 3, 4])
    assert any("eval_loss" in record for record in trainer.state.log_history)


def test_the_bad_rows_of_a_dataset_are_listed(tmp_path: Path) -> None:
    bad = rows()
    bad[1]["chosen"] = ""
    bad[2]["images"] = []
    del bad[3]["score_chosen"]
    with pytest.raises(DataError) as caught:
        trainer_of(tmp_path / "out", bad)  # type: ignore[arg-type]
    heading, *lines = str(caught.value).splitlines()
    assert heading == "train_dataset: 3 of 4 rows cannot be used"
    assert [line.partition(":")[0].strip() for line in lines] == [
        "train_dataset, row 2, `chosen`",
        "train_dataset, row 3, `instruction`",
        "train_dataset, row 4, `score_chosen`",
    ]
    with pytest.raises(DataError, match=r"^eval_dataset: 3 of 4 rows"):
        trainer_of(tmp_path / "out", eval_dataset=datasets.Dataset.from_list(bad))


def test_bad_rows_are_left_out_where_asked_and_said(caplog: pytest.LogCaptureFixture) -> None:
    some = rows()
    some[1]["chosen"] = ""
    some[2]["score_chosen"] = some[2]["score_rejected"]
    found = groups_of(some, name="train_dataset", on_bad_row="skip")
    assert [pair.row for group in found for pair in group.pairs] == [1, 3, 4]
    skipped, tied, _ = (record.getMessage() for record in caplog.records)
    assert skipped.startswith("train_dataset: skipped 1 of 4 rows\n  train_dataset, row 2, `chosen`: ")
    assert tied.startswith("1 tied-scores, the first in train_dataset, row 3, `score_chosen`: ")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("pairs.json", r"train_dataset: this is a path; give what `load_pairs\('pairs.json'\)` reads"),
        (Path("pairs.json"), r"train_dataset: this is a path; give what `load_pairs\('pairs.json'\)` reads"),
        (datasets.DatasetDict({"train": datasets.Dataset.from_list(rows())}), "train_dataset: .* give one of its"),
        (datasets.Dataset.from_list(rows()).to_iterable_dataset(), "train_dataset: this has no length"),
        (["a text"], "a row is an object with keys, not a string"),
        ([group(images=0), rows()[0]], "row 1: a row is an object with keys, not a PromptGroup"),
    ],
)
def test_what_is_no_dataset(given: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        groups_of(given, name="train_dataset")
