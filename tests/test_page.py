"""report.html: what is in it, and in a browser that sorting, filtering, hover and the charts work."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from src.records import Record
from src.report import meanings, page
from src.report.page.charts import specs
from tests.cells import cell, failed, pair

WHY = "members_left_out"


def many() -> list[Record]:
    cells = [
        r
        for defense in ("none", "vae", "jpeg")
        for attack in ("fgsm", "pgd")
        for eps in (0.1, 0.2, float("inf"))
        for r in pair(eps, defense=defense, attack=attack, defense_ms_per_image=0.1)
    ]
    cells[0] = cells[0].model_copy(update={"flags": [WHY]})
    low = cell(0.3, right=7, defense="vae", attack="pgd", stages={"classifier": "c0ffee"})
    return [*cells, low, failed(eps=0.4, reason="it </script> broke & burned")]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from matplotlib.image import imsave

    folder = tmp_path_factory.mktemp("page")
    imsave(folder / "pictures_x.png", [[[0.0, 0.5, 1.0]]])
    return page.write_page(many(), folder / "report.html", [folder / "pictures_x.png"])


def content(path: Path) -> dict[str, Any]:
    (found,) = re.findall(r'<script type="application/json" id="content">(.*?)</script>', path.read_text(), re.DOTALL)
    return json.loads(found, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_the_page_holds_every_cell_and_fetches_nothing(path: Path) -> None:
    found = content(path)
    assert [row["key"] for row in found["rows"]] == [r.key for r in sorted(many(), key=page.store.order)]
    assert all(len(row["c"]) == len(page.COLUMNS) for row in found["rows"])
    (row,) = [row for row in found["rows"] if row["failed"]]
    assert row["why"] == "it </script> broke & burned"
    text = path.read_text()
    assert "default-src 'none'" in text
    page_itself = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)  # libraries hold HTML as text
    assert not re.findall(r"<(?:script|img|link|iframe)[^>]+(?:src|href)=(?!\"?data:)", page_itself)


def test_each_flag_is_explained_and_each_cell_has_its_command(path: Path) -> None:
    found = content(path)
    assert found["flags"] == {WHY: meanings.explain(WHY)}
    assert "need gradients" in meanings.explain(WHY)
    assert all(row["command"].startswith("python -m src.train ") for row in found["rows"])


def test_flags_are_explained_from_the_page_of_checks(tmp_path: Path) -> None:
    checks = tmp_path / "checks.md"
    checks.write_text("# Checks\n\n### `few_images`\n\nRaised if *few*.\n\n### `odd` (decisive)\nOdd.\n## End\nx\n")
    assert meanings._sections(checks) == {"few_images": "Raised if few.", "odd": "Odd."}
    assert meanings.explain("never_heard_of").startswith("Raised by a sanity check")


def twins() -> list[Record]:
    """Two sweeps of one name, between which the classifier was trained again, with a cell measured twice."""
    stages = [{"data": "d", "classifier": key, "defense": key} for key in ("c0ffee", "decade")]
    cells = [r for made in stages for eps in (0.1, 0.2) for r in pair(eps, stages=made, key="")]
    cells += pair(0.2, stages=stages[1], key="")
    return [r.model_copy(update={"key": f"{place}"}) for place, r in enumerate(cells)]


def test_cells_of_other_weights_are_on_another_line(tmp_path: Path) -> None:
    rows = content(page.write_page(twins(), tmp_path / "report.html"))["rows"]
    lines: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        access = row["c"][[name for name, *_ in page.COLUMNS].index("access")]
        lines.setdefault((access, row["made"]), []).append(row["eps"])
    two, one = ["0.1", "0.2"], ["0.2"]
    assert sorted(lines.values()) == [two, two, two, two, one, one]
    assert {made for access, made in lines if access == "gray_box"} == {made for _, made in lines}, "they are pairs"


def test_no_line_joins_two_sweeps(tmp_path: Path) -> None:
    """By the page's own script, as far as it needs no page."""
    if (node := shutil.which("node")) is None:
        pytest.skip("the lines of report.html were NOT tried: no node here")
    cells = json.dumps(content(page.write_page(twins(), tmp_path / "report.html")))
    around = """const at = Object.fromEntries(content.columns.map((column, place) => [column.name, place]));
    const value = (row, name) => row.c[at[name]], hidden = new Set(), percent = String, figure = String;"""
    script = (Path(page.__file__).parent / "page.js").read_text()
    functions = script[script.index("function wilson") : script.index("const select")]
    said = "console.log(JSON.stringify(lines(content.rows).points.map((point) => [point.path, point.x])));"
    done = subprocess.run(
        [node], input=f"const content = {cells};{around}{functions}{said}", capture_output=True, text=True, check=True
    )
    points = [tuple(point) for point in json.loads(done.stdout)]
    assert len(points) == 10 + 6, "each line starts at the clean accuracy"
    assert len(set(points)) == len(points), "and has one value an eps"


@pytest.mark.parametrize("name", list(specs([])))
def test_each_chart_compiles(name: str) -> None:
    import vl_convert

    spec = specs(["gray_box", "white_box"])[name]
    assert vl_convert.vegalite_to_vega(spec)["marks"]


# --- in a browser -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    names = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    playwright = pytest.importorskip("playwright.sync_api", reason="report.html was not tried in a browser: playwright")
    with playwright.sync_playwright() as driver:
        own = Path(driver.chromium.executable_path)
        if found is None and not own.exists():
            pytest.skip("report.html was NOT tried in a browser: no chromium here (`playwright install chromium`)")
        started = driver.chromium.launch(executable_path=found or str(own), args=["--no-sandbox"])
        yield started
        started.close()


def shown(sheet: Any, column: str) -> list[str]:
    script = """name => {
      const heads = [...document.querySelectorAll('#cells thead tr:first-child th')];
      const place = heads.findIndex(head => head.innerText.trim() === name);
      const rows = [...document.querySelectorAll('#cells tbody tr[data-key]')];
      return rows.map(row => row.children[place].innerText);
    }"""
    return sheet.evaluate(script, column)


def drawn(sheet: Any, count: int) -> None:
    sheet.wait_for_selector(f"body[data-drawn='{count}']", timeout=60_000)


@pytest.mark.slow
@pytest.mark.parametrize("width", [1600, 420])
def test_in_a_browser(browser: Any, path: Path, width: int) -> None:
    sheet = browser.new_context(viewport={"width": width, "height": 900}).new_page()
    wrong: list[str] = []
    asked: list[str] = []
    sheet.on("pageerror", lambda error: wrong.append(str(error)))
    sheet.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    sheet.on("request", lambda request: asked.append(request.url[:30]))
    sheet.goto(path.as_uri())
    drawn(sheet, len(many()) - 1)
    assert sheet.evaluate("document.documentElement.scrollWidth") <= width, "only the table scrolls sideways"

    head = sheet.locator("#cells thead tr:first-child th", has_text="robust")
    head.click()
    first = [float(text.split()[0]) for text in shown(sheet, "robust") if text != "failed"]
    assert first == sorted(first)
    assert first[0] == 7.0
    assert "95.0 [88.8, 97.8]" in shown(sheet, "clean")
    head.click()
    assert float(shown(sheet, "robust")[0].split()[0]) == 60.0

    sheet.select_option("select[data-column=defense]", "vae")
    sheet.select_option("select[data-column=eps]", "inf")
    drawn(sheet, 4)
    assert set(shown(sheet, "defense")) == {"vae"}
    sheet.fill("input[data-column=robust]", "> 50")
    drawn(sheet, 2)
    assert all(text.startswith("60.0") for text in shown(sheet, "robust"))
    for field in ("defense", "eps"):
        sheet.select_option(f"select[data-column={field}]", "")
    sheet.fill("input[data-column=robust]", "")
    sheet.fill("input[type=search]", "members_left")
    drawn(sheet, 1)

    sheet.locator("tbody .flag").hover()
    assert sheet.locator("#tip").inner_text() == meanings.explain(WHY)
    sheet.locator("tbody tr[data-key] td").first.click()
    said = sheet.locator(".detail code").first.inner_text()
    assert said == next(row["command"] for row in content(path)["rows"] if row["c"][-1] == [WHY])
    sheet.fill("input[type=search]", "")
    drawn(sheet, len(many()) - 1)

    canvas = sheet.locator("#curves canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    # Where the points are is the chart's affair: try the right end, where the last radius stands.
    places = [(x, y) for x in range(int(box["width"]) - 4, int(0.93 * box["width"]), -6) for y in range(60, 420, 6)]
    for x, y in places:
        sheet.mouse.move(box["x"] + x, box["y"] + y)
        if sheet.locator("#vg-tooltip-element.visible").count():
            break
    assert "images" in sheet.locator("#vg-tooltip-element").inner_text()
    assert wrong == []
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []


@pytest.mark.slow
def test_an_unreliable_cell_in_a_browser(browser: Any, tmp_path: Path) -> None:
    cells = [r for eps in (0.1, 0.2) for r in pair(eps, defense_ms_per_image=1.0, defense_memory_mib=2.0)]
    cells[3] = cells[3].model_copy(update={"flags": ["gradient_missing"]})
    sheet = browser.new_page()
    wrong: list[str] = []
    sheet.on("pageerror", lambda error: wrong.append(str(error)))
    sheet.goto(page.write_page(cells, tmp_path / "report.html").as_uri())
    drawn(sheet, 4)
    assert shown(sheet, "robust")[3] == "unreliable"
    assert [text == "25.0" for text in shown(sheet, "gap")] == [True, True, False, False]
    sheet.locator("td .unreliable").hover()
    assert sheet.locator("#tip").inner_text().startswith("gradient_missing: ")
    sheet.wait_for_function("document.getElementById('left-out').textContent.includes('1 unreliable cell.')")
    assert "Hollow, not joined: unreliable" in sheet.locator("#curves-caption").inner_text()
    assert sheet.locator("#cost-memory").inner_text() == "Memory: 2 MiB."
    sheet.fill("input[data-column=robust]", "> 1")
    drawn(sheet, 3)
    sheet.fill("input[data-column=robust]", "")
    sheet.fill("input[type=search]", "unreliable")
    drawn(sheet, 1)
    assert wrong == []


@pytest.mark.slow
def test_unreliable_and_failed_are_shown_where_no_cell_has_a_figure(browser: Any, tmp_path: Path) -> None:
    cells = [r.model_copy(update={"flags": ["gradient_missing"]}) for r in pair()]
    sheet = browser.new_page()
    sheet.goto(page.write_page([*cells, failed(eps=0.2)], tmp_path / "report.html").as_uri())
    drawn(sheet, 2)
    assert sorted(shown(sheet, "robust")) == ["failed", "unreliable", "unreliable"]


@pytest.mark.slow
def test_ten_thousand_records_in_a_browser(browser: Any, tmp_path: Path) -> None:
    cells = [r.model_copy(update={"key": f"{seed}-{r.key}", "seed": seed}) for seed in range(270) for r in many()[:-1]]
    sheet = browser.new_page()
    sheet.goto(page.write_page(cells, tmp_path / "report.html").as_uri())
    drawn(sheet, len(cells))
    assert len(cells) > 9_900
    assert "9,990 rows" in sheet.locator(".dt-info").inner_text()
    sheet.fill("input[data-column=seed]", "3..4")
    drawn(sheet, 74)


def test_the_gap_stands_at_the_two_cells_that_it_is_of() -> None:
    cells = [*pair(), cell(access="black_box", key="b")]
    assert page._gaps(cells) == [25.0, 25.0, None]
