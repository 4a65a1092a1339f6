"""The page and the Markdown: complete, escaped, and self-contained."""

from __future__ import annotations

import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from reporting import measured, write_run

from lightning_gradnorm.experiments.report.charts import Point, Series, line_chart, point_chart
from lightning_gradnorm.experiments.report.collect import collect
from lightning_gradnorm.experiments.report.comparison import compare
from lightning_gradnorm.experiments.report.markdown import markdown
from lightning_gradnorm.experiments.report.page import page
from lightning_gradnorm.experiments.report.svg import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    STYLES,
    TOP,
    WIDTH,
    Axis,
    dash,
    marker,
    tick_label,
)

EVIL = "<script>alert('x')</script> & \"|` [a](b)"
VOID = {"meta", "link"}


class Parsed(HTMLParser):
    """Tags, attributes and text of a page; checks that every tag is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def written(folder: Path) -> tuple[str, str]:
    comparison = compare(collect([folder]))
    return page(comparison, f"by {EVIL}"), markdown(comparison, f"by {EVIL}")


def curves(task: str, seed: int) -> list[dict[str, float | str]]:
    return [
        {
            "epoch": step // 10,
            "step": step,
            f"val/rmse/{task}": 1 + 1 / (step + 1 + seed),
            f"train/loss/{task}": 2.0 / (step + 1),
            f"gradnorm/weight/{task}": 1.0,
            f"gradnorm/grad_norm/{task}": 0.5 + seed,
        }
        for step in range(0, 50, 10)
    ]


@pytest.fixture
def study(tmp_path: Path) -> Path:
    for seed in range(3):
        for balancing in ("equal", "gradnorm"):
            metrics = measured(1.0 + 0.1 * seed, 0.5 + 0.01 * seed * (balancing == "equal"))
            weights = {"weights": {"depth": 1.2, "seg": 0.8}}
            write_run(
                tmp_path / f"{balancing}{seed}", balancing, seed, metrics, logged=curves("depth", seed), weights=weights
            )
    write_run(tmp_path / "unfinished", "gradnorm", 3, logged=curves("depth", 3))
    return tmp_path


def test_the_page_is_whole_and_loads_nothing(study: Path) -> None:
    html, _ = written(study)
    parsed = Parsed(html)
    assert not {"script", "img", "iframe", "object", "embed", "base", "form", "image", "use", "a"} & set(parsed.tags)
    assert not re.search(r"https?:|//|@import|url\(", html)
    assert [value for name, value in parsed.attributes if name in ("src", "href", "srcset", "action", "style")] == [
        "data:,"
    ]
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'; img-src data:") in parsed.attributes
    for title in (
        "Results",
        "Differences from equal",
        "Metrics during training",
        "Gradient norms",
        "Loss ratios",
        "Pairs of tasks",
    ):
        assert title in parsed.text
    assert parsed.tags.count("h1") == 1


def test_every_chart_is_well_formed_and_labeled(study: Path) -> None:
    html, _ = written(study)
    charts = re.findall(r'<svg(?=[^>]*class="chart").*?</svg>', html, flags=re.DOTALL)
    assert len(charts) >= 6
    for chart in charts:
        root = ElementTree.fromstring(chart)
        title = root.find("title")
        assert title is not None
        assert title.text
        for line in root.iter("polyline"):
            for place in line.attrib["points"].split():
                x, y = map(float, place.split(","))
                assert LEFT <= x <= WIDTH - RIGHT
                assert TOP - 1 <= y <= HEIGHT - BOTTOM + 1


def test_names_and_values_of_runs_are_escaped(tmp_path: Path) -> None:
    for seed, balancing in ((0, "equal"), (0, "gradnorm"), (1, "equal")):
        rows = curves(EVIL.replace('"', "'").replace(",", ""), seed)
        metrics = {f"test/rmse/{EVIL}": 1.0 + seed, f"test/{EVIL}/depth": 2.0}
        at = tmp_path / EVIL.replace("/", "") / f"{balancing}{seed}"
        weights = {"weights": {EVIL: 1.0, "depth": 1.0}}
        write_run(
            at,
            balancing,
            seed,
            metrics,
            tasks=[EVIL, "depth"],
            logged=rows,
            weights=weights,
            model__optimizer__lr=EVIL * (seed + 1),
        )
    failed = write_run(tmp_path / "failed", "gradnorm", 0, tasks=[EVIL, "depth"])
    (failed / "failure.json").write_text(json.dumps({"error": EVIL}))
    (failed / ".hydra/hydra.yaml").write_text(f"hydra: {{runtime: {{choices: {{balancing: {json.dumps(EVIL)}}}}}}}")
    html, text = written(tmp_path)
    parsed = Parsed(html)
    assert "script" not in parsed.tags
    assert "alert('x')" in parsed.text
    assert not re.search(r"<script", html, flags=re.IGNORECASE)
    assert "<script" not in text
    assert "](b)" not in text.replace("\\]", "")
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("| method")}
    for block in text.split("\n\n"):  # no cell was split by a name
        lines = [line for line in block.splitlines() if line.startswith("|")]
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) <= 1
    assert widths


def test_markdown_has_the_same_tables(study: Path) -> None:
    html, text = written(study)
    table = [line for line in text.splitlines() if line.startswith("| gradnorm | 3 of 4 |")]
    assert len(table) == 1
    numbers = re.findall(r"\d+\.\d+", table[0])
    cells = re.findall(r"<td>(.*?)</td>", html.partition(">gradnorm</th>")[2].partition("</tr>")[0])
    assert [number for cell in cells for number in re.findall(r"\d+\.\d+", cell)] == numbers
    assert "1.10 ± 0.10" in table[0]
    assert "| unfinished | gradnorm | 3 | unfinished | step 41, epoch 5 of 4 |" in text


def test_too_few_seeds_are_reported_as_text(tmp_path: Path) -> None:
    for name in ("equal", "gradnorm"):
        write_run(tmp_path / name, name, metrics=measured(1, 0.5))
    _, text = written(tmp_path)
    assert "With fewer than 5 seeds in common, nothing is called significant and no p value is shown" in text


def test_runs_without_any_result_make_a_page_all_the_same(tmp_path: Path) -> None:
    write_run(tmp_path / "a", logged=curves("depth", 0))
    write_run(tmp_path / "b", "gradnorm")
    html, text = written(tmp_path)
    assert "there are no results" in text
    assert "Metrics during training" in html


def test_numbers_that_are_not_finite_are_reported_but_not_drawn(tmp_path: Path) -> None:
    rows: list[dict[str, float | str]] = [{"step": 0, "val/rmse/depth": "nan", "train/loss/depth": "inf"}]
    for seed in range(2):
        write_run(tmp_path / f"e{seed}", seed=seed, metrics=measured(1 + seed, 0.5))
        write_run(tmp_path / f"g{seed}", "gradnorm", seed, measured(float("nan"), 0.6), logged=rows)
    html, text = written(tmp_path)
    assert "not finite" in text
    assert not re.search(r'="[^"]*(nan|inf)\b', html)


def test_any_content_of_the_files_gives_a_page_or_a_clear_error(study: Path) -> None:
    draw = random.Random(0)
    files = sorted(file for file in study.rglob("*") if file.suffix in (".json", ".yaml", ".csv"))
    written_first = {file: file.read_bytes() for file in files}
    outcomes = set()
    for _ in range(60):
        hit = draw.sample(files, 3)
        for file in hit:
            file.write_bytes(damaged(written_first[file], draw))
        try:
            written(study)
            outcomes.add("page")
        except ValueError as error:
            outcomes.add("sentence" if "cannot be compared" in str(error) else str(error))
        for file in hit:
            file.write_bytes(written_first[file])
    assert outcomes == {"page", "sentence"}


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Return the content cut off, with other bytes in it, or with other values in its mapping."""
    kind = draw.randrange(4)
    if kind == 0:
        return content[: draw.randrange(len(content))]
    if kind == 1:
        place = draw.randrange(len(content))
        return content[:place] + draw.randbytes(5) + content[place + 5 :]
    tree = yaml.safe_load(content) if kind == 2 else None
    if not isinstance(tree, dict):
        return draw.choice(
            [b"", b"null", b"[]", b"3", b"seed: [1]\nbalancing: 3\ndata: x\nmodel: 1\ntrainer: 2\ntasks: {a: 1}"]
        )
    strange = [None, 3, "<b>", [], [1, {"a": 2}], {}, {"q": {"r": 1}}, float("nan"), 1e308]
    places = [tree, *(branch for branch in tree.values() if isinstance(branch, dict) and branch)]
    for branch in draw.sample(places, min(2, len(places))):
        branch[draw.choice(list(branch))] = draw.choice(strange)
    return json.dumps(tree).encode()


# ---- charts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log", [False, True])
def test_a_line_can_be_read_off_the_numbers_beside_it(log: bool) -> None:
    values = [0.31, 0.8, 12.0, 2.5, 0.05]
    chart = line_chart(
        "t", [Series("a", 0, [Point(10 * i, v, v, v) for i, v in enumerate(values)])], x_name="x", log=log
    )
    root = ElementTree.fromstring(chart)
    bottom = HEIGHT - BOTTOM
    ticks = [
        (float(t.attrib["y"]) - 4, float(t.text or 0))
        for t in root.iter("text")
        if float(t.attrib["y"]) < bottom + 5 and t.attrib["class"] == "tick end"
    ]
    (y0, v0), (y1, v1) = ticks[0], ticks[-1]
    if log:
        v0, v1 = math.log10(v0), math.log10(v1)
    (line,) = root.iter("polyline")
    for place, value in zip(line.attrib["points"].split(), values, strict=True):
        read = v0 + (float(place.split(",")[1]) - y0) / (y1 - y0) * (v1 - v0)
        assert read == pytest.approx(math.log10(value) if log else value, abs=0.02 * abs(v1 - v0))


def test_the_first_styles_differ_in_color_dashes_and_marker() -> None:
    first = range(STYLES)
    assert len({dash(number) for number in first}) == STYLES
    shapes = {re.search(r' d="([^"]*)"', marker(number, 0, 0)).group(1) for number in first}  # type: ignore[union-attr]
    assert len(shapes) == STYLES
    # A color that comes again comes with another pattern.
    assert all((dash(number), number % STYLES) != (dash(number + STYLES), number % STYLES) for number in first)


@pytest.mark.parametrize(
    "values", [[], [1.0], [0.0, 0.0], [1e-30, 1e30], [-5.0, -4.0], [3.0, float("nan"), float("inf")]]
)
@pytest.mark.parametrize("log", [False, True])
def test_axes_have_a_few_round_ticks_for_any_values(values: list[float], log: bool) -> None:
    axis = Axis.around(values, 0, 100, log=log)
    assert 1 <= len(axis.ticks()) <= 12
    for tick in axis.ticks():
        assert -0.01 <= axis(tick) <= 100.01
        assert len(tick_label(tick)) <= 7


def test_points_without_a_place_are_left_out() -> None:
    points = [Point(0, 1, 1, 1), Point(1, float("nan"), 0, 0), Point(2, 3, float("-inf"), 4)]
    assert point_chart("t", [Series("a", 0, points)], x_name="x", y_name="y").count('class="mark') == 2
    assert line_chart("t", [Series("a", 0, [Point(0, -1, -1, -1)])], x_name="x", log=True).count("<polyline") == 0
