"""Over 200 kinds of bad rows through the real command: each is named, and no good row beside one is touched.

Each table is one file; behind every bad row stands a good one. `test_check_table` has 77 more kinds.
"""

import base64
import io
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from unidpo.cli import app
from unidpo.data.formats import read_groups
from unidpo.errors import DataError

NUMBER = itertools.count(1)
SCORES = {"score_chosen": 4, "score_rejected": 1}
PAIR = {"chosen": "yes", "rejected": "no", **SCORES}
SYSTEM, USER, ANSWER = ({"role": role, "content": "text"} for role in ("system", "user", "assistant"))
ZERO_WIDTH = "\u200b\u200d\u2060\ufeff"
MEBIBYTE = "x" * (1 << 20)


def alpaca(**columns: Any) -> dict[str, Any]:
    return {"instruction": f"Which {next(NUMBER)}?", **PAIR, **columns}


def sharegpt(*turns: Any, **columns: Any) -> dict[str, Any]:
    turns = turns or (human(f"Which {next(NUMBER)}?"),)
    return {"conversations": list(turns), "chosen": gpt("yes"), "rejected": gpt("no"), **SCORES, **columns}


def human(value: Any = "Which?") -> dict[str, Any]:
    return {"from": "human", "value": value}


def gpt(value: Any = "this") -> dict[str, Any]:
    return {"from": "gpt", "value": value}


def trl(prompt: Any = None, **columns: Any) -> dict[str, Any]:
    return {"prompt": f"Which {next(NUMBER)}?" if prompt is None else prompt, **PAIR, **columns}


def ranked(*responses: Any, **columns: Any) -> dict[str, Any]:
    return {"prompt": f"Which {next(NUMBER)}?", "responses": list(responses), **columns}


def text(words: Any, score: Any = 1) -> dict[str, Any]:
    return {"text": words, "score": score}


def three(**columns: Any) -> dict[str, Any]:
    return ranked(text("a", 3), text("b", 2), text("c", 1), **columns)


def parts(*content: Any) -> list[Any]:
    return [{"role": "user", "content": list(content)}]


def shows(image: Any, **columns: Any) -> dict[str, Any]:
    return alpaca(instruction=f"<image>Which {next(NUMBER)}?", images=[image], **columns)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


SQUARE = Image.effect_noise((40, 40), 80).convert("RGB")
BASE64 = base64.b64encode(encoded(SQUARE)).decode()
E, W = "error", "warning"
Kind = tuple[Any, str, str]  # a row (bytes stand in the file as they are), the kind of a finding, its severity

LINES: list[Kind] = [
    (b"", "", ""),  # an empty line is no row, and shifts no number
    (b'{"instruction": "?", "chosen": "a", "rejected": "b"', "broken-json", E),
    (b'{"instruction": "?", "chosen": "a", "rejected": "b",}', "broken-json", E),
    (b"{'instruction': '?', 'chosen': 'a', 'rejected': 'b'}", "broken-json", E),
    (b'{"instruction": "?", "chosen": "a\tb", "rejected": "b"}', "broken-json", E),
    (b'{"instruction": "?", "chosen": "a" "rejected": "b"}', "broken-json", E),
    (b'{"instruction": "?"} {"instruction": "?"}', "broken-json", E),
    (b'{"instruction": "?", "chosen": "\\ud83", "rejected": "b"}', "broken-json", E),
    (b'{"instruction": "?", "chosen": "\\x41", "rejected": "b"}', "broken-json", E),
    (b"instruction,chosen,rejected", "broken-json", E),
    (b"<tr><td>?</td></tr>", "broken-json", E),
    (b"undefined", "broken-json", E),
    (b'{"instruction": "?", "score_chosen": .5}', "broken-json", E),
    (b'{"instruction": "?", "score_chosen": 4,5}', "broken-json", E),
    (b'{"instruction": "?", "score_chosen": 0x10}', "broken-json", E),
    (b'{"instruction": "?", "score_chosen": ' + b"9" * 6000 + b"}", "broken-json", E),
    (b'{"instruction": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", "broken-json", E),
    (b"\xef\xbb\xbf" + json.dumps(alpaca()).encode(), "broken-json", E),  # a mark within the file
    (json.dumps(alpaca()).encode("utf-16-le"), "broken-json", E),
    (b'{"instruction": "?", "chosen": "\xe9t\xe9"}', "wrong-encoding", E),
    (b'{"instruction": "?", "chosen": "\xed\xa0\x80"}', "wrong-encoding", E),  # a surrogate in bytes
    (b'{"instruction": "?", "chosen": "\xc0\xaf"}', "wrong-encoding", E),  # too long a form of "/"
    (b'{"instruction": "?", "chosen": "a", "chosen": "b"}', "repeated-key", E),
    (b'{"instruction": "?", "chosen": "a", "rejected": "b", "x": {"y": 1, "y": 1}}', "repeated-key", E),
    (b'{"instruction": "?", "chosen": "a", "rejected": "b", "score_chosen": Infinity}', "bad-score", E),
    (True, "wrong-type", E),
    (3.5, "wrong-type", E),
    ([], "wrong-type", E),
    ([alpaca()], "wrong-type", E),
    ({"data": alpaca()}, "unknown-layout", E),
    ({"": ""}, "unknown-layout", E),
    ({key.upper(): value for key, value in alpaca().items()}, "unknown-layout", E),
    ({f" {key}": value for key, value in alpaca().items()}, "unknown-layout", E),
    ({"question": "?", "answers": ["a", "b"]}, "unknown-layout", E),
    ({"chosen": "a", "score_chosen": 1}, "unknown-layout", E),
    ({"messages": [USER, ANSWER], "response": "b"}, "unknown-layout", E),
    ({f"key{n}": n for n in range(5000)}, "unknown-layout", E),
    ({MEBIBYTE: 1}, "unknown-layout", E),
    ({"\x1b[31mkey\x1b[0m": 1, "\u202eyek": 2}, "unknown-layout", E),
]

ALPACA: list[Kind] = [
    (alpaca(instruction=True), "wrong-type", E),
    (alpaca(instruction=["Which?"]), "wrong-type", E),
    (alpaca(instruction={"text": "Which?"}), "wrong-type", E),
    (alpaca(instruction=""), "empty-prompt", E),
    (alpaca(instruction="\u3000\u00a0\t"), "empty-prompt", E),
    (alpaca(instruction=ZERO_WIDTH), "empty-prompt", E),
    (alpaca(instruction="\ufeff Which?"), "byte-order-mark", W),
    (alpaca(instruction="Which \x00?"), "control-characters", W),
    (alpaca(instruction="Which \x1b[2J?"), "control-characters", W),
    (alpaca(instruction="Which <video>?"), "media-mark", W),
    (alpaca(instruction="<audio>Which?"), "media-mark", W),
    (alpaca(instruction="Which?<|im_end|>"), "special-token", W),
    (alpaca(instruction="Which? <image_soft_token>"), "special-token", W),
    (alpaca(input={"a": 1}), "wrong-type", E),
    (alpaca(input="\udfff"), "bad-text", E),
    (alpaca(input="<image>"), "image-marks", E),
    (alpaca(system=7), "wrong-type", E),
    (alpaca(system="\ud800"), "bad-text", E),
    (alpaca(system="<image>Look."), "", ""),  # a system text has no marks: it is text
    (alpaca(history={"user": "a"}), "wrong-type", E),
    (alpaca(history=[["a", "b", "c"]]), "wrong-type", E),
    (alpaca(history=[[]]), "wrong-type", E),
    (alpaca(history=["ab"]), "wrong-type", E),
    (alpaca(history=[None]), "wrong-type", E),
    (alpaca(history=[{"user": "a", "assistant": "b"}]), "wrong-type", E),
    (alpaca(history=[["a", 5]]), "wrong-type", E),
    (alpaca(history=[[["a"], "b"]]), "wrong-type", E),
    (alpaca(history=[["a", "b"], ["", "b"]]), "empty-message", W),
    (alpaca(history=[["a", ""]]), "empty-message", W),
    (alpaca(history=[["<image>a", "b"]]), "image-marks", E),
    (alpaca(history=[["a", "<image>b"]]), "image-marks", E),
    (alpaca(history=5), "wrong-type", E),
    (alpaca(history=[["a", "\ud800"]]), "bad-text", E),
    (alpaca(chosen=True), "wrong-type", E),
    (alpaca(chosen=4.5), "wrong-type", E),
    (alpaca(chosen={"from": "gpt", "value": "yes"}), "wrong-type", E),
    (alpaca(chosen=["yes", "yes!"]), "wrong-type", E),
    (alpaca(chosen=[]), "wrong-type", E),
    (alpaca(chosen=[["yes"]]), "wrong-type", E),
    (alpaca(chosen=["yes"], rejected=["no"]), "wrong-type", E),
    (alpaca(chosen=[USER]), "wrong-type", E),
    (alpaca(chosen="\u200b"), "empty-response", E),
    (alpaca(rejected=ZERO_WIDTH), "empty-response", E),
    (alpaca(rejected="\u2800\u3164"), "empty-response", E),
    (alpaca(rejected="\u00ad\ufe0f"), "empty-response", E),
    (alpaca(rejected="\U000e0041\U000e0042"), "empty-response", E),  # tags, which nobody sees
    (alpaca(rejected="\x00\x01"), "empty-response", E),
    (alpaca(rejected="\u2028\u2029"), "empty-response", E),
    (alpaca(chosen="no"), "equal-responses", E),
    (alpaca(chosen="no ", rejected="no"), "white-space-only", W),
    (alpaca(chosen="a\r\nb", rejected="a\nb"), "white-space-only", W),
    (alpaca(chosen="a\u00a0b", rejected="a b"), "white-space-only", W),
    (alpaca(chosen="caf\u00e9", rejected="cafe\u0301"), "look-alike-responses", W),
    (alpaca(chosen="ＡＢＣ", rejected="ABC"), "look-alike-responses", W),
    (alpaca(chosen="ﬁne", rejected="fine"), "look-alike-responses", W),
    (alpaca(chosen="so\u200b.", rejected="so."), "look-alike-responses", W),
    (alpaca(chosen="wait…", rejected="wait..."), "look-alike-responses", W),
    (alpaca(chosen="가", rejected="\u1100\u1161"), "look-alike-responses", W),
    (alpaca(chosen="no\u202e", rejected="no"), "look-alike-responses", W),
    (alpaca(chosen="é" * 200 + "!", rejected="e\u0301" * 200 + "!"), "look-alike-responses", W),
    (alpaca(chosen="yes <image>"), "media-mark", W),
    (alpaca(rejected="<video>no"), "media-mark", W),
    (alpaca(chosen="yes\x07"), "control-characters", W),
    (alpaca(chosen="yes\ufffd"), "wrong-encoding", W),
    (alpaca(chosen="cafÃ©"), "wrong-encoding", W),
    (alpaca(chosen="itâ€™s"), "wrong-encoding", W),
    (alpaca(chosen="yes</s>"), "special-token", W),
    (alpaca(rejected="no<|vision_start|>"), "special-token", W),
    (alpaca(rejected="no<|image_pad|>"), "special-token", W),
    (alpaca(rejected="\ud83d\ude00\ud83d"), "bad-text", E),
    (alpaca(score_chosen="4.5"), "bad-score", E),
    (alpaca(score_chosen="4,5"), "bad-score", E),
    (alpaca(score_chosen=" 4 "), "bad-score", E),
    (alpaca(score_chosen=""), "bad-score", E),
    (alpaca(score_chosen="4/5"), "bad-score", E),
    (alpaca(score_rejected=False), "bad-score", E),
    (alpaca(score_rejected=[]), "bad-score", E),
    (alpaca(score_rejected={}), "bad-score", E),
    (alpaca(score_rejected=10**300), "bad-score", E),
    (alpaca(score_rejected=-(10**4000)), "bad-score", E),
    (alpaca(score_rejected=-1e39), "bad-score", E),
    (alpaca(score_chosen=None), "missing-score", E),
    (alpaca(score_chosen=None, score_rejected="x"), "missing-score", E),
    (alpaca(score_chosen=None, score_rejected=None), "missing-score", W),
    (alpaca(score_chosen=0, score_rejected=0), "tied-scores", W),
    (alpaca(score_chosen=0, score_rejected=-0.0), "tied-scores", W),
    (alpaca(score_chosen=-1, score_rejected=1), "reversed-scores", W),
    (alpaca(score_chosen=1, score_rejected=1.0000001), "reversed-scores", W),
    *(
        ({"instruction": f"Which {key}?", "chosen": "yes", "rejected": "no", key: 4, other: 1}, "unread-column", W)
        for key, other in [
            ("chosen_score", "rejected_score"),
            ("score_chosen ", "score_rejected "),
            ("scores_chosen", "scores_rejected"),
            ("scoreChosen", "scoreRejected"),
            ("Score_Chosen", "Score_Rejected"),
            ("chosen_rating", "rejected_rating"),
            ("chosen-reward", "rejected-reward"),
            ("score_choosen", "score_rejectd"),
            ("score", "margin"),
        ]
    ),
    *(
        (alpaca(**{key: "1.png"}), "unread-column", W)
        for key in ("image_path", "img", "img_path", "image_url", "Image")
    ),
    *((alpaca(**{key: "x"}), "unread-column", W) for key in ("photo", "video_path", "image_base64", "Images", "imgs")),
    *((alpaca(**{key: "x"}), "unread-column", W) for key in ("sytem", "System", "histroy", "inputs", "prompt")),
    *((alpaca(**{key: ["x"]}), "unsupported", E) for key in ("video", "audio", "videos", "audios", "tools")),
    (alpaca(responses=5), "too-few-responses", E),
    (alpaca(conversations=[]), "unread-column", W),
]

TAGGED: list[Kind] = [
    (sharegpt(conversations="Which?"), "wrong-type", E),
    (sharegpt(conversations={}), "wrong-type", E),
    (sharegpt(conversations=[]), "empty-prompt", E),
    (sharegpt("Which?"), "wrong-type", E),
    (sharegpt(None), "wrong-type", E),
    (sharegpt([human()]), "wrong-type", E),
    (sharegpt({"value": "Which?"}), "wrong-type", E),
    (sharegpt({"from": None, "value": "Which?"}), "wrong-type", E),
    (sharegpt({"from": 1, "value": "Which?"}), "wrong-type", E),
    (sharegpt({"from": "human"}), "missing-key", E),
    (sharegpt(human(None)), "missing-key", E),
    (sharegpt(human(["Which?"])), "wrong-type", E),
    (sharegpt(human("")), "empty-prompt", E),
    (sharegpt(human(ZERO_WIDTH)), "empty-prompt", E),
    (sharegpt({"from": "user", "value": "Which?"}), "bad-role", E),
    (sharegpt({"from": "Human", "value": "Which?"}), "bad-role", E),
    (sharegpt({"from": "\x1b[31mhuman", "value": "Which?"}), "bad-role", E),
    (sharegpt({"role": "user", "content": "Which?"}), "wrong-type", E),
    (sharegpt(human(), gpt()), "bad-role", E),
    (sharegpt(gpt()), "bad-role", E),
    (sharegpt({"from": "system", "value": "Be brief."}), "bad-role", E),
    (sharegpt(human(), human("Or which?")), "role-order", W),
    (sharegpt(gpt(), human()), "role-order", W),
    (sharegpt(human(), gpt(), gpt(), human()), "role-order", W),
    (sharegpt(human(), {"from": "system", "value": "x"}, human()), "role-order", W),
    (sharegpt(*[{"from": "system", "value": "x"}] * 2, human()), "role-order", W),
    (sharegpt({"from": "system", "value": "x"}, human(), system="y"), "bad-role", E),
    (sharegpt(human(), gpt(""), human()), "empty-message", W),
    (sharegpt(human(), {"from": "function_call", "value": "f()"}, human()), "tool-turn", W),
    (sharegpt(human("<image>?")), "image-marks", E),
    (sharegpt(human(), gpt("<image>"), human()), "image-marks", E),
    (sharegpt(images=["1.png"]), "image-marks", E),
    (sharegpt(chosen=None), "missing-key", E),
    (sharegpt(chosen={}), "wrong-type", E),
    (sharegpt(chosen=[]), "wrong-type", E),
    (sharegpt(chosen=[gpt("yes")]), "wrong-type", E),
    (sharegpt(chosen=human("yes")), "bad-role", E),
    (sharegpt(chosen=gpt("")), "empty-response", E),
    (sharegpt(chosen=gpt(7)), "wrong-type", E),
    (sharegpt(chosen=gpt("no")), "equal-responses", E),
    (sharegpt(chosen={"from": "gpt", "value": None}), "missing-key", E),
    (sharegpt(system=[]), "wrong-type", E),
    (sharegpt(instruction="Which?"), "wrong-type", E),  # of alpaca by its keys, and there a response is a text
    (sharegpt(history=[["a", "b"]]), "unread-column", W),
    (sharegpt(chosen_score=1, score_chosen=None, score_rejected=None), "unread-column", W),
]

TRL: list[Kind] = [
    (trl(5), "wrong-type", E),
    (trl({"role": "user", "content": "?"}), "wrong-type", E),
    (trl([None]), "wrong-type", E),
    (trl([[USER]]), "wrong-type", E),
    (trl([{}]), "bad-role", E),
    (trl([{"role": "", "content": "?"}]), "bad-role", E),
    (trl([{"role": "User", "content": "?"}]), "bad-role", E),
    (trl([{"role": "tool", "content": "?"}, USER]), "bad-role", E),
    (trl([{"role": ["user"], "content": "?"}]), "bad-role", E),
    (trl([{"role": "user", "content": None}]), "missing-key", E),
    (trl([{"role": "user", "content": 5}]), "wrong-type", E),
    (trl([{"role": "user", "content": {}}]), "wrong-type", E),
    (trl([{"role": "user", "content": ""}]), "empty-prompt", E),
    (trl([SYSTEM]), "bad-role", E),
    (trl([ANSWER]), "bad-role", E),
    (trl([USER, USER]), "role-order", W),
    (trl([ANSWER, USER]), "role-order", W),
    (trl([SYSTEM, SYSTEM, USER]), "role-order", W),
    (trl([USER, SYSTEM, USER]), "role-order", W),
    (trl([SYSTEM, ANSWER, USER]), "role-order", W),
    (trl([USER, ANSWER, ANSWER, USER]), "role-order", W),
    (trl([USER, {"role": "assistant", "content": ""}, USER]), "empty-message", W),
    (trl(parts()), "empty-prompt", E),
    (trl(parts("?")), "wrong-type", E),
    (trl(parts(None)), "wrong-type", E),
    (trl(parts({})), "wrong-type", E),
    (trl(parts({"type": "text"})), "missing-key", E),
    (trl(parts({"type": "text", "text": 5})), "wrong-type", E),
    (trl(parts({"type": "audio", "audio": "a.wav"})), "wrong-type", E),
    (trl(parts({"type": "input_image"})), "wrong-type", E),
    (trl(parts({"type": "image"}, {"type": "text", "text": "?"})), "image-marks", E),
    (trl(parts({"type": "image", "image": "gone.png"})), "missing-image", E),
    (trl(parts({"type": "image_url", "image_url": {"url": "https://x.org/a.png"}})), "remote-image", E),
    (trl(parts({"type": "image", "image": "1.png"}), images=["1.png"]), "inline-image", E),
    (trl(parts({"type": "image"}, {"type": "text", "text": "?"}), images=[]), "image-marks", E),
    (trl(f"<image>{next(NUMBER)}", images=[]), "image-marks", E),
    (trl("Which <video>?"), "media-mark", W),
    (trl(chosen={"role": "assistant", "content": "yes"}), "wrong-type", E),
    (trl(chosen=[{"role": "assistant", "content": None}]), "missing-key", E),
    (trl(chosen=[{"role": "assistant", "content": ""}]), "empty-response", E),
    (trl(chosen=[{"role": "assistant", "content": [{"type": "image"}]}]), "wrong-type", E),
    (trl(chosen=[{"role": "assistant"}]), "missing-key", E),
    (trl(chosen=[USER, ANSWER, ANSWER]), "wrong-type", E),
    (trl(chosen=[], rejected=[]), "wrong-type", E),
    (trl(chosen=None, rejected=None), "missing-key", E),
    ({"chosen": [USER, ANSWER], "rejected": [SYSTEM, ANSWER]}, "missing-key", E),
    ({"chosen": [ANSWER], "rejected": [ANSWER]}, "missing-key", E),
    ({"chosen": [USER, USER, ANSWER], "rejected": [USER, USER, {**ANSWER, "content": "b"}]}, "role-order", W),
    (trl(system="Be brief."), "unread-column", W),
    (trl(history=[["a", "b"]]), "unread-column", W),
    (trl(instruction="Which?", chosen=[ANSWER]), "unread-column", W),
    (trl(image_path="1.png"), "unread-column", W),
    (trl(chosen_score=4, rejected_score=1, score_chosen=None, score_rejected=None), "unread-column", W),
    (trl(score=[4, 1], score_chosen=None, score_rejected=None), "unread-column", W),
]

RANKED: list[Kind] = [
    ({"responses": [text("a"), text("b", 2)]}, "missing-key", E),
    (ranked({"responses": []}), "too-few-responses", E),
    (three(responses={}), "too-few-responses", E),
    (three(responses=[[text("a"), text("b")]]), "too-few-responses", E),
    (ranked("a", "b"), "wrong-type", E),
    (ranked(None, text("b")), "wrong-type", E),
    (ranked(["a", 1], ["b", 2]), "wrong-type", E),
    (ranked({"score": 1}, text("b", 2)), "missing-key", E),
    (ranked({"response": "a", "score": 1}, text("b", 2)), "missing-key", E),
    (ranked({"text": "a"}, text("b", 2)), "missing-score", E),
    (ranked({"text": "a", "rating": 1}, text("b", 2)), "missing-score", E),
    (ranked(text("a", True), text("b", 2)), "bad-score", E),
    (ranked(text("a", "1"), text("b", 2)), "bad-score", E),
    (ranked(text("a", float("nan")), text("b", 2)), "bad-score", E),
    (ranked(text("a", [1]), text("b", 2)), "bad-score", E),
    (ranked(text(["a"]), text("b", 2)), "wrong-type", E),
    (ranked(text(" "), text("b", 2)), "empty-response", E),
    (ranked(text(ZERO_WIDTH), text("b", 2)), "empty-response", E),
    (ranked(text("a"), text("a", 2)), "no-pair", E),
    (ranked(text("a"), text("a", 2), text("b", 3)), "duplicate-response", W),
    (ranked(text("caf\u00e9"), text("cafe\u0301", 2)), "look-alike-responses", W),
    (ranked(text("a", 0), text("b", -0.0)), "no-pair", E),
    (three(pairs={}), "bad-pair", E),
    (three(pairs=[]), "no-pair", E),
    (three(pairs=[0, 1]), "bad-pair", E),
    (three(pairs=[[0]]), "bad-pair", E),
    (three(pairs=[[0, 1, 2]]), "bad-pair", E),
    (three(pairs=[[0, 0]]), "bad-pair", E),
    (three(pairs=[[0, 3]]), "bad-pair", E),
    (three(pairs=[[-1, 0]]), "bad-pair", E),
    (three(pairs=[[0, 1.0]]), "bad-pair", E),
    (three(pairs=[[True, False]]), "bad-pair", E),
    (three(pairs=[["0", "1"]]), "bad-pair", E),
    (three(pairs=[None]), "bad-pair", E),
    (three(pairs="01"), "bad-pair", E),
    (three(pairs=[[0, 10**30]]), "bad-pair", E),
    (three(pairs=[[0, 1], [0, 1]]), "duplicate-pair", W),
    (three(pairs=[[0, 1], [1, 0]]), "pair-cycle", W),
    (three(pairs=[[0, 1], [1, 2], [2, 0]]), "pair-cycle", W),
    (three(pairs=[[2, 0]]), "reversed-scores", W),
    (ranked(text("a", 1), text("b", 1), pairs=[[0, 1]]), "tied-scores", W),
    (ranked(text("a", 1), text("b", None), pairs=[[0, 1]]), "missing-score", E),
    (ranked(text("a", 2), text("a", 1), text("b", 0), pairs=[[0, 1]]), "equal-responses", E),
    (three(chosen="a", rejected="b"), "unread-column", W),
    (three(image_path="1.png"), "unread-column", W),
    (three(prompt=[USER, USER]), "role-order", W),
    (three(prompt=""), "empty-prompt", E),
    (three(prompt=None), "missing-key", E),
    (three(prompt="<image>?", images=["1.png", "1.png"]), "image-marks", E),
    (three(video="a.mp4"), "unsupported", E),
]

IMAGES: list[Kind] = [
    (shows(True), "wrong-type", E),
    (shows(""), "wrong-type", E),
    (shows({}), "wrong-type", E),
    (shows({"path": ""}), "wrong-type", E),
    (shows({"path": 5}), "wrong-type", E),
    (shows({"bytes": 5}), "wrong-type", E),
    (shows({"bytes": []}), "wrong-type", E),
    (shows({"file": "1.png"}), "wrong-type", E),
    (shows(["1.png"]), "wrong-type", E),
    (alpaca(instruction="<image>?", images={"a": "1.png"}), "wrong-type", E),
    (alpaca(instruction="<image>?", images=7), "wrong-type", E),
    (alpaca(instruction="<image>?", images=["1.png"], image=["1.png"]), "wrong-type", E),
    (shows("1.PNG"), "missing-image", E),
    (shows("1.png "), "missing-image", E),
    (shows(" 1.png"), "missing-image", E),
    (shows("1.png\n"), "missing-image", E),
    (shows("1%2Epng"), "missing-image", E),
    (shows(".\\1.png"), "missing-image", E),
    (shows("C:\\images\\1.png"), "missing-image", E),
    (shows("../1.png"), "missing-image", E),
    (shows("/nowhere/1.png"), "missing-image", E),
    (shows("~/1.png"), "missing-image", E),
    (shows("$HOME/1.png"), "missing-image", E),
    (shows("1.png,2.png"), "missing-image", E),
    (shows('["1.png"]'), "missing-image", E),
    (shows("*.png"), "missing-image", E),
    (shows("gone\x1b[31m.png"), "missing-image", E),
    (shows("a" * 300 + ".png"), "broken-image", E),
    (shows("1.png\x00"), "broken-image", E),
    (shows("\ud800.png"), "bad-text", E),
    (shows("."), "broken-image", E),
    (shows("loop.png"), "broken-image", E),
    (shows("dangling.png"), "missing-image", E),
    (shows("pipe.png"), "broken-image", E),
    (shows("/dev/zero"), "broken-image", E),
    (shows("/dev/null"), "broken-image", E),
    (shows("hidden.png"), "broken-image", E),
    (shows("drawing.svg"), "broken-image", E),
    (shows("print.eps"), "broken-image", E),
    (shows("text.png"), "broken-image", E),
    (shows("lfs.png"), "broken-image", E),
    (shows("zeros.png"), "broken-image", E),
    (shows("flipped.png"), "broken-image", E),
    (shows("header.jpg"), "broken-image", E),
    (shows("movie.mp4"), "broken-image", E),
    (shows("file:///tmp/1.png"), "remote-image", E),
    (shows("HTTP://example.org/1.png"), "remote-image", E),
    (shows("s3://bucket/1.png"), "remote-image", E),
    (shows("gs://bucket/1.png"), "remote-image", E),
    (shows("data:image/png,abc"), "remote-image", E),
    (shows({"url": "https://example.org/1.png"}), "remote-image", E),
    (shows("data:image/png;base64,!!!!"), "broken-image", E),
    (shows("data:image/png;base64,"), "broken-image", E),
    (shows({"bytes": ""}), "broken-image", E),
    (shows({"bytes": BASE64[:-3]}), "broken-image", E),
    (shows({"bytes": BASE64[:2000]}), "broken-image", E),
    (shows({"bytes": "\n".join([BASE64[:76], BASE64[76:]])}), "broken-image", E),
    (shows({"bytes": BASE64.replace("+", "-").replace("/", "_")}), "broken-image", E),
    (shows({"bytes": f"b'{BASE64}'"}), "broken-image", E),
    (shows(BASE64), "broken-image", E),  # base64 where a path belongs: a name too long
    (shows("dot.png"), "tiny-image", W),
    (shows("line.png"), "tiny-image", W),
    (shows("pages.gif"), "animated-image", W),
    (shows("pages.tiff"), "animated-image", W),
    (shows("print.jpg"), "cmyk-image", W),
    (shows("deep.png"), "deep-image", W),
    (shows("turned.jpg"), "rotated-image", W),
    (shows("clear.png"), "transparent-image", W),
    (shows("palette.png"), "palette-image", W),
    (shows("ribbon.png"), "extreme-aspect", E),
    (shows("1.png", rejected="no <|image_pad|>"), "special-token", E),
    (alpaca(instruction="<image> <image>?", images=["1.png"]), "image-marks", E),
    (alpaca(instruction="<Image>?", images=["1.png"]), "image-marks", E),
    (alpaca(instruction="<image >?", images=["1.png"]), "image-marks", E),
    (alpaca(instruction="<img>?", images=["1.png"]), "image-marks", E),
    (alpaca(instruction="?", system="<image>", images=["1.png"]), "image-marks", E),
    (alpaca(instruction="?", chosen="<image>yes", images=["1.png"]), "image-marks", E),
    (alpaca(instruction="<image>?", images=["1.png", None]), "image-marks", E),
    (alpaca(instruction="<image>?", images=[]), "image-marks", E),
    (alpaca(instruction="<image>?", images=None, image=None), "image-marks", E),
]


# Under `dataset_info.json`: the columns are called question, good, bad, plus, minus and pictures.
def shop(**columns: Any) -> dict[str, Any]:
    return {"question": f"Which {next(NUMBER)}?", "good": "yes", "bad": "no", "plus": 4, "minus": 1, **columns}


MAPPED: list[Kind] = [
    (shop(good=None), "missing-key", E),
    (shop(bad=""), "empty-response", E),
    (shop(good="no"), "equal-responses", E),
    (shop(plus="4"), "bad-score", E),
    (shop(minus=None), "missing-score", E),
    (shop(plus=1, minus=4), "reversed-scores", W),
    (shop(question=5), "wrong-type", E),
    (shop(question="<image>?"), "image-marks", E),
    (shop(question="<image>?", pictures=["gone.png"]), "missing-image", E),
    (shop(score_chosen=4, score_rejected=1, plus=None, minus=None), "unread-column", W),
    (alpaca(), "", ""),  # a row in the plain layout: no declared column stands in it
    ({"Question": "?", "good": "yes", "bad": "no"}, "unknown-layout", E),
]

TABLES: dict[str, tuple[list[Kind], Callable[[], dict[str, Any]]]] = {
    "lines.jsonl": (LINES, alpaca),
    "alpaca.jsonl": (ALPACA, alpaca),
    "sharegpt.json": (TAGGED, sharegpt),
    "trl.jsonl": (TRL, trl),
    "ranked.json": (RANKED, three),
    "images.jsonl": (IMAGES, lambda: shows("1.png")),
    "mapped.json": (MAPPED, shop),
}


def draw(folder: Path) -> None:
    (folder / "1.png").write_bytes(encoded(SQUARE))
    png, jpg = encoded(SQUARE), encoded(SQUARE, "JPEG")
    (folder / "zeros.png").write_bytes(bytes(len(png)))
    (folder / "flipped.png").write_bytes(png[:60] + bytes([png[60] ^ 0xFF]) + png[61:])
    (folder / "header.jpg").write_bytes(jpg[:20])
    (folder / "movie.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(64))
    (folder / "hidden.png").write_bytes(b"\x7fELF" + bytes(64))
    (folder / "drawing.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg" width="40" height="40"/>')
    (folder / "print.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n")
    (folder / "text.png").write_text("a text with another name")
    (folder / "lfs.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "dangling.png").symlink_to("nothing.png")
    os.mkfifo(folder / "pipe.png")
    saved: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "dot.png": (Image.new("RGB", (1, 1)), {}),
        "line.png": (Image.new("RGB", (100, 1)), {}),
        "ribbon.png": (Image.new("RGB", (9000, 40)), {}),
        "pages.gif": (SQUARE, {"save_all": True, "append_images": [SQUARE.rotate(90)]}),
        "pages.tiff": (SQUARE, {"save_all": True, "append_images": [SQUARE.rotate(90)]}),
        "print.jpg": (SQUARE.convert("CMYK"), {}),
        "deep.png": (Image.new("I;16", (40, 40), 40_000), {}),
        "clear.png": (Image.new("RGBA", (40, 40), (9, 9, 9, 9)), {}),
        "palette.png": (SQUARE.convert("P"), {}),
    }
    for name, (image, options) in saved.items():
        image.save(folder / name, **options)
    exif = Image.Exif()
    exif[0x0112] = 6
    SQUARE.save(folder / "turned.jpg", exif=exif)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    draw(folder)
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad", "images": "pictures"}
    columns |= {"score_chosen": "plus", "score_rejected": "minus"}
    info = {"shop": {"file_name": "mapped.json", "ranking": True, "columns": columns}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    for name, (kinds, good) in TABLES.items():
        rows = [each for row, *_ in kinds for each in (row, good())]
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        whole = b"[" + b",\n".join(lines) + b"]" if name.endswith(".json") else b"\n".join(lines)
        (folder / name).write_bytes(whole)
    return folder


def unidpo(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_they_are_many_and_each_is_another() -> None:
    bad = [repr(row) for kinds, _ in TABLES.values() for row, kind, _ in kinds if kind]
    assert len(bad) >= 300
    assert len(set(bad)) == len(bad)


@pytest.mark.parametrize("name", TABLES)
def test_each_bad_row_is_named_and_no_good_one_is_touched(folder: Path, name: str) -> None:
    kinds, _ = TABLES[name]
    done = unidpo("data", "check", folder / name, "--json")
    assert done.exit_code == 2, done.exception
    report = json.loads(done.stdout)
    found: dict[int, set[tuple[str, str]]] = {}
    for finding in report["findings"]:
        if finding["row"] is not None:
            found.setdefault(finding["row"], set()).add((finding["kind"], finding["severity"]))
    wrong = []
    for n, (row, kind, severity) in enumerate(kinds):
        said = found.pop(2 * n + 1, set())
        if (kind, severity) not in said if kind else said:
            wrong.append((str(row)[:200], kind, severity, said))
    assert wrong == []
    assert found == {}
    lost = sum(severity == E for *_, severity in kinds)
    empty = sum(row == b"" for row, *_ in kinds)
    assert report["rows"] == 2 * len(kinds) - empty
    assert report["usable_rows"] == 2 * len(kinds) - empty - lost


@pytest.mark.parametrize("name", TABLES)
def test_people_read_it_and_nothing_obeys_it(folder: Path, name: str) -> None:
    """The report as text, a conversion that refuses, and one that leaves the bad rows out."""
    checked = unidpo("data", "check", folder / name, "--no-scan-images")
    assert checked.exit_code == 2
    assert "Traceback" not in checked.output
    assert all(line.isprintable() for line in checked.output.split("\n"))
    target = folder / f"new-{Path(name).stem}.jsonl"
    refused = unidpo("data", "convert", folder / name, "--to", target)
    assert isinstance(refused.exception, DataError)
    assert all(line.isprintable() for line in str(refused.exception).split("\n"))
    assert not target.exists()
    usable = json.loads(unidpo("data", "check", folder / name, "--no-scan-images", "--json").stdout)["pairs"]
    converted = unidpo(
        "data", "convert", folder / name, "--to", target, "--skip-bad-rows", "--drop-extra", "--layout", "trl"
    )
    assert converted.exit_code == 0, converted.exception
    assert sum(len(group.pairs) for group in read_groups(target).groups) >= usable


def test_rows_of_a_table(tmp_path: Path) -> None:
    """What only a table can hold: types of its own, nulls in every column, bytes that are no text."""
    good = {"prompt": "Which?", "chosen": "yes", "rejected": "no", "score_chosen": 4.0, "score_rejected": 1.0}
    columns: dict[str, list[Any]] = {key: [value] * 8 for key, value in good.items()}
    columns["prompt"] = [f"Which {n}?" for n in range(8)]
    columns["prompt"][1] = None
    columns["chosen"][2] = ""
    columns["score_chosen"][3] = float("nan")
    columns["score_rejected"][4] = float("inf")
    columns["rejected"][5] = ZERO_WIDTH
    columns["score_chosen"][6] = None
    pq.write_table(pa.table(columns), tmp_path / "pairs.parquet")
    report = json.loads(unidpo("data", "check", tmp_path / "pairs.parquet", "--json").stdout)
    kinds = ["missing-key", "empty-response", "bad-score", "bad-score", "empty-response", "missing-score"]
    assert [(f["row"], f["kind"]) for f in report["findings"]] == list(enumerate(kinds, start=2))

    odd = {
        "chosen": pa.array([b"yes"], pa.binary()),
        "score_chosen": pa.array(["4"]),
        "prompt": pa.array([7]),
        "images": pa.array([[{"bytes": b"", "path": None}]]),
    }
    for name, column in odd.items():
        table = pa.table({**{key: [value] for key, value in good.items()}, name: column})
        path = tmp_path / f"{name}.parquet"
        pq.write_table(table, path)
        done = unidpo("data", "check", path, "--json")
        assert done.exit_code == 2, name
        assert {f["key"].partition("[")[0] for f in json.loads(done.stdout)["findings"]} == {name}


def test_training_refuses_them_before_a_model_is_loaded(folder: Path, golden: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    keys = {"output": str(tmp_path / "run"), "model": {"name": str(golden / "model"), "dtype": "float32"}}
    keys |= {"data": {"path": [str(folder / name) for name in TABLES]}, "loss": {"name": "simpo"}}
    recipe.write_text(json.dumps(keys), encoding="utf-8")  # JSON is YAML
    refused = unidpo("train", recipe)
    assert isinstance(refused.exception, DataError), refused.exception
    assert all(line.isprintable() for line in (refused.output + str(refused.exception)).split("\n"))
    assert not (tmp_path / "run" / "model").exists()
