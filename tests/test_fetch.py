"""Fetching data sets, against a hub on this machine that speaks just enough of the real one's language."""

import hashlib
import io
import json
import os
import shutil
import sys
import threading
import types
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from rich.console import Console

from unidpo.data import download
from unidpo.data.download import FetchError
from unidpo.data.mm_rlhf import Fetched, plan_fetch
from unidpo.data.mm_rlhf import fetch as fetch_planned
from unidpo.errors import DataError
from unidpo.progress import OnProgress

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MM_RLHF, UNI_DPO = "yifanzhang114/MM-RLHF", "psp-dada/Uni-DPO"


@dataclass
class LocalHub:
    """A hub with files, faults on demand, and a memory of what it was asked for."""

    files: dict[str, dict[str, bytes]] = field(default_factory=dict, repr=False)
    endpoint: str = ""
    asked: list[tuple[str, str | None]] = field(default_factory=list)  # file, Range
    sent: int = 0
    cut_after: list[int] = field(default_factory=list)  # bytes of each next answer before the connection breaks
    statuses: list[int] = field(default_factory=list)  # of the next answers
    ignores_range: bool = False
    no_lfs: bool = False
    lie: bytes | None = field(default=None, repr=False)  # sent instead of the content

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(handler.path).path)
        for repo, files in self.files.items():
            if path == f"/api/datasets/{repo}":
                return self.json(handler, {"id": repo, "sha": COMMIT, "tags": [], "private": False})
            if path.startswith(f"/api/datasets/{repo}/tree/{COMMIT}"):
                return self.json(handler, [self.entry(name, data) for name, data in files.items()])
            prefix = f"/datasets/{repo}/resolve/{COMMIT}/"
            if path.startswith(prefix) and path.removeprefix(prefix) in files:
                return self.send(handler, path.removeprefix(prefix), files[path.removeprefix(prefix)])
        handler.send_response(404)
        handler.send_header("X-Error-Code", "RepoNotFound")
        handler.send_header("Content-Length", "0")
        handler.end_headers()
        return None

    def entry(self, name: str, data: bytes) -> dict[str, Any]:
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": blob}
        if name.endswith(".zip") and not self.no_lfs:
            entry["lfs"] = {"size": len(data), "oid": hashlib.sha256(data).hexdigest(), "pointerSize": 134}
            entry["xetHash"] = "0" * 64
        return entry

    def json(self, handler: BaseHTTPRequestHandler, value: Any) -> None:
        body = json.dumps(value).encode()
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    def send(self, handler: BaseHTTPRequestHandler, name: str, data: bytes) -> None:
        wanted = handler.headers.get("Range")
        self.asked.append((name, wanted))
        data = data if self.lie is None else self.lie
        if self.statuses and (status := self.statuses.pop(0)) != 200:
            handler.send_response(status)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        start = 0 if wanted is None or self.ignores_range else int(wanted.removeprefix("bytes=").removesuffix("-"))
        handler.send_response(206 if start else 200)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        body = data[start:]
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if self.cut_after:
            body = body[: self.cut_after.pop(0)]
        self.sent += len(body)  # before the client, on another thread, has it all and looks
        handler.wfile.write(body)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    import huggingface_hub
    import huggingface_hub.constants

    local = LocalHub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            local.answer(self)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    local.endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(download, "WAIT_SECONDS", 0.01)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield local
    huggingface_hub.close_session()
    server.shutdown()
    server.server_close()
    thread.join()


def zipped(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name.replace("__", "/").replace("_png", ".png"), data)
    return buffer.getvalue()


LONG, SHORT = os.urandom(3_000_000), os.urandom(30_000)


@pytest.fixture
def mm_rlhf(hub: LocalHub) -> LocalHub:
    hub.files[MM_RLHF] = {
        "README.md": b"card",
        "data.jsonl": b'{"id": 1}\n',
        "dpo_pairs.jsonl": b'{"prompt": 1}\n',
        "long.zip": zipped(long__a_png=LONG, long__b_png=b"b" * 100),
        "short.zip": zipped(a_png=SHORT),  # without a folder of its own
        "safety.zip": zipped(safety__a_png=SHORT),
    }
    return hub


def fetch(
    *arguments: Any, keep_archives: bool = True, on_progress: OnProgress | None = None, **options: Any
) -> Fetched:
    plan = plan_fetch(*arguments, **options)
    return fetch_planned(plan, keep_archives=keep_archives, on_progress=on_progress)


def shown(value: Any) -> str:
    console = Console(file=io.StringIO(), width=160)
    value.render(console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def files_of(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


FETCHED = [".unidpo-fetch.json", "data.jsonl", "dpo_pairs.jsonl", "long.zip", "long/a.png", "long/b.png"]


def test_a_plan_says_what_and_how_large_and_downloads_nothing(mm_rlhf: LocalHub, tmp_path: Path) -> None:
    plan = plan_fetch("mm-rlhf", tmp_path / "to", subsets=("long", "short"), endpoint=mm_rlhf.endpoint)
    sizes = {name: len(data) for name, data in mm_rlhf.files[MM_RLHF].items()}
    assert [s.remote.path for s in plan.steps] == ["data.jsonl", "dpo_pairs.jsonl", "long.zip", "short.zip"]
    assert plan.download_bytes == sum(sizes[s.remote.path] for s in plan.steps)
    assert plan.needed_bytes > plan.download_bytes + 3_000_000
    text = shown(plan)
    assert "long.zip" in text
    assert "3.0 MB to download, about 6." in text
    assert mm_rlhf.asked == []
    assert list(tmp_path.iterdir()) == []


def test_fetch_downloads_verifies_unpacks_and_the_second_time_asks_for_no_file(
    mm_rlhf: LocalHub, tmp_path: Path
) -> None:
    stages: dict[str, tuple[int, int]] = {}
    done = fetch(
        "mm-rlhf",
        tmp_path,
        subsets=["long", "short"],
        endpoint=mm_rlhf.endpoint,
        on_progress=lambda stage, *count: stages.__setitem__(stage, count),
    )
    assert files_of(tmp_path) == sorted([*FETCHED, "short.zip", "short/a.png"])
    assert (tmp_path / "long/a.png").read_bytes() == LONG
    assert (tmp_path / "short/a.png").read_bytes() == SHORT
    assert done.downloaded == done.plan.download_bytes == mm_rlhf.sent
    assert stages["download long.zip, MB"] == stages["verify long.zip, MB"] == (4, 4)
    assert stages["unpack long.zip, files"] == (2, 2)
    assert "2 files, 2 new" in shown(done)

    mm_rlhf.asked.clear()
    again = fetch("mm-rlhf", tmp_path, subsets=["long", "short"], endpoint=mm_rlhf.endpoint)
    assert mm_rlhf.asked == []
    assert again.downloaded == again.plan.needed_bytes == 0
    assert [e.written for e in again.unpacked.values()] == [0, 0]


def test_a_connection_that_breaks_is_taken_up_where_it_broke(mm_rlhf: LocalHub, tmp_path: Path) -> None:
    mm_rlhf.statuses = [200, 200, 200, 503, 200, 429]
    mm_rlhf.cut_after = [10_000, 10_000, 1_100_000, 2_000]
    fetch("mm-rlhf", tmp_path, subsets=["long"], endpoint=mm_rlhf.endpoint)
    assert (tmp_path / "long.zip").read_bytes() == mm_rlhf.files[MM_RLHF]["long.zip"]
    ranges = [wanted for name, wanted in mm_rlhf.asked if name == "long.zip"]
    assert ranges == [None, "bytes=1100000-", "bytes=1100000-", "bytes=1102000-", "bytes=1102000-"]
    assert mm_rlhf.sent == sum(len(mm_rlhf.files[MM_RLHF][n]) for n in ("data.jsonl", "dpo_pairs.jsonl", "long.zip"))


def test_a_run_that_gave_up_goes_on_in_the_next_one(mm_rlhf: LocalHub, tmp_path: Path) -> None:
    mm_rlhf.cut_after = [100, 100, 1_000_000, 0, 0, 0, 0, 0]
    with pytest.raises(FetchError, match=r"MM-RLHF/long\.zip.*run the command again"):
        fetch("mm-rlhf", tmp_path, subsets=["long"], endpoint=mm_rlhf.endpoint)
    assert len(mm_rlhf.asked) == 2 + 1 + download.FAILURES_IN_A_ROW
    assert not (tmp_path / "long.zip").exists()
    plan = plan_fetch("mm-rlhf", tmp_path, subsets=["long"], endpoint=mm_rlhf.endpoint)
    assert plan.download_bytes == len(mm_rlhf.files[MM_RLHF]["long.zip"]) - 1_000_000

    mm_rlhf.asked.clear()
    fetch("mm-rlhf", tmp_path, subsets=["long"], endpoint=mm_rlhf.endpoint)
    assert mm_rlhf.asked == [("long.zip", "bytes=1000000-")]
    assert files_of(tmp_path) == FETCHED


def test_ctrl_c_leaves_what_was_received(mm_rlhf: LocalHub, tmp_path: Path) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if stage.startswith("download long") and done >= 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch("mm-rlhf", tmp_path, subsets=["long"], endpoint=mm_rlhf.endpoint, on_progress=stop)
    mm_rlhf.asked.clear()
    fetch("mm-rlhf", tmp_path, subsets=["long"], endpoint=mm_rlhf.endpoint)
    [(name, wanted)] = mm_rlhf.asked
    assert name == "long.zip"
    assert wanted is not None
    assert int(wanted.removeprefix("bytes=").removesuffix("-")) >= 1_000_000
    assert (tmp_path / "long/a.png").read_bytes() == LONG


def test_a_server_that_ignores_the_range_sends_it_all_again_and_nothing_is_doubled(
    hub: LocalHub, tmp_path: Path
) -> None:
    hub.files["me/pairs"] = {"pairs.json": LONG}
    hub.ignores_range, hub.cut_after = True, [2_000_000]
    fetch("uni-dpo", tmp_path, repo="me/pairs", endpoint=hub.endpoint)
    assert (tmp_path / "pairs.json").read_bytes() == LONG
    assert hub.sent == 5_000_000


@pytest.mark.parametrize("lie", ["same length", "longer"])
def test_content_that_differs_from_the_promise_is_not_kept(mm_rlhf: LocalHub, tmp_path: Path, lie: str) -> None:
    fetch("mm-rlhf", tmp_path, subsets=[], endpoint=mm_rlhf.endpoint)
    true = mm_rlhf.files[MM_RLHF]["long.zip"]
    mm_rlhf.lie = bytes(len(true)) if lie == "same length" else true + b"more"
    with pytest.raises(FetchError, match="checksum" if lie == "same length" else "more than"):
        fetch("mm-rlhf", tmp_path, subsets=["long"], endpoint=mm_rlhf.endpoint)
    assert files_of(tmp_path / "long") == []
    assert not (tmp_path / "long.zip").exists()
    mm_rlhf.lie = None
    fetch("mm-rlhf", tmp_path, subsets=["long"], endpoint=mm_rlhf.endpoint)
    assert files_of(tmp_path) == FETCHED


def test_a_file_the_user_had_already_is_fetched_only_if_it_is_wrong(mm_rlhf: LocalHub, tmp_path: Path) -> None:
    (tmp_path / "long.zip").write_bytes(mm_rlhf.files[MM_RLHF]["long.zip"])
    (tmp_path / "short.zip").write_bytes(bytes(len(mm_rlhf.files[MM_RLHF]["short.zip"])))
    (tmp_path / "data.jsonl").write_bytes(b"broken off")
    done = fetch("mm-rlhf", tmp_path, subsets=["long", "short"], endpoint=mm_rlhf.endpoint)
    assert done.downloaded == mm_rlhf.sent
    assert [name for name, _ in mm_rlhf.asked] == ["data.jsonl", "dpo_pairs.jsonl", "short.zip"]
    assert (tmp_path / "short/a.png").read_bytes() == SHORT


def test_what_was_damaged_at_the_same_size_is_named_and_brought_back(mm_rlhf: LocalHub, tmp_path: Path) -> None:
    fetch("mm-rlhf", tmp_path, subsets=["long"], endpoint=mm_rlhf.endpoint)
    mm_rlhf.asked.clear()
    for name in ("data.jsonl", "long/b.png"):
        times = (tmp_path / name).stat()
        (tmp_path / name).write_bytes(bytes((tmp_path / name).stat().st_size))
        os.utime(tmp_path / name, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a failing disk leaves it
    done = fetch("mm-rlhf", tmp_path, subsets=["long"], endpoint=mm_rlhf.endpoint)
    assert [name for name, _ in mm_rlhf.asked] == ["data.jsonl"]
    assert (tmp_path / "data.jsonl").read_bytes() == mm_rlhf.files[MM_RLHF]["data.jsonl"]
    assert (tmp_path / "long/b.png").read_bytes() == b"b" * 100
    assert done.damaged == ("data.jsonl",)
    assert done.unpacked["long.zip"].damaged == ("long/b.png",)
    text = shown(done)
    assert "data.jsonl: differed from the hub's checksum, fetched again" in text
    assert "long.zip: 'long/b.png' was damaged, unpacked again" in text
    again = fetch("mm-rlhf", tmp_path, subsets=["long"], endpoint=mm_rlhf.endpoint)
    assert (again.downloaded, again.damaged, again.unpacked["long.zip"].written) == (0, (), 0)


def test_archives_that_were_not_kept_are_not_fetched_again(mm_rlhf: LocalHub, tmp_path: Path) -> None:
    fetch("mm-rlhf", tmp_path, subsets=["long"], endpoint=mm_rlhf.endpoint, keep_archives=False)
    assert files_of(tmp_path) == [name for name in FETCHED if name != "long.zip"]
    mm_rlhf.asked.clear()
    again = fetch("mm-rlhf", tmp_path, subsets=["long"], endpoint=mm_rlhf.endpoint, keep_archives=False)
    assert mm_rlhf.asked == []
    assert again.plan.needed_bytes == 0


def test_a_full_disk_is_noticed_before_the_first_byte(
    mm_rlhf: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=66_000_000))
    with pytest.raises(DataError, match=r"6\.\d MB are needed \(3\.0 MB to download.*only 66\.0 MB are free"):
        fetch("mm-rlhf", tmp_path, subsets=["long"], endpoint=mm_rlhf.endpoint)
    assert mm_rlhf.asked == []
    assert list(tmp_path.iterdir()) == []


def test_a_hostile_archive_from_the_hub_unpacks_nothing(hub: LocalHub, tmp_path: Path) -> None:
    files = {"data.jsonl": b"{}", "dpo_pairs.jsonl": b"{}", "mcq.zip": zipped(good_png=SHORT, **{"..__..__evil": b"x"})}
    hub.files[MM_RLHF] = files
    to = tmp_path / "a" / "b"
    with pytest.raises(DataError, match=r"'\.\./\.\./evil' points outside"):
        fetch("mm-rlhf", to, subsets=["mcq"], endpoint=hub.endpoint)
    assert files_of(tmp_path) == ["a/b/.unidpo-fetch.json", "a/b/data.jsonl", "a/b/dpo_pairs.jsonl", "a/b/mcq.zip"]


@pytest.mark.parametrize("name", ["../evil.json", "/evil.json", "a/../../evil.json"])
def test_a_name_on_the_hub_that_leads_outside_is_refused(hub: LocalHub, tmp_path: Path, name: str) -> None:
    hub.files["me/pairs"] = {name: b"{}"}
    with pytest.raises(DataError, match="points outside"):
        fetch("uni-dpo", tmp_path / "to", repo="me/pairs", endpoint=hub.endpoint)
    assert list(tmp_path.iterdir()) == []


def test_uni_dpo_is_its_multimodal_pairs_and_on_demand_the_texts(hub: LocalHub, tmp_path: Path) -> None:
    pairs = "uni_dpo_image_only_mcq_short_long_50k.json"
    hub.files[UNI_DPO] = {"README.md": b"", pairs: b"[]", "Math/train.jsonl": b"{}", "Textual/x.json": b"[]"}
    fetch("uni-dpo", tmp_path, endpoint=hub.endpoint)
    assert [name for name, _ in hub.asked] == [pairs]
    hub.asked.clear()
    fetch("uni-dpo", tmp_path, endpoint=hub.endpoint, subsets=["math", "textual"])
    assert [name for name, _ in hub.asked] == ["Math/train.jsonl", "Textual/x.json"]


def test_wrong_names_say_what_there_is(mm_rlhf: LocalHub, tmp_path: Path) -> None:
    at: dict[str, Any] = {"endpoint": mm_rlhf.endpoint}
    (tmp_path / "file").write_text("")
    mm_rlhf.files["me/empty"] = {"README.md": b""}
    for dataset, options, message in [
        ("mmrlhf", {}, "there are mm-rlhf, uni-dpo"),
        ("mm-rlhf", {"subsets": ["lnog"]}, r"no subset 'lnog'.*did you mean `long`"),
        ("mm-rlhf", {"subsets": ["video"]}, r"does not have video\.zip"),
        ("mm-rlhf", {"repo": "me/none"}, "no such data set"),
        ("mm-rlhf", {"repo": "not an id"}, "owner/name"),
        ("uni-dpo", {"repo": "me/empty"}, "no data file of multimodal"),
        ("mm-rlhf", {"source": "kaggle"}, "there are huggingface, modelscope"),
    ]:
        with pytest.raises(DataError, match=message):
            plan_fetch(dataset, tmp_path / "to", **{**at, **options})  # type: ignore[arg-type]
    with pytest.raises(DataError, match="is a file; choose a folder"):
        plan_fetch("mm-rlhf", tmp_path / "file" / "deep", **at)
    assert mm_rlhf.asked == []


def test_a_hub_that_is_away_or_forbidden_by_the_user_is_named(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    import huggingface_hub.constants

    with pytest.raises(FetchError, match="cannot be reached"):
        plan_fetch("mm-rlhf", tmp_path, endpoint="http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="HF_HUB_OFFLINE is set"):
        plan_fetch("mm-rlhf", tmp_path, endpoint=hub.endpoint)


def test_modelscope_is_asked_in_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class HubApi:
        def __init__(self, *, endpoint: str | None = None) -> None:
            calls.append(endpoint)

        def list_repo_files(self, repo_id: str, repo_type: str) -> list[Any]:
            entry = types.SimpleNamespace
            digest = hashlib.sha256(SHORT).hexdigest()
            return [
                entry(path="Math", size=0, sha256=None, blob_id=None, is_dir=True),
                entry(path="sub/pairs.json", size=len(SHORT), sha256=digest, blob_id=digest, is_dir=False),
            ]

        def download_file(self, repo_id: str, repo_type: str, file_path: str, **options: Any) -> Path:
            calls.append((repo_id, repo_type, file_path, options))
            place = Path(options["local_dir"]) / file_path
            place.parent.mkdir()
            place.write_bytes(SHORT)
            return place

    monkeypatch.setitem(sys.modules, "modelscope_hub", types.SimpleNamespace(HubApi=HubApi))
    fetch("uni-dpo", tmp_path, source="modelscope")
    options = {"local_dir": tmp_path, "expected_sha256": hashlib.sha256(SHORT).hexdigest(), "file_size": len(SHORT)}
    assert calls == [None, ("pspdada/Uni-DPO", "dataset", "sub/pairs.json", options)]
    assert (tmp_path / "sub/pairs.json").read_bytes() == SHORT
    with pytest.raises(DataError, match="under which id modelscope has mm-rlhf"):
        plan_fetch("mm-rlhf", tmp_path, source="modelscope")
    monkeypatch.setitem(sys.modules, "modelscope_hub", None)
    with pytest.raises(DataError, match="pip install modelscope-hub"):
        plan_fetch("uni-dpo", tmp_path, source="modelscope")
