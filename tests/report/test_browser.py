"""Pages looked at in a real headless browser, wide and on a phone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flashhead_dist.report.comparison import compare_runs, comparison_section
from flashhead_dist.report.page import make_report
from flashhead_dist.report.runs import load_runs
from tests.report.browser import WIDTHS, look, open_browser, why_not
from tests.report.run_folders import faster, pipeline_document, write_run

pytest.importorskip("matplotlib")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(why_not() is not None, reason=why_not() or ""),
]
REFERENCE = Path(__file__).parents[2] / "docs" / "reference_run"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The page of the reference run of `make scale`, and that of two runs."""
    folder = tmp_path_factory.mktemp("pages")
    before = write_run(folder / "before", pipeline=pipeline_document())
    runs = load_runs([before, write_run(folder / "after", faster(0.5, "flashhead"))])
    reports = {
        "reference": make_report(load_runs([REFERENCE])),
        "comparison": make_report(runs, [comparison_section(runs, compare_runs(*runs))]),
    }
    for name, report in reports.items():
        (folder / f"{name}.html").write_text(report.html, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in reports}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["reference", "comparison"])
def test_a_page_is_whole(browser: Any, pages: dict[str, Path], name: str, width: int) -> None:
    """No script error, every plot drawn with all its marks and words, no scrolling sideways."""
    seen = look(browser, pages[name], width)
    assert seen.complaints() == []
    assert seen.requests[:1] == [pages[name].as_uri()]
    # The icon is in the page; nothing else is asked for.
    assert all(url.startswith("data:") for url in seen.requests[1:])


def test_a_phone_shows_one_plot_beside_none(browser: Any, pages: dict[str, Path]) -> None:
    seen = look(browser, pages["comparison"], 390)
    lefts = {round(figure["left"]) for figure in seen.figures}
    assert len(lefts) == 1
    wide = look(browser, pages["comparison"], 1280)
    assert len({round(figure["left"]) for figure in wide.figures}) >= 3


SPOILED = {
    "scrolls sideways": ("</main>", '<div style="width: 900px; height: 1px"></div></main>'),
    "script error": ("</main>", "<script>undefined.field</script></main>"),
    "request failed": ("</main>", '<img src="https://example.invalid/plot.png"></main>'),
    "draws": ('class="mark"', 'class="mark" display="none"'),
    "is blank": ("<figure ", '<figure style="opacity: 0" '),
    "has text of": ("<text ", '<text font-size="4" style="font: 4px sans-serif" data-x="" '),
    "cuts off": ("</text>", " and words without end that nobody cuts off but the page</text>"),
}


@pytest.mark.parametrize("complaint", SPOILED)
def test_a_spoiled_page_is_seen(
    browser: Any, pages: dict[str, Path], tmp_path: Path, complaint: str
) -> None:
    """Each way in which a page could be broken is noticed, so that the test above can fail."""
    good, bad = SPOILED[complaint]
    page = tmp_path / "page.html"
    page.write_text(pages["comparison"].read_text().replace(good, bad))
    assert any(complaint in said for said in look(browser, page, 390).complaints())
