"""Progress where there is no terminal: plain lines, few, with rate and time left; a bar where there is one."""

import io

import pytest
from rich.console import Console

from unidpo.progress import PLAIN_SECONDS, Stages


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""

    class Clock:
        now = 1000.0

    monkeypatch.setattr("unidpo.progress.time.monotonic", lambda: Clock.now)
    return Clock


def plain():
    return Console(file=io.StringIO(), width=40)


def lines(console):
    return console.file.getvalue().splitlines()


def test_a_line_now_and_then_and_one_at_the_end(clock):
    console = plain()
    with Stages(console) as stages:
        for done in range(101):
            stages.update("training, pairs", done, 100, "loss 0.5")
            clock.now += 0.5
    assert lines(console) == [
        "training, pairs: 20/100, 2.0/s, 0:40 left, loss 0.5",
        "training, pairs: 40/100, 2.0/s, 0:30 left, loss 0.5",
        "training, pairs: 60/100, 2.0/s, 0:20 left, loss 0.5",
        "training, pairs: 80/100, 2.0/s, 0:10 left, loss 0.5",
        "training, pairs: 100/100 in 0:50, 2.0/s, loss 0.5",
    ]


def test_a_quick_stage_is_one_line(clock):
    console = plain()
    with Stages(console) as stages:
        stages.update("checking images", 0, 1500)
        clock.now += 2
        stages.update("checking images", 1500, 1500)
        stages.update("checking images", 1500, 1500)
    assert lines(console) == ["checking images: 1,500/1,500 in 0:02, 750.0/s"]


def test_a_stage_that_is_done_when_it_begins_has_no_speed(clock):
    console = plain()
    with Stages(console) as stages:
        stages.update("rows", 4, 4)
    assert lines(console) == ["rows: 4/4 in 0:00"]


def test_a_resumed_stage_counts_only_what_it_did_itself(clock):
    console = plain()
    with Stages(console) as stages:
        stages.update("training, pairs", 900, 1000)
        clock.now += PLAIN_SECONDS
        stages.update("training, pairs", 950, 1000)
    assert lines(console) == ["training, pairs: 950/1,000, 5.0/s, 0:10 left"]


def test_hours(clock):
    console = plain()
    with Stages(console) as stages:
        stages.update("training, pairs", 0, 36000)
        clock.now += 3600
        stages.update("training, pairs", 9000, 36000)
    assert lines(console) == ["training, pairs: 9,000/36,000, 2.5/s, 3:00:00 left"]


def test_nothing_done_yet_promises_nothing(clock):
    console = plain()
    with Stages(console) as stages:
        stages.update("reference, responses", 0, 10)
        clock.now += PLAIN_SECONDS
        stages.update("reference, responses", 0, 10)
    assert lines(console) == ["reference, responses: 0/10, 0.0/s"]


def test_each_stage_has_its_own_time(clock):
    console = plain()
    with Stages(console) as stages:
        stages.update("first", 0, 4)
        clock.now += 4
        stages.update("first", 4, 4)
        stages.update("second", 0, 6)
        clock.now += 3
        stages.update("second", 6, 6)
    assert lines(console) == ["first: 4/4 in 0:04, 1.0/s", "second: 6/6 in 0:03, 2.0/s"]


def test_what_a_user_named_is_no_markup(clock):
    console = plain()
    with Stages(console) as stages:
        stages.update("[red]data", 1, 1, "[/nonsense]")
    assert "[red]data" in lines(console)[0]
    assert "[/nonsense]" in lines(console)[0]


def test_a_terminal_gets_a_bar_with_the_note():
    console = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    with Stages(console) as stages:
        stages.update("[red]data, pairs", 0, 10)
        stages.update("[red]data, pairs", 7, 10, "loss [0.5]")
    shown = console.file.getvalue()
    assert "7/10" in shown
    assert "loss [0.5]" in shown
    assert "[red]data, pairs" in shown


def test_a_bar_ends_with_an_exception():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    stages = Stages(console)
    stages.update("pairs", 1, 10)
    with pytest.raises(KeyboardInterrupt), stages:
        raise KeyboardInterrupt
    assert stages._bar.live.is_started is False
