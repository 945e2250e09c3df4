"""Nothing foreign reaches a terminal's controls: not by a message, a table, a progress bar or the log."""

import io
import json
import logging
import os
import sys
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

from unidpo import cli
from unidpo.errors import DataError, Finding, from_findings, printable, shown
from unidpo.progress import Stages
from unidpo.terminal import Terminal

ORDERS = "\x1b]0;owned\x07\x1b[31mred\x1b[2J\x9b1A\r\x08\x00\u202egnp.\u2066x\u200b"
"""Retitle, recolour, erase, go up, overwrite, turn the direction of writing, hide."""
BREAK = "\nfinished: all is well"


def obeyed(text: str) -> set[str]:
    """The characters of a text, line breaks aside, that a terminal obeys or hides."""
    return {character for character in text if not character.isprintable()} - {"\n"}


@pytest.mark.parametrize("text", [ORDERS, BREAK, "\ud800", "\u2028\x85", "a\tb", "e\u0301 é 漢字 🙂"])
def test_what_is_printable_is_one_line_and_still_tells_texts_apart(text):
    said = printable(text)
    assert said.isprintable()
    assert printable(said) == said
    assert all(c in said or c.encode("unicode_escape").decode() in said for c in text)


def test_a_long_text_is_cut_in_its_middle():
    said = printable("a" * 10_000 + "z", most=100)
    assert len(said) == 103
    assert (said[0], said[-1]) == ("a", "z")


def test_values_that_python_itself_cannot_write_are_shown():
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    assert shown(deep) == "<list>"
    assert shown(10**6000) == "<int>"
    while deep:  # one by one, or freeing it takes as many frames
        deep = deep.pop()  # type: ignore[assignment]


def test_findings_and_errors_are_printable_and_stay_exact():
    finding = Finding("kind", f"no {ORDERS}", Path(f"a{ORDERS}.json"), 3, f"k{ORDERS}" + "k" * 10_000)
    assert str(finding).isprintable()
    assert len(str(finding)) < 1000
    assert finding.key.startswith(f"k{ORDERS}")
    error = from_findings(DataError, f"title {ORDERS}{BREAK}", [finding, finding])
    first, *more = str(error).split("\n")
    assert obeyed(str(error)) == set()
    assert first.startswith("title")
    assert [line[:4] for line in more] == ["  fi", "  a\\", "  a\\"]  # a foreign break does not begin a line of ours


@pytest.mark.parametrize("color", [None, "standard"])
def test_a_terminal_shows_what_it_is_not_to_obey(color):
    terminal = Terminal(file=io.StringIO(), width=400, force_terminal=color is not None, color_system=color)
    table = Table(title=Text(ORDERS), min_width=200)
    table.add_row(Text(ORDERS, "red"))
    terminal.print(table)
    terminal.print(Text(f"two{ORDERS}\nlines", "bold red"), soft_wrap=True)
    with Stages(terminal) as stages:
        stages.update(f"download {ORDERS}", 1, 1, note=ORDERS)
    text = terminal.file.getvalue()
    own = text
    if color:  # rich's own colours and movements are there, the foreign ones are not
        assert "\x1b[1;31mtwo" in text
        assert "\x1b[2J" not in text
        assert "\x1b]0" not in text
        own = "".join(text.split("\x1b["))
    assert obeyed(own) <= ({"\r"} if color else set())
    assert r"\u202egnp" in text
    assert text.count("\\x1b[31mred") >= 3


def test_a_narrow_encoding_gets_escapes():
    file = io.TextIOWrapper(io.BytesIO(), "ascii")
    Terminal(file=file, width=80).print(Text("漢字 █"))
    assert file.buffer.getvalue() == b"\\u6f22\\u5b57 \\u2588\n"


def test_the_commands_show_what_data_holds(tmp_path, monkeypatch, capfd):
    """Through `data check`, `--json`, `convert` and the refusal of a missing file."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["unidpo", "data", *map(str, arguments)])
        with pytest.raises(SystemExit) as done:
            cli.main()
        return done.value.code or 0, *capfd.readouterr()

    folder = tmp_path / f"data{ORDERS.replace(chr(0), '')}{BREAK}"
    folder.mkdir()
    pairs = folder / "pairs.jsonl"
    pair = {"chosen": "a", "rejected": "b", "score_chosen": 2, "score_rejected": 1}
    rows = [
        {f"key{ORDERS}{BREAK}": 1},
        {"prompt": [{"role": f"user{ORDERS}{BREAK}", "content": "?"}], **pair},
        {"prompt": [{"role": "user", "content": "?", f"name{ORDERS}{BREAK}": 1}], **pair},
        {"prompt": "?", "images": [f"gone{ORDERS}{BREAK}.png"], **pair},
    ]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for arguments, code in [
        (("check", pairs), 2),
        (("convert", pairs, "--to", folder / "new.json"), 2),
        (("convert", pairs, "--to", folder / "new.json", "--skip-bad-rows", "--drop-extra"), 0),
        (("check", folder / "gone.json"), 2),
    ]:
        found, out, err = run(*arguments)
        assert found == code, err
        assert obeyed(out + err) == set()
        assert "Traceback" not in err
        assert not any(line.startswith("finished") for line in (out + err).splitlines())
    found, out, err = run("check", pairs, "--json")
    assert (found, "Traceback" in err) == (2, False)
    assert json.loads(out)["file"] == str(pairs)  # for machines: exact
    other = folder / os.fsdecode(b"\xff.jsonl")  # a name that is no UTF-8
    other.write_bytes(pairs.read_bytes())
    found, out, err = run("check", other, "--json")
    assert (found, json.loads(out)["file"]) == (2, str(other))


def test_what_training_logs_is_shown(monkeypatch):
    from unidpo.run.logs import ConsoleLog

    terminal = Terminal(file=io.StringIO(), width=80)
    ConsoleLog(terminal).emit(logging.LogRecord("unidpo", logging.WARNING, "", 0, "%s", (ORDERS,), None))
    assert obeyed(terminal.file.getvalue()) == set()
