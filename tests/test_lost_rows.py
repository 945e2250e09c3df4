"""Rows that could be read when the data was checked and cannot any more: before the first step, and in training."""

import functools
from dataclasses import replace

import pytest
from transformers import TrainerCallback

from trainers import some_groups, trainer_of
from unidpo.errors import DataError
from unidpo.losses import SimPO
from worlds import group


@pytest.fixture
def make(tmp_path):
    return functools.partial(trainer_of, tmp_path / "out")


def warnings_in(caplog):
    return [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]


@pytest.mark.parametrize("loss", [None, SimPO()], ids=["with a reference", "without"])
@pytest.mark.parametrize("which", [0, 2], ids=["the smallest", "another"])
@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_an_image_that_vanishes_before_the_first_step(make, tmp_path, caplog, on_bad_row, which, loss):
    """Before the reference pass, where there is one; a look at the smallest prompt comes first in any case."""
    groups = [group(images=1, responses=(3 + i, 5 + i), seed=i, row=i + 1) for i in range(4)]
    path = tmp_path / "here.png"
    groups[which].images[0].save(path)
    groups[which] = replace(groups[which], images=(path,))
    visited = []
    options = {
        "num_train_epochs": 2,
        "max_steps": -1,
        "on_bad_row": on_bad_row,
        "loss": loss,
        "max_lost_fraction": 0.25,
    }
    trainer = make(groups, batch=(1, 2), on_pairs=lambda columns: visited.extend(columns["row"]), **options)
    path.unlink()
    if on_bad_row == "error":
        with pytest.raises(DataError, match=rf"row {which + 1}: .*here\.png"):
            trainer.train()
        return
    trainer.train()
    assert sorted(visited) == sorted(2 * [row for row in (1, 2, 3, 4) if row != which + 1])
    named, counted = warnings_in(caplog)
    assert f"row {which + 1}" in named
    assert counted.startswith("1 rows")


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_an_image_that_vanishes_during_training(make, tmp_path, caplog, on_bad_row):
    groups = some_groups()
    path = tmp_path / "here.png"
    groups[2].images[0].save(path)
    groups[2] = replace(groups[2], images=(path,))
    trainer = make(
        groups,
        batch=(1, 2),
        shuffle=False,
        on_bad_row=on_bad_row,
        max_lost_fraction=0.25,
        on_pairs=lambda columns: path.unlink(missing_ok=True),  # after the first step
    )
    if on_bad_row == "error":
        with pytest.raises(DataError, match=r"row 3.*here\.png"):
            trainer.train()
    else:
        trainer.train()
        assert trainer.state.global_step == 2
        assert "row 3" in caplog.text


def with_an_image_that_goes(folder):
    """Two groups; a callback deletes the image of the second one, row 2, after the first step."""
    path = folder / "gone.png"
    groups = some_groups()[:2]
    picture = group(images=1, seed=9)
    picture.images[0].save(path)
    groups[1] = replace(picture, images=(path,), pairs=tuple(replace(pair, row=2) for pair in picture.pairs))

    class Delete(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            path.unlink(missing_ok=True)

    return groups, Delete()


def test_a_row_that_goes_bad_in_training_is_left_out_named_and_counted(make, tmp_path, caplog):
    groups, delete = with_an_image_that_goes(tmp_path)
    visited = []
    options = {"num_train_epochs": 3, "max_steps": -1, "batch": (4, 1), "shuffle": False, "callbacks": [delete]}
    options |= {"on_bad_row": "skip", "max_lost_fraction": 0.5}
    trainer = make(groups, on_pairs=lambda columns: visited.append(set(columns["row"])), **options)
    trainer.train()
    assert 2 in visited[0]
    assert visited[1:] == [visited[0] - {2}] * 2
    said = warnings_in(caplog)
    assert len(said) == 2  # the row once, though it is met twice, and the count
    assert "row 2" in said[0]
    assert said[1].startswith("1 rows")


def test_a_row_that_goes_bad_in_training_stops_it_by_default(make, tmp_path):
    groups, delete = with_an_image_that_goes(tmp_path)
    trainer = make(groups, num_train_epochs=3, max_steps=-1, batch=(4, 1), shuffle=False, callbacks=[delete])
    with pytest.raises(DataError, match="row 2"):
        trainer.train()
