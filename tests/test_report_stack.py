"""The HTML report in a real browser: Chromium, without a window, and without a network to fall back on."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_samples import EVIL, Told, large, small

from otel_odibi.report.html import render
from otel_odibi.store import RunView

pytestmark = pytest.mark.stack

WIDE, NARROW = {"width": 1440, "height": 900}, {"width": 400, "height": 850}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium. A sandbox of its own is not to be had for root."""
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium")
    assert path is not None, "no chromium on the PATH: apt-get install chromium"
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


class Opened:
    """A report in a tab of its own, with all that it complained of and asked for."""

    def __init__(
        self, browser: Any, folder: Path, told: Told, viewport: dict[str, int], scheme: str, drawn: str
    ) -> None:
        self.file = folder / "run.html"
        self.file.write_bytes(render(told))
        self.context = browser.new_context(viewport=viewport, color_scheme=scheme)
        self.page = self.context.new_page()
        self.trouble: list[str] = []
        self.page.on("console", lambda message: self.trouble.append(message.text))
        self.page.on("pageerror", lambda error: self.trouble.append(str(error)))
        self.page.on("request", lambda request: request.url == self.file.as_uri() or self.trouble.append(request.url))
        self.page.goto(self.file.as_uri())
        self.page.locator(drawn).wait_for()

    def texts(self, selector: str) -> list[str]:
        return [text.strip() for text in self.page.locator(selector).all_text_contents()]

    def background(self) -> list[float]:
        colour = self.page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        return [float(part) for part in colour[4:-1].split(",")]


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """Opens reports; afterwards none of them has complained, or asked for anything but its own file."""
    tabs: list[Opened] = []

    def open_it(told: Told, viewport: dict[str, int] = WIDE, scheme: str = "light", drawn: str = "#dag svg") -> Opened:
        tabs.append(Opened(browser, tmp_path, told, viewport, scheme, drawn))
        return tabs[-1]

    yield open_it
    for tab in tabs:
        tab.context.close()
        assert tab.trouble == []


def test_everything_is_drawn(opened: Any) -> None:
    """Boxes with their outcomes, rows on edges, bars, critical path, attempts, cache marks, plots, a table."""
    tab = opened(small())
    assert tab.page.locator("#dag .box").count() == 9
    assert set(tab.texts("#dag svg > .small")) == {"336,776", "1,200", "327,346", "9"}
    assert tab.page.locator("#lanes .lane").count() == 10
    assert tab.page.locator("#lanes .bar").count() == 9
    assert tab.page.locator("#lanes .lane.critical").count() == 2
    assert tab.page.locator("#lanes .try[data-outcome=failure]").count() == 1
    assert tab.texts("#lanes .chip") == ["cache hit", "cache miss", "↻ 2 attempts", "pipeline"]
    assert tab.page.locator("canvas").count() == 3
    assert tab.page.locator("#rows tr").count() == 10
    assert tab.page.locator("#rows .spark").count() == 9
    assert "1 failure" in tab.texts("#totals dd")[0]
    assert tab.texts("#failures .message") == ["KeyError: 'customer_id'", "TimeoutError: the share did not answer"]
    assert "join" in tab.texts("#failures pre")[0]


def test_a_run_without_nodes_is_told_too(opened: Any) -> None:
    """What has nothing to show is left out."""
    told = small()
    tab = opened(Told(RunView(told.view.run, ())), drawn="#details h2")
    assert tab.texts("h2:visible") == ["What failed", "Earlier runs", "This run"]


def test_bars_are_to_scale(opened: Any) -> None:
    """A node that took 3 of 10 seconds has a bar three tenths of the track wide."""
    tab = opened(small())
    bar, track = (tab.page.locator(f"[data-row='0'] {part}").bounding_box() for part in (".bar", ".track"))
    assert bar["width"] / track["width"] == pytest.approx(0.3, abs=0.01)


def test_names_are_text_whatever_is_in_them(opened: Any) -> None:
    """Nothing that a node, a log line or an error is called becomes part of the page, wherever it is shown."""
    tab = opened(small())
    tab.page.locator("#lanes [data-row='2']").click()
    assert tab.texts("#details h2 .name") == [EVIL]
    assert any(EVIL in text for text in tab.texts("#details .logs li"))
    assert EVIL in tab.texts("#dag title")
    assert tab.page.locator("img").count() == 0
    assert tab.page.title() == "daily: failure"


def test_choosing_a_node_shows_what_it_did(opened: Any) -> None:
    """Its facts, failure and logs, alone; the same node is marked in all views, and links lead to its neighbours."""
    tab = opened(small())
    assert tab.texts("#details h2") == ["This run"]
    tab.page.locator("#dag .box", has_text="join").first.click()
    assert tab.texts("#details .logs li") == ["+9.000 error no such column  column=customer_id"]
    assert "Traceback" in tab.texts("#details pre")[0]
    assert tab.page.locator("tr.chosen, .lane.chosen, .box.chosen").count() == 3
    tab.page.locator("#details .facts .link", has_text="read_customers").click()
    assert tab.texts("#details h2 .name") == ["read_customers"]
    tab.page.keyboard.press("Escape")
    assert tab.texts("#details h2") == ["This run"]
    assert len(tab.texts("#details .logs li")) == 3


def test_the_table_can_be_sorted(opened: Any) -> None:
    """By any column, down and up; what has no value comes last."""
    tab = opened(small())
    for _ in range(2):
        tab.page.locator("th button", has_text="Rows out").click()
    assert tab.page.locator("th[aria-sort]").get_attribute("aria-sort") == "ascending"
    assert tab.texts("#rows td:nth-child(2)")[:4] == ["publish", "read_customers", EVIL, "read_orders"]
    tab.page.locator("th button", has_text="Node").click()
    names = tab.texts("#rows td:nth-child(2)")
    assert names == sorted(names)


def test_nodes_can_be_filtered(opened: Any) -> None:
    """By name, layer, engine or outcome, and to the critical path."""
    tab = opened(small())
    tab.page.locator("#find").fill("INGEST")
    assert tab.page.locator("#lanes .lane").count() == tab.page.locator("#rows tr").count() == 2
    assert tab.texts("#matches") == ["2 of 10 nodes"]
    tab.page.locator("#only-critical").check()
    assert tab.page.locator("#lanes .lane").count() == 1


def test_the_keyboard_is_enough(opened: Any) -> None:
    """Tab comes to every view, arrows move inside it with a visible focus, Enter chooses, Escape clears."""
    tab = opened(small())
    reached = []
    for _ in range(40):
        tab.page.keyboard.press("Tab")
        here = "document.activeElement.id || document.activeElement.getAttribute('role')"
        reached.append(tab.page.evaluate(here))
        if reached[-1] == "lanes":
            break
    assert [name for name in reached if name in ("theme", "button", "find", "only-critical")] == [
        "theme", "button", "find", "only-critical"
    ]  # fmt: skip
    tab.page.keyboard.press("ArrowDown")
    tab.page.keyboard.press("ArrowDown")
    outline = "getComputedStyle(document.querySelector('#lanes .cursor')).outlineStyle"
    assert tab.page.evaluate(outline) == "solid"
    tab.page.keyboard.press("Enter")
    assert tab.texts("#details h2 .name") == [EVIL]
    tab.page.keyboard.press("Escape")
    tab.page.locator("#dag .box").first.focus()
    tab.page.keyboard.press("ArrowRight")
    tab.page.keyboard.press("Enter")
    assert tab.texts("#details h2 .name") == ["read_customers"]


def test_light_and_dark(opened: Any) -> None:
    """As the system has it, until the button says otherwise."""
    tab = opened(small(), scheme="dark")
    assert max(tab.background()) < 40
    tab.page.locator("#theme").click()
    assert min(tab.background()) > 240
    tab.page.emulate_media(media="print", color_scheme="dark")
    assert min(tab.background()) > 240


@pytest.mark.parametrize("told", [small(), large(200, 500)], ids=["small", "200 nodes"])
def test_a_narrow_screen_needs_no_sideways_scrolling(opened: Any, told: Told) -> None:
    """At 400 pixels everything fits, and what is chosen comes up from below."""
    tab = opened(told, NARROW)
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= 400
    tab.page.locator("#lanes [data-row='1']").click()
    box = tab.page.locator("#details").bounding_box()
    assert box["y"] + box["height"] == pytest.approx(850, abs=1)


def test_it_prints(opened: Any) -> None:
    """All nodes are on the paper, as far as paper goes, not only those in sight."""
    tab = opened(large(100))
    assert tab.page.locator("#lanes .lane").count() < 60
    assert tab.page.pdf(format="A4").startswith(b"%PDF")
    tab.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert tab.page.locator("#lanes .lane").count() == 100
    tab.page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert tab.page.locator("#lanes .lane").count() < 60


def test_2000_nodes_stay_usable(opened: Any) -> None:
    """Only what is in sight is drawn, nodes are grouped in the graph, and the last of them is a key away."""
    tab = opened(large(2_000, 3_000))
    assert tab.page.evaluate("document.querySelectorAll('*').length") < 5_000
    assert tab.page.locator("#dag .box").count() == 4
    tab.page.locator("#lanes").focus()
    tab.page.keyboard.press("End")
    tab.page.keyboard.press("Enter")
    assert tab.texts("#details h2 .name") == ["step_1999"]
    assert tab.page.locator("#lanes .lane.chosen, #rows .chosen").count() == 2
    tab.page.locator("#find").fill("step_1234")
    assert tab.texts("#rows td:nth-child(2)") == ["step_1234"]
