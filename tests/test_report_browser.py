"""The report in a real browser: it fits a phone, prints, loads nothing and complains of nothing."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fanbu.report.html import write_report, write_workspace_report
from test_report import full_record
from test_report_generations import EVIL, LONG, old_story, story

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the PATH")

HOSTILE = (EVIL, LONG, "\u05d0\u05d1 \u202b general")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every kind of page, in English and Chinese."""
    root = tmp_path_factory.mktemp("pages")
    hostile, loss = story(HOSTILE), story(metric="loss")
    spaces = {"story": story(), "hostile": hostile, "loss": loss, "old": old_story(), "none": ([], [], None)}
    spaces["one"] = (story()[0][:1], story()[1][:2], None)
    found = {name: write_workspace_report(*each, root / name) for name, each in spaces.items()}
    found["zh"] = write_workspace_report(*story(), root / "zh", "zh")
    rounds = {"round 2": story()[0][1], "hostile round": hostile[0][1], "loss round": loss[0][0]}
    rounds["old round"] = full_record()
    found |= {name: write_report(record, root / name) for name, record in rounds.items()}
    found["zh round"] = write_report(story()[0][2], root / "zh round", "zh")
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        # Without a sandbox only because continuous integration runs as root.
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


NAMES = ("story", "hostile", "loss", "old", "none", "one", "zh", "round 2", "hostile round", "loss round", "old round",
         "zh round")  # fmt: skip

# What sticks out of the page to the right, apart from what scrolls inside its own box.
OUTSIDE = """() => [...document.querySelectorAll("body *")]
    .filter(e => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest(".scroll, pre"))
    .map(e => e.outerHTML.slice(0, 120))"""
# Text that its own box cuts off or lets run over its neighbour.
SPILLED = """() => [...document.querySelectorAll("th, td, dd, li, p, figcaption")]
    .filter(e => e.scrollWidth > e.clientWidth + 1 && e.clientWidth > 0 && getComputedStyle(e).display !== "inline")
    .filter(e => !e.querySelector(".scroll, svg"))
    .map(e => e.outerHTML.slice(0, 120))"""


def opened(browser: Any, path: Path, width: int, scheme: str = "light") -> tuple[Any, list[str], list[str]]:
    """A page, with what its console said and what it asked the network for."""
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    complaints: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    return page, complaints, requests


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("name", NAMES)
def test_a_page_fits_and_is_silent(browser: Any, pages: dict[str, Path], tmp_path: Path, name: str, width: int) -> None:
    page, complaints, requests = opened(browser, pages[name], width, "dark" if name == "loss" else "light")
    for drawer in page.locator("details").all():
        drawer.evaluate("e => { e.open = true }")
    page.screenshot(path=tmp_path / f"{name}-{width}.png", full_page=True)
    assert complaints == []
    assert requests == [pages[name].as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(OUTSIDE) == []
    assert page.evaluate(SPILLED) == []
    assert (tmp_path / f"{name}-{width}.png").stat().st_size > 5000
    page.context.close()


def test_what_is_wide_scrolls_in_its_own_box_by_keyboard(browser: Any, pages: dict[str, Path]) -> None:
    page, _, _ = opened(browser, pages["story"], 360)
    box = page.get_by_role("region", name="gain of each domain and round since the start", exact=True)
    assert box.evaluate("e => e.scrollWidth > e.clientWidth")
    box.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("e => e.scrollLeft > 0", arg=box.element_handle())
    head = page.locator("table.heat tbody th").first
    assert head.bounding_box()["x"] == pytest.approx(box.bounding_box()["x"], abs=3)  # the names stay in sight
    page.context.close()


def test_print_shows_everything_on_paper(browser: Any, pages: dict[str, Path], tmp_path: Path) -> None:
    page, complaints, _ = opened(browser, pages["story"], 794, "dark")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(29, 31, 35)"  # ink on paper, dark or not
    assert page.evaluate("document.documentElement.scrollWidth") <= 794
    assert page.locator("details table").first.is_visible()  # though nobody opened it
    paper = page.pdf(path=tmp_path / "story.pdf", format="A4")
    assert paper.startswith(b"%PDF")
    assert complaints == []
    page.context.close()


def test_shades_differ_on_screen(browser: Any, pages: dict[str, Path]) -> None:
    for scheme in ("light", "dark"):
        page, _, _ = opened(browser, pages["story"], 1280, scheme)
        shade = "e => getComputedStyle(e).backgroundColor"
        shades = {c: page.locator(f".heat .{c}").first.evaluate(shade) for c in ("p1", "p2", "p5", "n1", "p0")}
        assert len(set(shades.values())) == 5
        page.context.close()


def test_links_lead_to_the_rounds(browser: Any, pages: dict[str, Path]) -> None:
    page, _, _ = opened(browser, pages["story"], 1280)
    records = story()[0]
    for record in records:
        write_report(record, pages["story"].parent / "rounds" / record["key"][:20])
    page.get_by_role("link", name="Round 2").click()
    assert page.title().startswith("demo, round 2")
    page.context.close()
