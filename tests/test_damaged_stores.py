"""Damaged parts of both stores: named, put aside, and what they held computed anew; nothing of them is trained on."""

import json
import os
import re
import shutil
import socket
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from test_train import metrics_of, rows_of, unidpo, write_recipe, write_rows
from trainers import some_groups
from unidpo.cache.features import FeaturePass, FeatureStore
from unidpo.cache.keys import content_keys
from unidpo.cache.reference import Logp, LogpStore, ReferencePass
from unidpo.cache.store import write_part
from unidpo.errors import ModelError
from unidpo.model.attention import PACK_ATTENTION, set_text_attention
from unidpo.model.packs import pack
from unidpo.model.policy import Policy
from worlds import tiny_policy

CHANGED = "is damaged: its bytes are not those that were written into this folder"


# --- what happens to any file ----------------------------------------------------------------------------------------


def flip(part, byte, bit=0):
    content = bytearray(part.read_bytes())
    content[byte] ^= 1 << bit
    part.write_bytes(content)


def in_place_of(part, make):
    """Make something else under the part's name."""
    part.unlink()
    make(part)


def a_zip(part):
    with zipfile.ZipFile(part, "w") as archive:
        archive.writestr("part", b"numbers")


def a_socket(part):
    here = Path.cwd()
    os.chdir(part.parent)  # names of sockets must be short
    try:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(part.name)
    finally:
        os.chdir(here)


ANY_FILE = {
    "the first byte": (lambda part: flip(part, 0), CHANGED),
    "the last byte": (lambda part: flip(part, -1, 7), CHANGED),
    "a byte before the end": (lambda part: flip(part, -200), CHANGED),
    "truncated": (lambda part: os.truncate(part, part.stat().st_size - 30), CHANGED),
    "half": (lambda part: os.truncate(part, part.stat().st_size // 2), CHANGED),
    "empty": (lambda part: os.truncate(part, 0), CHANGED),
    "zeros, as a disk that lost its power leaves them": (
        lambda part: part.write_bytes(bytes(part.stat().st_size)),
        CHANGED,
    ),
    "something behind it": (lambda part: part.write_bytes(part.read_bytes() + b"\n"), CHANGED),
    "a text file": (lambda part: part.write_text("logp\n-1.0\n"), CHANGED),
    "a zip": (lambda part: in_place_of(part, a_zip), CHANGED),
    "a pickle": (lambda part: torch.save({"logp": torch.ones(3)}, part), CHANGED),
    "a folder": (lambda part: in_place_of(part, Path.mkdir), "cannot be read .*Is a directory"),
    "a pipe": (lambda part: in_place_of(part, os.mkfifo), "cannot be read .*named pipe"),
    "a socket": (lambda part: in_place_of(part, a_socket), "cannot be read .*a socket"),
    "a link to itself": (lambda part: in_place_of(part, lambda p: p.symlink_to(p)), "cannot be read .*symbolic links"),
    "a link to nothing": (lambda part: in_place_of(part, lambda p: p.symlink_to("gone")), "cannot be read .*No such"),
    "a link to a device": (lambda part: in_place_of(part, lambda p: p.symlink_to("/dev/zero")), "cannot be .*a device"),
    # Also root, who may read anything, cannot read this.
    "a file that cannot be read": (
        lambda part: in_place_of(part, lambda p: p.symlink_to("/proc/self/mem")),
        "cannot be read .*(error|device)",
    ),
    "a part of an older version": (
        lambda part: part.rename(part.with_stem("part-0123456789abcdef0123456789abcdef")),
        CHANGED,
    ),
}


# --- stored log-probabilities ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """A store of two parts, the groups in it, their keys, and what a pass finds in it."""

    folder: Path
    groups: list
    keys: object
    found: list


@pytest.fixture(scope="module")
def packs():
    model, _, encoder = tiny_policy()
    set_text_attention(model, PACK_ATTENTION)
    return model, encoder


def reference_pass(packs, groups, folder, **options):
    model, encoder = packs
    forward = ReferencePass(Policy(model, model), encoder, torch.device("cpu"), collate=pack)
    return forward.logps(groups, content_keys(groups).responses, folder, **options)


@pytest.fixture(scope="module")
def logps(packs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference") / "a-store"
    groups = some_groups(5)
    reference_pass(packs, groups[:2], folder)
    found = reference_pass(packs, groups, folder)
    return Stored(folder, groups, content_keys(groups).responses, found)


def a_copy(stored, folder):
    """Of a store, under the name it must have."""
    return Path(shutil.copytree(stored.folder, folder / stored.folder.name, symlinks=True))


def part_of_first(folder):
    """The smaller part, with the numbers of the first two groups."""
    return min(folder.iterdir(), key=lambda part: part.stat().st_size)


def column_byte(part, column):
    """A byte in the middle of a column's page."""
    chunk = pq.read_metadata(part).row_group(0).column(column)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    return start + chunk.total_compressed_size // 2


def with_logps(table, logps):
    at = table.schema.get_field_index("logp")
    return table.set_column(at, table.schema.field("logp"), logps.combine_chunks())


LOGP_PARTS = ANY_FILE | {
    "a bit of a number": (lambda part: flip(part, column_byte(part, 1), 3), CHANGED),
    "a bit of a key": (lambda part: flip(part, column_byte(part, 0), 5), CHANGED),
    "a bit of a count of tokens": (lambda part: flip(part, column_byte(part, 2)), CHANGED),
}


@pytest.mark.parametrize("kind", LOGP_PARTS)
def test_a_damaged_part_of_log_probabilities_is_computed_anew(packs, logps, tmp_path, caplog, kind):
    damage, problem = LOGP_PARTS[kind]
    folder = a_copy(logps, tmp_path)
    part = damaged(part_of_first(folder), damage)
    assert_mended(packs, logps, folder, caplog, [part], problem)


def damaged(part, damage):
    """The part where it is now."""
    other = damage(part)
    return other if isinstance(other, Path) else part


def assert_mended(packs, logps, folder, caplog, parts, problem):
    with caplog.at_level("INFO", "unidpo"):
        again = reference_pass(packs, logps.groups, folder)
    for part in parts:
        (said,) = [text for text in caplog.messages if text.startswith(f"{part}: ")]
        assert re.search(problem, said), said
        assert f"put aside as {part.name}.damaged" in said
        assert "computed anew" in said
        assert os.path.lexists(f"{part}.damaged")
    assert sum("put aside" in text for text in caplog.messages) == len(parts)
    for ours, theirs in zip(again, logps.found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    caplog.clear()
    with caplog.at_level("INFO", "unidpo"):
        reference_pass(packs, logps.groups, folder)
    (said,) = caplog.messages
    assert "10 responses found" in said


def test_parts_that_contradict_each_other_are_both_computed_anew(packs, logps, tmp_path, caplog):
    folder = a_copy(logps, tmp_path)
    one = part_of_first(folder)
    table = pq.read_table(one)
    table = with_logps(table, pc.subtract(table["logp"], 20.0))
    other = write_part(folder, ".parquet", lambda unfinished: pq.write_table(table, unfinished))
    assert_mended(packs, logps, folder, caplog, [one, other], "contradicts part-")


def test_parts_that_differ_by_rounding_do_not_contradict_each_other(logps, tmp_path, caplog):
    folder = a_copy(logps, tmp_path)
    table = pq.read_table(part_of_first(folder))
    table = with_logps(table, pc.multiply(table["logp"], 1.01))
    write_part(folder, ".parquet", lambda unfinished: pq.write_table(table, unfinished))
    assert len(LogpStore(folder)) == 10
    assert caplog.messages == []


def test_a_part_of_another_model_is_not_taken(packs, logps, tmp_path, caplog):
    folder, others = a_copy(logps, tmp_path), tmp_path / "store-of-another-model"
    store = LogpStore(others)
    store.add({key: Logp(-1.0, 5) for keys in logps.keys for key in keys})
    store.flush()
    (part,) = others.iterdir()
    assert_mended(packs, logps, folder, caplog, [Path(shutil.copy(part, folder))], CHANGED)


def test_a_part_that_cannot_be_renamed_is_left_out(packs, logps, tmp_path, caplog):
    folder = a_copy(logps, tmp_path)
    part = part_of_first(folder)
    flip(part, 40)
    (folder / f"{part.name}.damaged").mkdir()
    for ours, theirs in zip(reference_pass(packs, logps.groups, folder), logps.found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    (said,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert f"{part}: is damaged" in said
    assert "left out, and cannot be renamed" in said


def test_what_cannot_be_computed_any_more_is_an_error(packs, logps, tmp_path, caplog):
    folder = a_copy(logps, tmp_path)
    flip(part_of_first(folder), 40)
    with pytest.raises(ModelError, match=r"a-store: 4 stored .* are gone or damaged.*begin the run anew"):
        reference_pass(packs, logps.groups, folder, complete=True)
    assert CHANGED in caplog.text


# --- stored features of images ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def eyes():
    model, _, encoder = tiny_policy()
    return model, encoder


def feature_pass(eyes, groups, folder):
    """The prompts with their features, and how many were computed."""
    model, encoder = eyes
    done = [(0, 0)]
    features = FeaturePass(Policy(model, model), encoder, torch.device("cpu"), on_progress=lambda *so: done.append(so))
    ours = features.run(groups, content_keys(groups), folder)
    return [ours.encode(one, ()) for one in groups], done[-1][0]


@pytest.fixture(scope="module")
def features(eyes, tmp_path_factory):
    """Two prompts in a part, three in another one."""
    folder = tmp_path_factory.mktemp("features") / "a-store"
    groups = some_groups(5)
    feature_pass(eyes, groups[:2], folder)
    found, computed = feature_pass(eyes, groups, folder)
    assert computed == 3
    return Stored(folder, groups, content_keys(groups).prompts, found)


def resaved(change):
    """A part as this package would write it, were its tensors others."""

    def damage(part):
        tensors = load_file(part)
        key = min(tensors).partition(".")[0]
        change(tensors, key)
        part.unlink()
        return write_part(part.parent, ".safetensors", lambda unfinished: save_file(tensors, unfinished))

    return damage


def of_tensor(part, name):
    """The first byte of a tensor in the file."""
    content = part.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    return 8 + length + next(value["data_offsets"][0] for key, value in header.items() if key.endswith(name))


def swap_names(part):
    """Of two tensors, in the header alone."""
    content = part.read_bytes()
    one, other = (re.search(rb"[0-9a-f]{32}\.%s" % name, content)[0] for name in (b"pooled", b"prompt_ids"))
    part.write_bytes(content.replace(one, b"?" * 39).replace(other, other[:32] + b".pooled").replace(b"?" * 39, other))


FEATURE_PARTS = ANY_FILE | {
    "a bit of a feature": (lambda part: flip(part, of_tensor(part, "pooled") + 2, 6), CHANGED),
    "a bit of a prompt": (lambda part: flip(part, of_tensor(part, "prompt_ids")), CHANGED),
    "a bit of a length in the header": (lambda part: flip(part, 0, 3), "cannot be read"),
    "a key that is none": (
        resaved(lambda tensors, key: tensors.update({"weight": torch.ones(1)})),
        "cannot be read .*hexadecimal",
    ),
    "no tensors": (
        lambda part: part.unlink() or write_part(part.parent, ".safetensors", lambda file: file.write_bytes(b"{}")),
        "cannot be read",
    ),
}
# These safetensors notices by itself, before the part is read through.
FEATURE_PARTS |= {
    kind: (damage, f"{CHANGED}|cannot be read") for kind, (damage, problem) in ANY_FILE.items() if problem == CHANGED
}


@pytest.mark.parametrize("kind", FEATURE_PARTS)
def test_a_damaged_part_of_features_is_computed_anew(eyes, features, tmp_path, caplog, kind):
    damage, problem = FEATURE_PARTS[kind]
    folder = a_copy(features, tmp_path)
    part = damaged(part_of_first(folder), damage)
    assert_seen_again(eyes, features, folder, caplog, part, problem)


def assert_seen_again(eyes, features, folder, caplog, part, problem, computed=2):
    with caplog.at_level("INFO", "unidpo"):
        again, anew = feature_pass(eyes, features.groups, folder)
    assert anew == computed
    (said,) = [text for text in caplog.messages if "put aside" in text]
    assert said.startswith(f"{part}: ")
    assert re.search(problem, said), said
    assert f"put aside as {part.name}.damaged" in said
    assert os.path.lexists(f"{part}.damaged")
    for ours, theirs in zip(again, features.found, strict=True):
        assert torch.equal(ours.prompt_ids, theirs.prompt_ids)
        torch.testing.assert_close(ours.features.pooled, theirs.features.pooled, rtol=0, atol=1e-5)
    caplog.clear()
    assert feature_pass(eyes, features.groups, folder)[1] == 0
    assert caplog.messages == []


def test_features_under_each_others_names_are_not_taken(eyes, features, tmp_path, caplog):
    folder = a_copy(features, tmp_path)
    part = part_of_first(folder)
    swap_names(part)
    assert_seen_again(eyes, features, folder, caplog, part, f"{CHANGED}|cannot be read")


def test_features_of_another_tower_are_not_taken(eyes, features, tmp_path, caplog):
    folder, others = a_copy(features, tmp_path), tmp_path / "store-of-another-tower"
    feature_pass(eyes, features.groups[:1], others)
    part_of_first(folder).unlink()
    (part,) = others.iterdir()
    assert_seen_again(eyes, features, folder, caplog, Path(shutil.copy(part, folder)), CHANGED)


def test_a_part_that_no_prompt_of_the_run_is_in_is_not_read_through(eyes, features, tmp_path, caplog):
    folder = a_copy(features, tmp_path)
    flip(part_of_first(folder), -1)
    assert feature_pass(eyes, features.groups[2:], folder)[1] == 0
    assert caplog.messages == []


def test_a_part_that_is_written_anew_under_its_old_name_is_opened_anew(eyes, features, tmp_path, caplog):
    folder = a_copy(features, tmp_path)
    feature_pass(eyes, features.groups, folder)  # opens both parts
    part = part_of_first(folder)
    flip(part, of_tensor(part, "pooled") + 3, 6)  # in the file that is open
    again, _ = feature_pass(eyes, features.groups[:2], folder)
    assert part.is_file()
    for ours, theirs in zip(again, features.found, strict=False):
        torch.testing.assert_close(ours.features.pooled, theirs.features.pooled, rtol=0, atol=1e-5)


def test_each_process_reads_its_share_of_the_parts_and_all_leave_out_what_one_finds(features, tmp_path, monkeypatch):
    folder = a_copy(features, tmp_path)
    ours, theirs = sorted(part.name for part in folder.iterdir())
    read = []
    monkeypatch.setattr("unidpo.cache.features.part_damage", lambda part: read.append(part.name))
    monkeypatch.setattr("unidpo.cache.features.world_size", lambda: 2)
    monkeypatch.setattr(
        "unidpo.cache.features.gather",
        lambda values: [*values, {theirs: "is damaged"} if isinstance(values[0], dict) else True],
    )
    store = FeatureStore.shared(folder, features.keys)
    assert read == [ours]
    assert set(store.index.values()) == {ours}
    assert (folder / f"{theirs}.damaged").exists()


# --- through the command ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run with both stores, and its metrics."""
    folder = tmp_path_factory.mktemp("finished")
    data = write_rows(folder, rows_of(8)) | {"cache_image_features": True}
    recipe = write_recipe(folder, data=data, train={"global_batch_pairs": 4, "logging_steps": 1})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNIDPO_CACHE", str(folder / "cache"))
        code, printed = unidpo("train", recipe)
    assert code == 0, printed
    return folder, metrics_of(folder / "run")


def run_again(finished, tmp_path, monkeypatch, *overrides):
    monkeypatch.setenv("UNIDPO_CACHE", str(tmp_path / "cache"))
    code, printed = unidpo("train", finished[0] / "recipe.yaml", f"output={tmp_path / 'run'}", *overrides)
    assert "Traceback" not in printed
    return code, printed


@pytest.mark.parametrize("kind", ["a bit of a number", "a pipe", "an older part beside it"])
def test_a_run_over_damaged_log_probabilities_is_the_run_over_none(finished, tmp_path, monkeypatch, kind):
    shutil.copytree(finished[0] / "cache", tmp_path / "cache")
    (part,) = (tmp_path / "cache").rglob("*.parquet")
    if kind == "an older part beside it":
        shutil.copy(part, part.with_stem("part-0123456789abcdef0123456789abcdef"))
    else:
        part = damaged(part, LOGP_PARTS[kind][0])
    code, printed = run_again(finished, tmp_path, monkeypatch)
    assert code == 0, printed
    assert f"{part.parent}/part-" in printed
    assert printed.count("put aside as part-") == 1
    assert ("0 responses found" in printed) == (kind != "an older part beside it")
    assert_same_metrics(finished, tmp_path)


@pytest.mark.parametrize("kind", ["a bit of a feature", "half"])
def test_a_run_over_damaged_features_is_the_run_over_none(finished, tmp_path, monkeypatch, kind):
    shutil.copytree(finished[0] / "cache", tmp_path / "cache")
    (part,) = (tmp_path / "cache").rglob("*.safetensors")
    part = damaged(part, FEATURE_PARTS[kind][0])
    code, printed = run_again(finished, tmp_path, monkeypatch)
    assert code == 0, printed
    assert f"{part}: " in printed
    assert "features of images: 0 prompts found" in printed
    assert_same_metrics(finished, tmp_path)


def assert_same_metrics(finished, tmp_path):
    ours, theirs = metrics_of(tmp_path / "run"), finished[1]
    assert len(ours) == len(theirs) == 2
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, abs=1e-6)


@pytest.mark.parametrize("features", ["true", "false"])
@pytest.mark.parametrize(
    "make",
    [Path.touch, os.mkfifo, lambda path: path.symlink_to(path), lambda path: path.symlink_to("/proc")],
    ids=["a file", "a pipe", "a link to itself", "a folder in which nothing can be made"],
)
def test_a_cache_that_is_no_folder_to_write_in_is_named(finished, tmp_path, monkeypatch, make, features):
    make(tmp_path / "cache")
    code, printed = run_again(finished, tmp_path, monkeypatch, f"data.cache_image_features={features}")
    assert code == 2
    assert re.search(f"{tmp_path}/cache/(features|reference).*(cannot be written|disk has 0 bytes free)", printed), (
        printed
    )
