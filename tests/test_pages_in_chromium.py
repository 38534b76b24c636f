"""The page in a real browser: it opens without errors and without a connection, in light and dark, and fits a phone."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from results import BENCH, EVALUATION

from headfold.budget.frontier import Point
from headfold.comparison import MethodRow
from headfold.core.groups import Groups
from headfold.core.plan import Plan, SitePlan
from headfold.core.predict import SiteError
from headfold.pages.cards import Card
from headfold.pages.contents import Contents, Continuation, Fold, Front, MethodTable, OutputSample, Served, TextSample
from headfold.pages.writing import write_page

pytest.importorskip("vl_convert", reason="charts need vl-convert-python: pip install 'headfold[report]'")
playwright = pytest.importorskip(
    "playwright.sync_api", reason="a browser is driven by playwright: pip install playwright"
)
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
LONG = "a-name-that-is-as-long-as-those-of-models-tend-to-be-" * 3


def site(groups: tuple[int, ...]) -> SitePlan:
    return SitePlan(Groups(groups), "absorb", 64, SiteError(1.0, 2.0), SiteError(10.0, 10.0))


def contents() -> Contents:
    """Every section, with long names, many heads and many methods."""
    plan = Plan({f"layers.{n}.self": site(tuple(range(8)) * 4) for n in range(6)}, "swap", "f" * 64)
    card = Card(
        "A summary.", [["K/V cache per token", "4 KiB", "1 KiB"]], ["Verified: yes"], (), f"headfold fold {LONG}"
    )
    fold = Fold(Path(LONG), LONG, "text", LONG, card, plan, dict.fromkeys(plan.sites, 2), 1024, 10_000)
    rows = [
        MethodRow(f"method-{n}", heads, 64 * heads, "nll", 2.0, 1.9, 0.1 / (n + 1) / heads, 0.1, 1.0, None, 1, 1)
        for n in range(12)
        for heads in (1, 2, 4)
    ]
    points = [
        Point(f"plan-{n}.json", 1000 * n, {"a": n}, 1 / n, 1 / n if n % 2 else None, n % 3 == 0) for n in range(1, 9)
    ]
    front = Front("front", "front", points, 0.9, None, {"a": {1: 0.5, 2: 0.25}, "b": {1: 0.1, 2: 0.2}})
    sample = TextSample(
        "Once", [" upon", " a", " time"], {LONG: Continuation([" upon", " an", " hour"], 1, 2, [(" a", " an")])}
    )
    words = OutputSample("recording 1 of a folder", "what is said", LONG, {LONG: f"{LONG} and more"})
    served = {LONG: [Served("vLLM", "pip install vllm", f"vllm serve {LONG}")]}
    return Contents([fold], None, [MethodTable(LONG, rows)], [front], [EVALUATION, BENCH], [sample, words], "", served)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "page.html"
    write_page(path, contents(), f"headfold: {LONG}")
    return path.as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine: apt-get install chromium")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 390)])
def test_the_page_opens_and_fits(browser: Any, address: str, scheme: str, width: int) -> None:
    page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    heard: list[str] = []
    page.on("console", lambda message: heard.append(message.text))
    page.on("pageerror", lambda error: heard.append(str(error)))
    page.on("request", lambda request: heard.append(request.url) if request.url != address else None)
    page.goto(address)
    page.wait_for_function("document.documentElement.dataset.drawn === 'true'")
    assert heard == []
    charts = page.evaluate("Object.keys(JSON.parse(document.getElementById('charts').textContent)).length")
    assert charts == page.locator(".chart svg").count() == 6
    assert page.evaluate("document.documentElement.scrollWidth") == width
    light = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0] > 128")
    assert light == (scheme == "light")
    # Marks have the colours of the scheme, and are drawn anew when it changes.
    before = page.locator("#methods-0 svg").inner_html()
    page.emulate_media(color_scheme="dark" if scheme == "light" else "light")
    page.wait_for_function("before => document.querySelector('#methods-0 svg').innerHTML !== before", arg=before)
    assert heard == []
    page.close()


def test_a_click_on_the_legend_shows_one_method_alone(browser: Any, address: str) -> None:
    page = browser.new_page(viewport={"width": 1200, "height": 844})
    page.goto(address)
    page.wait_for_function("document.documentElement.dataset.drawn === 'true'")
    pale = "[...document.querySelectorAll('#methods-0 svg [opacity]')].filter(e => Number(e.getAttribute('opacity')) < 0.2).length"
    assert page.evaluate(pale) == 0
    page.locator("#methods-0 svg .role-legend-label text").first.click()
    page.wait_for_function(f"{pale} > 5")
    page.close()
