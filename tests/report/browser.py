"""A page in a real browser: what it loads, says and draws, and a picture of it.

    python -m tests.report.browser PAGE.html FOLDER      pictures 1280 and 390 pixels wide

Needs playwright's Python package and a Chromium that is installed already; nothing is downloaded.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WIDTHS = (1280, 390)
_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_FIGURES = """
() => [...document.querySelectorAll('figure')].map(figure => {
  const svg = figure.querySelector('svg'), box = svg.getBoundingClientRect();
  const inside = r => r.left >= box.left - 3 && r.right <= box.right + 3 &&
                      r.top >= box.top - 3 && r.bottom <= box.bottom + 3;
  const texts = [...svg.querySelectorAll('text')];
  const marks = [...svg.querySelectorAll('.mark')].map(mark => mark.getBoundingClientRect());
  return {
    id: figure.id,
    wanted: Number(figure.dataset.marks),
    drawn: marks.filter(r => r.width > 0 && r.height > 0 && inside(r)).length,
    outside: texts.filter(t => !inside(t.getBoundingClientRect())).map(t => t.textContent),
    smallest: Math.min(...texts.map(t => parseFloat(getComputedStyle(t).fontSize) *
                                         box.width / svg.viewBox.baseVal.width)),
    left: box.left, right: box.right, height: box.height,
  };
})
"""


def find_browser() -> str | None:
    """Path of an installed Chromium, or None."""
    return next((path for name in _BROWSERS if (path := shutil.which(name))), None)


def why_not() -> str | None:
    """Why there is no browser to look with, or None."""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "playwright is not installed: pip install -e '.[browser]'"
    return None if find_browser() else "no Chromium is installed: apt-get install chromium"


@dataclass
class Seen:
    """One page at one width, as the browser saw it.

    errors: of scripts, of the console, and of requests that failed. requests: all that were made.
    """

    width: int
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    scroll_width: int = 0
    figures: list[dict[str, Any]] = field(default_factory=list)
    picture: bytes = b""
    figure_pictures: dict[str, bytes] = field(default_factory=dict)

    def complaints(self) -> list[str]:
        """What is wrong with the page, in words; empty for a good one."""
        found = list(self.errors)
        if self.scroll_width > self.width:
            found.append(f"it scrolls sideways: {self.scroll_width} px on {self.width}")
        if not self.figures:
            found.append("it has no plots")
        for figure in self.figures:
            name = figure["id"]
            if figure["drawn"] != figure["wanted"] or not figure["wanted"]:
                found.append(f"{name} draws {figure['drawn']} of {figure['wanted']} marks")
            if figure["outside"]:
                found.append(f"{name} cuts off {figure['outside']}")
            if figure["smallest"] < 9:
                found.append(f"{name} has text of {figure['smallest']:.1f} px")
            if figure["left"] < 0 or figure["right"] > self.width:
                found.append(f"{name} is wider than the page")
            if colors_of(self.figure_pictures[name]) < 4:
                found.append(f"{name} is blank")
        return found


def colors_of(picture: bytes) -> int:
    """Different colours in a PNG, close ones taken as one."""
    from PIL import Image

    image = Image.open(io.BytesIO(picture)).convert("RGB").quantize(64)
    return len(image.getcolors() or [])


@contextmanager
def open_browser() -> Iterator[Any]:
    """A headless browser for `look`."""
    from playwright.sync_api import sync_playwright

    # Chromium's own sandbox refuses to run as root.
    options = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=options)
        try:
            yield browser
        finally:
            browser.close()


def look(browser: Any, page_path: Path, width: int) -> Seen:
    """Open a page from the disk, without a network, and look at it."""
    seen = Seen(width)
    phone = width < 500
    context = browser.new_context(
        viewport={"width": width, "height": 844 if phone else 900},
        is_mobile=phone,
        has_touch=phone,
        offline=True,
    )
    page = context.new_page()
    page.on("pageerror", lambda error: seen.errors.append(f"script error: {error}"))
    page.on(
        "console",
        lambda message: (
            seen.errors.append(f"console: {message.text}")
            if message.type in ("error", "warning")
            else None
        ),
    )
    page.on("request", lambda request: seen.requests.append(request.url))
    page.on("requestfailed", lambda request: seen.errors.append(f"request failed: {request.url}"))
    page.goto(page_path.resolve().as_uri(), wait_until="load")
    seen.scroll_width = page.evaluate("document.documentElement.scrollWidth")
    seen.figures = page.evaluate(_FIGURES)
    for handle in page.query_selector_all("figure"):
        seen.figure_pictures[handle.get_attribute("id")] = handle.screenshot()
    seen.picture = page.screenshot(full_page=True)
    context.close()
    return seen


def main(page: str, folder: str) -> None:
    """Write a picture a width."""
    from PIL import Image

    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    with open_browser() as browser:
        for width in WIDTHS:
            seen = look(browser, Path(page), width)
            # A palette makes files that are kept a quarter as large.
            image = (
                Image.open(io.BytesIO(seen.picture))
                .convert("RGB")
                .quantize(256, Image.Quantize.MEDIANCUT, kmeans=3)
            )
            image.save(out / f"report_{width}.png", optimize=True)
            print(width, seen.complaints() or "no complaints")


if __name__ == "__main__":
    main(*sys.argv[1:])
