"""The page in a real browser, if one is installed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Page, browsing, executable

from snac_runner.report.page import add_votes

pytestmark = pytest.mark.skipif(executable() is None, reason="needs chromium")


@pytest.fixture(scope="module")
def page(simulated: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browsing(tmp_path_factory.mktemp("profile")) as opened:
        opened.open(simulated / "report.html")
        yield opened


def test_the_page_loads_without_errors_or_requests(page: Page, simulated: Path) -> None:
    assert page.errors == []
    asked = [url for url in page.requests if not url.startswith("data:")]
    assert set(asked) == {(simulated / "report.html").resolve().as_uri()}


def test_a_heading_sorts_its_table_up_and_then_down(page: Page) -> None:
    rows = "[...document.querySelectorAll('table[data-name=speaker] tbody.arm tr')]"
    column = f"{rows}.map(r => Number(r.cells[2].dataset.key))"
    click = "document.querySelectorAll('table[data-name=speaker] thead button')[2].click()"
    page.run(click)
    assert page.run(column) == sorted(page.run(column))
    page.run(click)
    assert page.run(column) == sorted(page.run(column), reverse=True)
    head = "document.querySelectorAll('table[data-name=speaker] thead th')[2].getAttribute('aria-sort')"
    assert page.run(head) == "descending"


def test_every_clip_has_a_length(page: Page) -> None:
    every = "[...document.querySelectorAll('audio')]"
    wait = f"Promise.all({every}.map(a => a.readyState ? 1 : new Promise(r => a.onloadedmetadata = r)))"
    lengths = page.run(f"{wait}.then(() => {every}.map(a => a.duration))")
    assert len(lengths) == 27
    assert min(lengths) > 0.5


def test_switching_clips_within_a_pair_keeps_the_position(page: Page) -> None:
    first, second = page.run(
        """(async () => {
          const clips = [...document.querySelectorAll('.clip')], audio = (i) => clips[i].querySelector('audio');
          clips[0].querySelector('button').click();
          await new Promise(r => { audio(0).ontimeupdate = () => audio(0).currentTime > 0.1 && r(); });
          clips[3].querySelector('button').click();
          return [audio(0).currentTime, audio(3).currentTime];
        })()"""
    )
    assert first > 0.1
    assert second == pytest.approx(first, abs=0.05)


def test_the_page_fits_a_phone(page: Page, simulated: Path) -> None:
    page.open(simulated / "report.html", width=390, dark=True)
    assert page.run("document.documentElement.scrollWidth") == 390


def test_the_listening_test_plays_votes_by_key_and_exports(page: Page, simulated: Path) -> None:
    page.open(simulated / "abx.html")
    assert page.errors == []
    length = page.run("listen(1).then(() => sound.duration)")
    assert length > 0.5
    for key in ("1", "ArrowRight", "2", "ArrowRight", "0"):
        page.run(f"document.body.dispatchEvent(new KeyboardEvent('keydown', {{ key: '{key}', bubbles: true }}))")
    exported = json.loads(page.run("text()"))
    assert [vote["choice"] for vote in exported["votes"]] == ["a", "b", "same"]
    file = simulated.parent / "votes.json"
    file.write_text(json.dumps(exported))
    add_votes(simulated, file).unlink()  # the runner takes what the page gives


def test_pages_fit_in_both_themes_and_widths(page: Page, simulated: Path, tmp_path: Path) -> None:
    for name in ("report.html", "abx.html"):
        for width in (390, 1280):
            for dark in (False, True):
                page.open(simulated / name, width=width, dark=dark)
                page.screenshot(tmp_path / f"{name}-{width}-{'dark' if dark else 'light'}.png")
                assert page.run("document.documentElement.scrollWidth") <= width
    assert page.errors == []
