"""The page of a report: whole in one file, safe with hostile names, and with plots that are images."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from mixmerge.decision.records import Scores
from mixmerge.errors import OutputError
from mixmerge.evaluate import plots
from mixmerge.evaluate.files import write_text
from mixmerge.evaluate.records import RoutingReport
from mixmerge.evaluate.report import to_html
from mixmerge.evaluate.routing import EvaluationOptions, Scored, evaluate_scores
from mixmerge.outcomes.table import OutcomeTable

HOSTILE = '<script>alert("1")</script>'
FORMULA = r"_$\frac{1}$ & co_"
PNG = b"\x89PNG\r\n\x1a\n"


def report_of(experts: tuple[str, ...], *, name: str = "knn", costs: bool = True) -> RoutingReport:
    rng, number, wide = np.random.default_rng(0), 60, len(experts)
    chance = rng.random((number, wide))
    cost = np.tile(np.arange(1.0, wide + 1), (number, 1)) / 1000 if costs else None
    table = OutcomeTable(
        ids=tuple(f"q{i}" for i in range(number)),
        queries=tuple(f"query {i} {HOSTILE}" for i in range(number)),
        experts=experts,
        score=(rng.random((number, wide)) < chance).astype(np.float64),
        cost=cost,
        metadata={"task": tuple(f"task {i % 3}" for i in range(number))},
    )
    scores = Scores(experts, chance, np.full(chance.shape, 0.1), cost)
    return evaluate_scores(
        [Scored(name, scores, best=(experts[0],) * number), Scored("still", flat(scores), best=None)],
        table,
        EvaluationOptions(resamples=200, against=("query oracle",)),
    )


def flat(scores: Scores) -> Scores:
    mean = np.full(scores.mean.shape, 0.5)
    mean[:, 0] = 0.6
    return Scores(scores.experts, mean, scores.std, scores.cost)


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def page() -> tuple[str, Page]:
    source = to_html(report_of((HOSTILE, FORMULA, "plain"), name=HOSTILE + " router"), title=HOSTILE)
    return source, Page(source)


def test_nothing_comes_from_elsewhere(page: tuple[str, Page]) -> None:
    source, parsed = page
    assert parsed.tags <= {
        *(
            "html",
            "head",
            "meta",
            "title",
            "style",
            "body",
            "h1",
            "h2",
            "p",
            "img",
            "div",
            "table",
            "tr",
            "th",
            "td",
        ),
        *("ul", "li"),
    }
    sources = [value for tag, name, value in parsed.attributes if name in ("src", "href")]
    assert sources
    assert all(value.startswith("data:image/png;base64,") for value in sources)
    assert not [name for _, name, _ in parsed.attributes if name.startswith("on")]
    assert not re.search(r"https?://|@import|url\(", source)
    policy = [value for tag, _, value in parsed.attributes if "default-src" in value]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_images_are_whole(page: tuple[str, Page]) -> None:
    images = [
        base64.b64decode(value.partition(",")[2], validate=True)
        for tag, name, value in page[1].attributes
        if (tag, name) == ("img", "src")
    ]
    assert len(images) == 4  # gains, cost, shares, calibration
    assert all(image.startswith(PNG) and b"IEND" in image[-12:] for image in images)
    assert all(len(image) > 5000 for image in images)


def test_names_are_text(page: tuple[str, Page]) -> None:
    source, parsed = page
    assert "<script" not in source
    assert HOSTILE in parsed.text
    assert FORMULA in parsed.text
    assert "&lt;script&gt;" in source


def test_figures_and_warnings_are_there(page: tuple[str, Page]) -> None:
    text = page[1].text
    assert "still: sends 100.0% of the queries to one expert" in text
    for wanted in (
        "vs best single",
        "AIQ",
        "calibration error",
        "gap to query oracle",
        "vs query oracle",
        "Notes",
    ):
        assert wanted in text


def test_two_experts_have_a_curve_of_calls() -> None:
    source = to_html(report_of(("weak", "strong")))
    parsed = Page(source)
    assert source.count("<img") == 5
    for wanted in ("APGR", "CPT(50%)", "prompt length", "oracle (weak is wrong)"):
        assert wanted in parsed.text


def test_without_costs_and_with_many_experts() -> None:
    report = report_of(tuple(f"expert {i}" for i in range(30)), costs=False)
    assert plots.cost_quality(report) is None
    assert plots.strong_share(report) is None
    source = to_html(report)
    assert source.count("<img") == 3
    assert "AIQ" not in Page(source).text


def test_plots_are_the_same_every_time() -> None:
    report = report_of(("a", "b"))
    assert plots.gains(report) == plots.gains(report)
    assert plots.cost_quality(report) == plots.cost_quality(report)


def test_names_that_fonts_or_formulas_would_break() -> None:
    report = report_of(("\u4e13\u5bb6", "$$", "_hidden", "x" * 300, "tab\tand\x07bell"))
    assert plots.selection(report).startswith(PNG)
    assert "$$" in Page(to_html(report)).text


def test_files(tmp_path: Path) -> None:
    report = report_of(("a", "b"))
    report.write_html(tmp_path / "new" / "report.html", title="Mine")
    written = (tmp_path / "new" / "report.html").read_text(encoding="utf-8")
    assert written.endswith("</html>\n")
    assert "<title>Mine</title>" in written
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["report.html"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_text(tmp_path / "new" / "page", "one", overwrite=False)
    with pytest.raises(OutputError, match="exists already"):
        write_text(tmp_path / "new" / "page", "two", overwrite=False)
    write_text(tmp_path / "new" / "page", "three", overwrite=True)
    assert (tmp_path / "new" / "page").read_text() == "three"
    (tmp_path / "usual").touch()
    assert (tmp_path / "new" / "page").stat().st_mode == (tmp_path / "usual").stat().st_mode
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["page"]
    with pytest.raises(OutputError, match="cannot be written"):
        write_text(tmp_path / "new" / "page" / "inner", "four", overwrite=False)
