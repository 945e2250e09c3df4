"""What stored numbers have in common: folders that name their version, and a disk that has no room."""

import os
import platform
import resource
import subprocess

import pytest
import torch

from unidpo.cache.features import FeatureStore, stored_tensors
from unidpo.cache.reference import Logp, LogpStore
from unidpo.cache.store import numbers_folder
from unidpo.errors import UserError
from unidpo.model.features import image_features
from worlds import group, tiny_policy


@pytest.fixture(scope="module")
def world():
    """The golden model, its encoder, and a prompt with an image."""
    model, _, encoder = tiny_policy()
    return model, encoder, encoder.encode(group())


def logps(folder, world, of=b"a"):
    store = LogpStore(folder)
    store.add({of + number.to_bytes(15): Logp(-1.0, 1) for number in range(100)})
    return store


def features(folder, world, of=b"a"):
    model, _, prompt = world
    store = FeatureStore(folder)
    store.add({of + b"key of a prompt": stored_tensors(prompt, image_features(model, prompt.vision))})
    return store


@pytest.mark.parametrize("filled", [logps, features])
def test_a_disk_without_room_is_named_and_nothing_half_written_stays(filled, world, tmp_path):
    filled(tmp_path, world).flush()
    store = filled(tmp_path, world, b"b")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, before[1]))
    try:
        with pytest.raises(UserError, match=rf"{tmp_path}: cannot be written \(.*too large.*UNIDPO_CACHE"):
            store.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len([*tmp_path.iterdir()]) == 1
    store.flush()  # what was added is not forgotten
    assert len([*tmp_path.iterdir()]) == 2


@pytest.mark.parametrize("store", [LogpStore, FeatureStore])
def test_what_a_living_process_is_writing_is_left_and_a_dead_ones_is_removed(store, tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    writing = {pid: tmp_path / f".{platform.node()}-{pid}-part-1.unfinished" for pid in (os.getpid(), dead.pid)}
    elsewhere = tmp_path / f".another-{platform.node()}-{dead.pid}-part-1.unfinished"
    for part in (*writing.values(), elsewhere):
        part.touch()
    store(tmp_path)
    assert {*tmp_path.iterdir()} == {writing[os.getpid()], elsewhere}


@pytest.mark.parametrize("filled", [logps, features])
def test_a_folder_that_cannot_be_made_is_named(filled, world, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/store: cannot be written \(.*Not a directory"):
        filled(tmp_path / "file" / "store", world).flush()


@pytest.mark.parametrize("kind", ["reference", "features"])
def test_numbers_of_another_version_are_not_found(kind, world, tmp_path, monkeypatch):
    def folder():
        return numbers_folder(tmp_path, kind, "aa", world[1], compute_dtype=torch.float32)

    before = folder()
    assert before == folder()
    monkeypatch.setattr("unidpo.cache.store.NUMBERS", 10**6)
    assert before != folder()
    assert before.parent == folder().parent == tmp_path / kind
