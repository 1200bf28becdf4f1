# SPDX-License-Identifier: Apache-2.0
"""report.html in a real browser: wide and narrow, light and dark, filtered, copied, printed."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import conform_reports
from support.headless_chromium import ABSENT, Browser, chromium

from portakv_conformance.report.page import write

pytestmark = pytest.mark.skipif(chromium() is None, reason=ABSENT)

WIDE = (1280, 900)
PHONE = (360, 800)
Pages = dict[str, Path]
# Contrast of each visible text with what lies under it (WCAG 2.2, 1.4.3): 4.5, and 3 where large.
PALE = """(() => {
  const read = (text) => text.match(/[\\d.]+/g).map(Number);
  const over = ([r, g, b, a = 1], under) => [r, g, b].map((v, i) => v * a + under[i] * (1 - a));
  const light = (rgb) => {
    const [r, g, b] = rgb.map((v) => v / 255)
      .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const known = new Map();
  const ground = (node) => {
    if (!node) return [255, 255, 255];
    if (!known.has(node)) {
      const own = read(getComputedStyle(node).backgroundColor);
      known.set(node, over(own, ground(node.parentElement)));
    }
    return known.get(node);
  };
  const pale = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !node.checkVisibility() || node.closest("script, style"))
      continue;
    const style = getComputedStyle(node), under = ground(node);
    const [a, b] = [light(over(read(style.color), under)), light(under)].sort((x, y) => y - x);
    const size = parseFloat(style.fontSize), bold = parseInt(style.fontWeight) >= 700;
    const needed = size >= 24 || (bold && size >= 18.66) ? 3 : 4.5;
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < needed) pale.push(`${ratio.toFixed(2)}: ${walker.currentNode.data.slice(0, 40)}`);
  }
  return pale;
})()"""
SEEN = "[...document.querySelectorAll('details.case')].filter((c) => !c.hidden).length"
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Pages:
    folder = tmp_path_factory.mktemp("reports")
    for name, run in conform_reports.RUNS.items():
        write(run(), folder / name)
    return {file.parent.name: file for file in folder.glob("*/report.html")}


@pytest.mark.parametrize(
    ("name", "size", "scheme"),
    [
        # The failing run shows every part of a page. Each size and each scheme is in every run; of
        # the other runs these two ways are enough.
        pytest.param(
            name, size, scheme, marks=() if name == "failing" and few else pytest.mark.full
        )
        for name in conform_reports.RUNS
        for size in (WIDE, PHONE)
        for scheme in ("light", "dark")
        for few in [(size is WIDE) == (scheme == "light")]
        if name == "failing" or few
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else value,
)
def test_the_page_fits_is_legible_and_asks_for_nothing(
    browser: Browser, pages: Pages, name: str, size: tuple[int, int], scheme: str
) -> None:
    browser.open(pages[name], *size, scheme)
    # A failing check is looked into on the picture: pytest keeps it in its temporary folder.
    picture = browser.shoot(pages[name].with_name(f"{size[0]}-{scheme}.png"))
    width, height = struct.unpack(">II", picture[16:24])
    assert width == size[0]
    assert height > 2 * size[1]
    assert browser.ask(OVERFLOW) == 0
    browser.ask("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert browser.ask(OVERFLOW) == 0
    assert browser.ask(PALE) == []
    assert browser.ask("matchMedia('(prefers-color-scheme: dark)').matches") is (scheme == "dark")
    ground = browser.ask("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(246, 247, 249)", "dark": "rgb(14, 19, 25)"}[scheme]
    assert browser.ask("typeof window.hacked") == "undefined"
    assert browser.complaints() == []
    urls = [params["request"]["url"] for params in browser.params_of("Network.requestWillBeSent")]
    assert [url for url in urls if not url.startswith("data:")] == [pages[name].resolve().as_uri()]


def test_the_matrix_scrolls_in_its_own_box_on_a_phone(browser: Browser, pages: Pages) -> None:
    browser.open(pages["passing"], 360, 800, "light")
    box = "document.querySelector('.scroll')"
    assert browser.ask(f"{box}.scrollWidth > {box}.clientWidth")
    browser.ask(f"{box}.scrollLeft = 200")
    left = "document.querySelector('.matrix tbody th').getBoundingClientRect().left"
    assert browser.ask(f"Math.abs({left} - {box}.getBoundingClientRect().left)") < 3


def test_cases_are_filtered_by_status_area_words_and_a_cell(browser: Browser, pages: Pages) -> None:
    record = conform_reports.failing()
    browser.open(pages["failing"], 1280, 900, "light")
    assert browser.ask(SEEN) == len(record.cases)
    click = "document.querySelector('#filter [data-status=\"{}\"]').click()"
    for status, number in record.totals.items():
        browser.ask(click.format(status))
        assert browser.ask(SEEN) == number
        text = browser.ask("document.getElementById('shown').textContent")
        assert text == f"{number} of {len(record.cases)} shown"
    browser.ask(click.format(""))
    safe = sum(case.area == "safety" for case in record.cases)
    for field, value, seen in (
        ("area", "safety", safe),
        ("search", "CANARIES odd", 1),
        ("search", "no such case", 0),
        ("search", "", safe),
        ("area", "", len(record.cases)),
    ):
        browser.ask(f"""{{
            const field = document.getElementById('{field}');
            field.value = '{value}';
            field.dispatchEvent(new Event('input', {{bubbles: true}}));
        }}""")
        assert browser.ask(SEEN) == seen
        assert browser.ask("document.getElementById('nothing').checkVisibility()") == (seen == 0)
    browser.ask("document.querySelector('a.cell.failed').click()")
    assert browser.ask(SEEN) == 1
    assert browser.ask("location.hash") == "#cases"
    open_ = "document.querySelector('details.case:not([hidden])')"
    assert browser.ask(f"{open_}.dataset.status") == "failed"
    assert browser.ask(f"{open_}.checkVisibility()")
    browser.ask("document.getElementById('cell').click()")
    assert browser.ask(SEEN) == len(record.cases)


@pytest.mark.parametrize("clipboard", ["open", "closed"])
def test_a_command_is_copied_as_it_stands(browser: Browser, pages: Pages, clipboard: str) -> None:
    """With the clipboard's own interface, and the old way where a page has none."""
    browser.open(pages["failing"], 1280, 900, "light")
    browser.ask(
        """window.copied = null;
        Object.defineProperty(navigator, "clipboard", {value: {writeText: async (text) => {
          if (%s) throw new Error("closed");
          window.copied = text;
        }}});
        document.addEventListener("copy", () => {
          window.copied = document.activeElement.value;
        });"""
        % ("true" if clipboard == "closed" else "false")
    )
    browser.ask("document.querySelector('#failures button.copy').click()")
    browser.ask("new Promise((done) => setTimeout(done, 50))")
    failed = [case for case in conform_reports.failing().cases if case.status == "failed"]
    assert browser.ask("window.copied") == failed[0].replay
    assert browser.ask("document.querySelector('#failures button.copy').textContent") == "Copied"


def test_paper_shows_the_details_of_failures(browser: Browser, pages: Pages) -> None:
    browser.open(pages["failing"], 1280, 900, "dark")
    assert browser.paper().startswith(b"%PDF")
    for event, gone in (("beforeprint", ":not([open])"), ("afterprint", "[open]")):
        browser.ask(f"dispatchEvent(new Event('{event}'))")
        assert browser.ask(f"document.querySelector('#failures details{gone}')") is None
    browser.call("Emulation.setEmulatedMedia", media="print")
    assert browser.ask("document.querySelector('nav').checkVisibility()") is False
    assert browser.ask("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.complaints() == []
