"""Unpacking archives that nobody has vouched for."""

import contextlib
import os
import stat
import struct
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unidpo.data.mm_rlhf.archives import ArchiveError, Extracted, extract
from unidpo.errors import DataError

NOISE = os.urandom(4000)
MANY = 1 << 40


def archive(path: Path, *entries: tuple[str | zipfile.ZipInfo, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as zipped:
        for name, data in entries:
            zipped.writestr(name, data)
    return path


def info(name: str, mode: int = 0) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)
    entry.external_attr = mode << 16
    return entry


def raw_name(path: Path, written: str, meant: bytes) -> Path:
    """Put a name of the same length where `zipfile` would not write it."""
    assert len(written) == len(meant)
    path.write_bytes(path.read_bytes().replace(written.encode(), meant))
    return path


def on_disk(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_files_come_out_as_they_went_in_and_a_second_call_writes_nothing(tmp_path: Path) -> None:
    files = {"long/a.png": NOISE, "long/deep/b.png": b"", "./long/é 漢.png": b"x" * 5000}
    path = archive(tmp_path / "long.zip", *files.items())
    told: list[tuple[str, int, int]] = []
    done = extract(path, tmp_path / "out", max_bytes=MANY, on_progress=lambda *a: told.append(a))
    assert on_disk(tmp_path / "out") == {name.removeprefix("./"): data for name, data in files.items()}
    assert done == Extracted(files=3, written=3)
    assert [t[1:] for t in told] == [(0, 3), (1, 3), (2, 3), (3, 3)]
    before = (tmp_path / "out/long/a.png").stat().st_mtime_ns
    assert extract(path, tmp_path / "out", max_bytes=MANY) == Extracted(files=3, written=0)
    assert (tmp_path / "out/long/a.png").stat().st_mtime_ns == before


def test_a_broken_off_unpacking_goes_on_with_what_is_missing_or_short(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.zip", ("a", NOISE), ("b", NOISE), ("c", NOISE))

    def stop(stage: str, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(path, tmp_path / "out", max_bytes=MANY, on_progress=stop)
    assert sorted(on_disk(tmp_path / "out")) == ["a", "b"]
    (tmp_path / "out/b").write_bytes(b"short")
    assert extract(path, tmp_path / "out", max_bytes=MANY).written == 2
    assert set(on_disk(tmp_path / "out").values()) == {NOISE}


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/tmp/evil", "//host/evil", "."])
def test_a_name_that_leads_outside_unpacks_nothing(tmp_path: Path, name: str) -> None:
    path = archive(tmp_path / "a.zip", ("good.png", NOISE), (name, b"evil"))
    with pytest.raises(ArchiveError, match="points outside") as caught:
        extract(path, tmp_path / "in" / "out", max_bytes=MANY)
    assert repr(name) in str(caught.value)
    assert "nothing was unpacked" in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.zip"]


@pytest.mark.parametrize("name", ["C:/evil", "C:\\evil", "..\\evil", "a/.. /evil", "a/b/..", "a\nb"])
def test_a_name_that_is_odd_stays_inside(tmp_path: Path, name: str) -> None:
    path = archive(tmp_path / "a.zip", (name, b"odd"))
    with contextlib.suppress(DataError):
        extract(path, tmp_path / "in" / "out", max_bytes=MANY)
        assert list(on_disk(tmp_path / "in" / "out").values()) == [b"odd"]
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["a.zip"]


def test_a_name_with_a_hidden_end_is_cut_there(tmp_path: Path) -> None:
    path = raw_name(archive(tmp_path / "a.zip", ("good.pngX..", b"evil")), "good.pngX..", b"good.png\0..")
    extract(path, tmp_path / "out", max_bytes=MANY)
    assert sorted(on_disk(tmp_path)) == ["a.zip", "out/good.png"]


def test_a_file_damaged_at_the_same_size_is_unpacked_again(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.zip", ("a", NOISE), ("b", NOISE))
    extract(path, tmp_path / "out", max_bytes=MANY)
    (tmp_path / "out/b").write_bytes(NOISE[:-1] + bytes([NOISE[-1] ^ 1]))
    assert extract(path, tmp_path / "out", max_bytes=MANY) == Extracted(2, 1, ("b",))
    assert set(on_disk(tmp_path / "out").values()) == {NOISE}
    assert extract(path, tmp_path / "out", max_bytes=MANY).damaged == ()


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFDIR])
def test_links_and_devices_are_refused(tmp_path: Path, kind: int) -> None:
    path = archive(tmp_path / "a.zip", ("good.png", NOISE), (info("link", kind | 0o777), b"/etc/passwd"))
    with pytest.raises(ArchiveError, match="'link' is a link or a special file"):
        extract(path, tmp_path / "out", max_bytes=MANY)
    assert not (tmp_path / "out").exists()


def test_a_link_that_is_already_there_is_not_followed(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.zip", ("sub/evil", b"evil"), ("top", b"evil"))
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/sub").symlink_to(outside)
    with pytest.raises(ArchiveError, match="points outside"):
        extract(path, tmp_path / "out", max_bytes=MANY)
    (tmp_path / "out/sub").unlink()
    (tmp_path / "out/top").symlink_to(outside / "target")
    with pytest.raises(ArchiveError, match="points outside"):
        extract(path, tmp_path / "out", max_bytes=MANY)
    assert list(outside.iterdir()) == []


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_methods_whose_memory_cannot_be_bounded_are_refused(tmp_path: Path, method: int) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", method) as zipped:
        zipped.writestr("a", NOISE)
    with pytest.raises(ArchiveError, match="'a' is packed by method"):
        extract(tmp_path / "a.zip", tmp_path / "out", max_bytes=MANY)


def test_an_encrypted_entry_is_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.zip", ("secret", NOISE))
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(ArchiveError, match=r"'secret'.*is encrypted"):
        extract(path, tmp_path / "out", max_bytes=MANY)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("names", [("a", "a"), ("a/b", "./a//b"), ("a", "a/b"), ("a/b", "a")])
def test_two_entries_for_one_place_stay_there(tmp_path: Path, names: tuple[str, str]) -> None:
    path = archive(tmp_path / "x.zip", *((name, NOISE) for name in names))
    with contextlib.suppress(DataError):
        extract(path, tmp_path / "out", max_bytes=MANY)
    assert len(on_disk(tmp_path / "out")) == 1


def test_the_bound_counts_all_files(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.zip", *((f"{i}", NOISE) for i in range(5)))
    with pytest.raises(ArchiveError, match=r"'4' would bring the unpacked size over the bound of 19,999 bytes"):
        extract(path, tmp_path / "out", max_bytes=19_999)
    assert not (tmp_path / "out").exists()
    assert extract(path, tmp_path / "out", max_bytes=20_000).files == 5


def test_a_bomb_is_stopped_by_the_bound(tmp_path: Path) -> None:
    """Also one whose entries share their bytes, so that a small archive claims many large files."""
    path = archive(tmp_path / "a.zip", ("a", bytes(8 << 20)), ("b", bytes(8 << 20)))
    data = bytearray(path.read_bytes())
    second = data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 1)
    struct.pack_into("<L", data, second + 42, 0)  # both entries point at the first one's data
    path.write_bytes(data)
    with pytest.raises(ArchiveError, match=r"'b' would bring the unpacked size over the bound"):
        extract(path, tmp_path / "out", max_bytes=9 << 20)
    assert not (tmp_path / "out").exists()


def test_sizes_that_lie_are_found_while_writing(tmp_path: Path) -> None:
    """The header claims 10 bytes for 2 MB: no more is unpacked, and no such file appears."""
    path = archive(tmp_path / "a.zip", ("good", NOISE), ("liar", NOISE * 500))
    data = bytearray(path.read_bytes())
    second = data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 1)
    struct.pack_into("<L", data, second + 24, 10)
    path.write_bytes(data)
    with pytest.raises(ArchiveError, match="'liar'"):
        extract(path, tmp_path / "out", max_bytes=MANY)
    assert sorted(on_disk(tmp_path / "out")) == ["good"]


def test_a_damaged_entry_is_named_and_leaves_no_file(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_STORED) as zipped:
        zipped.writestr("x.png", NOISE)
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[2000] ^= 1
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(ArchiveError, match=r"'x\.png' is damaged"):
        extract(tmp_path / "a.zip", tmp_path / "out", max_bytes=MANY)
    assert on_disk(tmp_path / "out") == {}


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"no archive at all", NOISE])
def test_what_is_no_archive_is_said_to_be_none(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(ArchiveError, match="no zip archive"):
        extract(tmp_path / "a.zip", tmp_path / "out", max_bytes=MANY)
    with pytest.raises(ArchiveError, match="cannot be read: No such file"):
        extract(tmp_path / "b.zip", tmp_path / "out", max_bytes=MANY)


def test_a_target_that_is_a_file_is_said_to_be_one(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.zip", ("a", NOISE))
    (tmp_path / "out").write_text("here")
    with pytest.raises(DataError, match="cannot be unpacked here"):
        extract(path, tmp_path / "out", max_bytes=MANY)
    assert (tmp_path / "out").read_text() == "here"


@settings(max_examples=100)
@given(data=st.data())
def test_any_damage_ends_in_files_inside_or_a_message(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Bytes of a good archive are changed anywhere: files inside the target, or an `ArchiveError`; never else."""
    folder = tmp_path_factory.mktemp("fuzz")
    path = archive(folder / "a.zip", ("d/a", b"abc" * 50), ("d/", b""), ("b", NOISE[:100]))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with contextlib.suppress(DataError):
        extract(path, folder / "out", max_bytes=10_000)
    assert {p.name for p in folder.iterdir()} <= {"a.zip", "out"}
    assert not any(p.is_symlink() for p in folder.rglob("*"))
