"""The page in a real browser, from disk and without a network: `make test-browser`."""

import json
import os
import random
import shutil
import time

import pytest

from reports import drawn, make_run, trained
from unidpo.run_folder.inputs import data_file

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make test-browser")
CHROMIUM = os.environ.get("UNIDPO_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.browser
MANY = 50_000
OPENS, FILTERS = 3.0, 0.3
"""Seconds."""
WORDS = "the red bird flies over a small blue house near quiet water while people watch light fade".split()  # noqa: SIM905
HOSTILE = "</script><img src=x onerror=alert(1)>\u202egnp.exe"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


class Tab:
    """A page that is open, with what its console said."""

    def __init__(self, browser, path, width=1400, **options):
        self.said = []
        context = browser.new_context(viewport={"width": width, "height": 1000}, offline=True, **options)
        self.page = context.new_page()
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: self.said.append(dialog.message))
        began = time.perf_counter()
        self.page.goto(path.resolve().as_uri())
        self.page.wait_for_selector("#table tbody tr")
        self.seconds = time.perf_counter() - began

    def count(self):
        return int(self.page.inner_text("#count").split()[0].replace(",", ""))

    def drag(self, canvas, start, end):
        """Between two points, as shares of its width and height."""
        self.page.locator(canvas).evaluate("element => element.scrollIntoView({block: 'center'})")
        box = self.page.locator(canvas).bounding_box()
        at = [(box["x"] + box["width"] * x, box["y"] + box["height"] * y) for x, y in (start, end)]
        self.page.mouse.move(*at[0])
        self.page.mouse.down()
        self.page.mouse.move(*at[1])
        self.page.mouse.up()


@pytest.fixture(scope="module")
def page_of_a_run(tmp_path_factory):
    """40 steps of 8 pairs: scores 5 and 2, of every fourth 5 and 4; every tenth answer is hostile."""
    folder = tmp_path_factory.mktemp("run")
    rows = [
        {
            "prompt": f"question {i}",
            "chosen": f"yes {i}" if i % 10 else HOSTILE,
            "rejected": f"no {i}",
            "score_chosen": 5.0,
            "score_rejected": 2.0 if i % 4 else 4.0,
        }
        for i in range(320)
    ]
    file = folder / "pairs.json"
    file.write_text(json.dumps(rows))
    run = trained(file=str(file))
    for i, row in enumerate(run["rows"]):
        row["rejected_score"] = rows[i]["score_rejected"]
    data = [{"path": str(file), "weight": 1.0, "sha256": data_file(str(file), 1.0).sha256}]
    make_run(folder / "run", data=data, **run)
    drawn(folder / "run")
    return folder / "run" / "report.html"


def test_it_opens_without_a_word_on_the_console(browser, page_of_a_run):
    tab = Tab(browser, page_of_a_run)
    assert tab.count() == 320
    assert tab.said == []


def test_the_table_follows_what_is_selected_in_the_plane(browser, page_of_a_run):
    tab = Tab(browser, page_of_a_run)
    tab.drag("#plane", (0.7, 0.0), (1.0, 1.0))  # score margin 3
    assert tab.count() == 240
    assert set(tab.page.locator("#table tbody td[data-name='score margin']").all_inner_texts()) == {"3"}
    tab.page.fill("#x0", "")
    tab.page.fill("#x1", "1.5")
    tab.page.keyboard.press("Tab")
    assert tab.count() == 80, "the fields do the same by keyboard"
    tab.page.click("#clear")
    assert tab.count() == 320
    tab.drag("#bins", (0.5, 0.5), (1.0, 0.5))  # of the score margins, too: here no weight varies
    assert tab.count() == 240
    assert tab.said == []


def test_search_outcomes_order_and_pages(browser, page_of_a_run):
    tab = Tab(browser, page_of_a_run)
    tab.page.fill("#search", "question 31")
    assert tab.count() == 11  # 31 and 310 to 319
    tab.page.fill("#search", "")
    first = tab.page.inner_text("#table tbody tr")
    tab.page.click("#next")
    assert tab.page.inner_text("#page") == "page 2 of 13"
    assert tab.page.inner_text("#table tbody tr") != first
    tab.page.click("#table thead button:has-text('reward margin')")
    cells = tab.page.locator("#table tbody td[data-name='reward margin']").all_inner_texts()
    margins = [float(text.replace("−", "-")) for text in cells]
    assert margins == sorted(margins, reverse=True)
    tab.page.click("#table thead button:has-text('reward margin')")
    assert tab.page.get_attribute("#table thead th[aria-sort]", "aria-sort") == "ascending"
    shown = tab.count()
    button = tab.page.locator(".outcome.known")
    known = int(button.locator(".n").inner_text())
    button.press("Enter")
    assert tab.count() == shown - known
    assert button.get_attribute("aria-pressed") == "false"
    assert tab.said == []


def test_dark_and_chinese(browser, page_of_a_run):
    tab = Tab(browser, page_of_a_run, color_scheme="light")
    ground = "getComputedStyle(document.body).backgroundColor"
    light = tab.page.evaluate(ground)
    tab.page.click("#theme")
    assert tab.page.evaluate(ground) != light
    tab.page.click("#language")
    assert tab.page.inner_text("#pairs h2") == "偏好对"
    assert tab.page.inner_text("#count") == "320 对中的 320 对"
    assert tab.page.get_attribute("#plane", "aria-label").startswith("偏好对平面")
    assert tab.said == []


def test_a_chinese_browser_sees_chinese(browser, page_of_a_run):
    assert Tab(browser, page_of_a_run, locale="zh-CN").page.inner_text("#alerts h2") == "提醒"


def test_hostile_texts_stay_text(browser, page_of_a_run):
    tab = Tab(browser, page_of_a_run)
    tab.page.fill("#search", "onerror=alert")
    assert tab.count() == 32
    tab.page.locator("#table tbody tr").first.click()
    assert "</script><img src=x onerror=alert(1)>\\u202egnp.exe" in tab.page.inner_text("#table tbody")
    assert tab.page.locator("img").count() == 0
    assert tab.said == []


@pytest.mark.parametrize("width", [400, 1400])
def test_nothing_is_wider_than_the_screen(browser, page_of_a_run, width):
    tab = Tab(browser, page_of_a_run, width=width)
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= width


def test_every_control_has_a_name_and_can_be_reached_by_keyboard(browser, page_of_a_run):
    tab = Tab(browser, page_of_a_run)
    nameless = """[...document.querySelectorAll('button, select, input, canvas, a')].filter(
        (each) => !(each.textContent || each.getAttribute('aria-label') || each.labels?.[0]?.textContent || '').trim()
        || (each.tagName !== 'CANVAS' && each.tabIndex < 0)).map((each) => each.outerHTML)"""
    assert tab.page.evaluate(nameless) == []


def test_a_page_of_fifty_thousand_pairs_is_quick(browser, tmp_path):
    rng = random.Random(0)

    def text(length):
        return " ".join(rng.choices(WORDS, k=length))

    rows = [
        {"prompt": text(20), "chosen": text(rng.randint(10, 120)), "rejected": text(rng.randint(10, 120))}
        | {"score_chosen": 5.0, "score_rejected": 2.0}
        for _ in range(MANY)
    ]
    file = tmp_path / "many.json"
    file.write_text(json.dumps(rows))
    data = [{"path": str(file), "weight": 1.0, "sha256": data_file(str(file), 1.0).sha256}]
    logps = {"rejected_logps": lambda done, pair: -1.5 + rng.gauss(0, 0.5), "loss": lambda done, pair: rng.random()}
    run = make_run(tmp_path / "run", data=data, **trained(steps=MANY // 125, per_step=125, file=str(file), **logps))
    drawn(run)
    tab = Tab(browser, run / "report.html")
    assert tab.count() == MANY
    filtering = """(text) => { const field = document.getElementById('search'), began = performance.now();
        field.value = text; field.dispatchEvent(new Event('input')); return (performance.now() - began) / 1000; }"""
    tab.page.wait_for_timeout(1000)
    taken = {word: tab.page.evaluate(filtering, word) for word in ("bird", "quiet water", "zzz", "")}
    print(f"\nopens in {tab.seconds:.2f} s, filters in {taken}")  # noqa: T201
    assert tab.seconds < OPENS
    assert max(taken.values()) < FILTERS
