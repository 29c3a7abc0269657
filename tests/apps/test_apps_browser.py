"""The explorer in a real browser: a walk through all pages, hostile tokens, keys, a narrow screen, and latencies."""

from __future__ import annotations

import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from conftest import HOSTILE

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright.expect

CHROMIUM = Path("/usr/bin/chromium")
OPTIONS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
#: A deep link asks for these below its own path first, gets 404, and then asks at the right place.
KNOWN_404 = re.compile(r"/\w+/_stcore/(health|host-config)$")
READY = '[data-testid="stApp"][data-test-script-state="notRunning"]'
REPOSITORY = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"there is no {CHROMIUM}; install Debian's chromium"),
]


@contextmanager
def serving(root: Path) -> Iterator[str]:
    """The address of an explorer of ``root``."""
    command = [sys.executable, "-W", "ignore", "-m", "saelab_explorer", str(root), "--port", "0", "--no-open"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().split()[1].split("?")[0]
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(20)


@pytest.fixture(scope="module")
def site(root: Path) -> Iterator[str]:
    with serving(root) as address:
        yield address


@pytest.fixture(scope="module")
def open_browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Opens a browser with a directory of its own; all are closed at the end."""
    with playwright.sync_playwright() as driver:
        contexts = []

        def launch(width: int = 1440, height: int = 1100, scheme: str = "light") -> Any:
            context = driver.chromium.launch_persistent_context(
                tmp_path_factory.mktemp("chromium"),
                executable_path=str(CHROMIUM),
                args=OPTIONS,
                viewport={"width": width, "height": height},
                color_scheme=scheme,
            )
            contexts.append(context)
            return context

        yield launch
        for context in contexts:
            context.close()


@pytest.fixture(scope="module")
def context(open_browser: Callable[..., Any]) -> Any:
    return open_browser()


@pytest.fixture
def page(context: Any, site: str) -> Iterator[Any]:
    """A page that must not report any problem, of the console or the network, during the test."""
    with watched(context, site) as page:
        yield page


@contextmanager
def watched(context: Any, site: str) -> Iterator[Any]:
    page, problems = context.new_page(), []

    def console(message: Any) -> None:
        allowed = "404" in message.text and KNOWN_404.search(urlsplit(message.location["url"]).path)
        if message.type in ("error", "warning") and not allowed:
            problems.append(f"{message.type}: {message.text}")

    def response(reply: Any) -> None:
        if reply.status >= 400 and not KNOWN_404.search(urlsplit(reply.url).path):
            problems.append(f"{reply.status} for {reply.url}")

    def request(asked: Any) -> None:
        if urlsplit(asked.url).scheme in ("http", "https", "ws") and urlsplit(asked.url).hostname != "127.0.0.1":
            problems.append(f"a request left the machine: {asked.url}")

    page.on("console", console)
    page.on("response", response)
    page.on("request", request)
    page.on("pageerror", lambda error: problems.append(f"exception: {error}"))
    yield page
    assert page.locator('[data-testid="stException"]').count() == 0
    page.close()
    assert problems == []


def go(page: Any, address: str) -> None:
    page.goto(address)
    page.wait_for_selector(".sx-kicker", timeout=60_000)  # the script has begun: before it, it is not running either
    page.wait_for_selector(READY, timeout=60_000)


def address_of(page: Any) -> tuple[str, dict[str, str]]:
    parts = urlsplit(page.url)
    return parts.path, {name: values[0] for name, values in parse_qs(parts.query).items()}


def test_a_reader_walks_from_the_overview_to_a_steered_text(page: Any, site: str):
    go(page, f"{site}?run=small")
    expect(page.get_by_role("heading", name="small", exact=True)).to_be_visible()
    expect(page.get_by_text("Explained variance")).to_be_visible()
    expect(page.locator('[data-testid="stVegaLiteChart"]').first).to_be_visible()

    page.get_by_role("link", name="Features").click()
    page.get_by_label("Search").fill("rope")
    page.get_by_label("Search").press("Enter")
    expect(page.get_by_text("for rope, best match first")).to_be_visible()
    assert address_of(page)[1] == {"run": "small", "q": "rope"}
    page.wait_for_selector(READY)  # until then the rows may be those of before the search

    row = page.locator("tbody tr").first
    feature = row.locator("a").inner_text()
    row.click()
    expect(page.get_by_text(f"Feature {feature}", exact=True)).to_be_visible()
    assert address_of(page) == ("/feature", {"run": "small", "feature": feature})

    page.locator("span.token.peak").first.click()
    expect(page.get_by_text("at position")).to_be_visible()
    page.get_by_role("button", name="Read this text").click()
    expect(page.get_by_role("heading", name="Prompt")).to_be_visible()
    expect(page.get_by_text("on this token")).to_be_visible(timeout=60_000)

    page.get_by_label("Text", exact=True).fill("The old clock measures seven feet of rope.")
    page.get_by_role("button", name="Read features").click()
    expect(page.locator(".strip .text")).to_have_text("The old clock measures seven feet of rope.", use_inner_text=True)
    token = page.locator("span.token").nth(4)
    token.click()
    expect(page.locator("h2 .sx-token").last).to_have_text(token.inner_text().strip(), use_inner_text=True)
    other = page.locator("table").last.locator("tbody tr").nth(1)
    chosen = other.locator("a").inner_text()
    other.locator("td.bar").click()
    expect(page.get_by_role("heading", name=f"Feature {chosen}")).to_be_visible()
    assert address_of(page)[1]["feature"] == chosen
    page.locator("table").last.locator("tr.chosen a").click()
    expect(page.get_by_text(f"Feature {chosen}", exact=True)).to_be_visible()
    assert address_of(page) == ("/feature", {"run": "small", "feature": chosen})

    page.get_by_role("button", name="Steer").click()
    expect(page.get_by_text(f"Steer feature {chosen}", exact=True)).to_be_visible()
    page.get_by_role("button", name="Write both").click()
    expect(page.get_by_text("Right after the prompt")).to_be_visible(timeout=60_000)
    written = page.locator(".sx-answer .text").all_inner_texts()
    assert len(written) == 2
    assert all(len(text) > len("The most important thing about") for text in written)
    assert address_of(page)[1] == {"run": "small", "feature": chosen, "strength": "0.6"}


def test_hostile_tokens_stay_text(page: Any, site: str):
    seen = ""
    for feature in (0, 1, 2, 4):
        go(page, f"{site}feature?run=hostile&feature={feature}")
        expect(page.locator("span.token").first).to_be_visible()
        seen += "".join(page.locator("span.token").all_text_contents())
        page.locator("span.token.peak").first.click()
        page.locator("span.token.peak").first.hover()
        expect(page.get_by_text("at position")).to_be_visible()
    for token in HOSTILE[:4]:
        assert token in seen
    assert "line↵break⇥tab" in seen
    go(page, f"{site}features?run=hostile")
    expect(page.locator("tbody tr").first).to_be_visible()
    assert page.evaluate("window.pwned") is None
    assert page.locator("span.token script, span.token img, table img, table script, .sx-title img").count() == 0


def test_evidence_is_checked_and_saved_as_every_kind_of_file(page: Any, site: str, tmp_path: Path):
    go(page, f"{site}feature?run=small&feature=3")
    page.get_by_role("button", name="Take it away where it fires").click()
    expect(page.get_by_text("Causal check")).to_be_visible()
    expect(page.get_by_text("excerpts", exact=False).last).to_be_visible(timeout=60_000)
    page.get_by_role("button", name="more_horiz").click()
    kinds = {"JSON": b"{", "HTML": b"<!doctype html>", "PNG": b"\x89PNG"}
    for kind, begins in kinds.items():
        with page.expect_download() as download:
            page.get_by_role("button", name=f"Save as {kind}").click()
        file = tmp_path / download.value.suggested_filename
        download.value.save_as(file)
        assert file.name == f"small_feature_3.{kind.lower()}"
        assert file.read_bytes().startswith(begins)
    width, height = (int.from_bytes((tmp_path / "small_feature_3.png").read_bytes()[at : at + 4]) for at in (16, 20))
    assert width == 2480
    assert height > 600


def test_a_hostile_card_becomes_a_picture_in_which_nothing_runs(page: Any, site: str, tmp_path: Path):
    go(page, f"{site}feature?run=hostile&feature=0")
    page.get_by_role("button", name="more_horiz").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Save as PNG").click()
    download.value.save_as(tmp_path / "card.png")
    assert (tmp_path / "card.png").stat().st_size > 20_000
    assert page.evaluate("window.pwned") is None


def test_the_lab_answers_to_the_keyboard_and_its_link_brings_it_back(page: Any, site: str, context: Any):
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    go(page, f"{site}preference?run=small&beta=0.5")
    expect(page.locator('[data-testid="stVegaLiteChart"]')).to_have_count(2, timeout=60_000)
    page.wait_for_selector(READY)
    page.get_by_role("slider").first.focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_text("At beta 0.3")).to_be_visible()
    page.wait_for_function("new URLSearchParams(location.search).get('beta') === '0.3'")
    page.get_by_role("button", name="Copy link").click()
    expect(page.get_by_text("Copied")).to_be_visible()
    link = page.evaluate("navigator.clipboard.readText()")
    go(page, link)
    expect(page.get_by_text("At beta 0.3")).to_be_visible()


def test_two_saes_are_compared_dot_by_dot_and_row_by_row(page: Any, site: str):
    go(page, f"{site}compare?run=small")
    expect(page.locator('[data-testid="stVegaLiteChart"]')).to_have_count(2, timeout=60_000)
    page.locator("tbody tr").nth(1).locator("td.bar").click()
    expect(page.get_by_text("and its nearest", exact=False).first).to_be_visible()
    feature = address_of(page)[1]["feature"]
    dots = page.locator('[data-testid="stVegaLiteChart"]').nth(1).locator("path[aria-roledescription=circle]")
    told = [re.search(r"small: (\d+)", text) for text in dots.evaluate_all(LABELS)]
    assert len(told) > 10
    chosen = next(i for i in reversed(range(len(told))) if told[i][1] != feature)
    dots.nth(chosen).dispatch_event("click")
    page.wait_for_function("old => new URLSearchParams(location.search).get('feature') !== old", arg=feature)
    page.get_by_text("Open feature").last.click()
    expect(page.get_by_role("button", name="Next")).to_be_visible()
    assert address_of(page)[1]["run"] == "twin"


def test_two_trainings_are_laid_over_each_other(page: Any, site: str):
    go(page, f"{site}runs?run=small&log=small/sae&log=twin/sae")
    expect(page.get_by_text("What sets them apart")).to_be_visible()
    expect(page.get_by_role("cell", name="seed", exact=True)).to_be_visible()
    expect(page.locator('[data-testid="stVegaLiteChart"]')).to_have_count(4)


def test_two_texts_are_read_side_by_side(page: Any, site: str):
    go(page, f"{site}prompt?run=small&two=1")
    expect(page.locator(".strip .text")).to_have_count(2, timeout=60_000)
    page.get_by_label("Second text", exact=True).fill("A green frog paints the winter sea.")
    page.get_by_role("button", name="Read features").click()
    expect(page.locator(".strip .text").last).to_have_text("A green frog paints the winter sea.", use_inner_text=True)


LABELS = "dots => dots.map(dot => dot.getAttribute('aria-label'))"


def test_a_dot_of_the_overview_opens_its_feature(page: Any, site: str):
    go(page, f"{site}?run=indexed")
    chart = page.locator('[data-testid="stVegaLiteChart"]').nth(1)
    expect(chart).to_be_visible()
    dots = chart.locator("path[aria-roledescription=circle]")
    told = [re.search(r"max: ([\d.]+); feature: (\d+)", text) for text in dots.evaluate_all(LABELS)]
    strongest = max(range(len(told)), key=lambda i: float(told[i][1]))  # at the upper edge, where no other covers it
    dots.nth(strongest).click()
    expect(page.get_by_role("button", name="Next")).to_be_visible()
    assert address_of(page) == ("/feature", {"run": "indexed", "feature": told[strongest][2]})


def test_keys_move_between_features_but_not_out_of_a_text_field(page: Any, site: str):
    go(page, f"{site}feature?run=indexed&feature=10")
    expect(page.get_by_role("button", name="Next")).to_be_visible()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_text("Feature 11", exact=True)).to_be_visible()
    page.keyboard.press("ArrowLeft")
    expect(page.get_by_text("Feature 10", exact=True)).to_be_visible()
    peak = page.locator("span.token.peak").first
    peak.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    expect(page.get_by_text("at position")).to_be_visible()
    assert address_of(page)[1]["feature"] == "10"
    go(page, f"{site}features?run=indexed&q=word")
    page.get_by_label("Search").press("ArrowRight")
    page.wait_for_timeout(400)
    assert "page" not in address_of(page)[1]


def test_another_run_is_chosen_in_the_sidebar(page: Any, site: str):
    go(page, f"{site}feature?run=indexed&feature=100")
    page.get_by_label("Run").click()
    page.get_by_role("option", name="small").click()
    expect(page.get_by_label("Run")).to_have_value("small")
    expect(page.get_by_text("Feature 100", exact=True)).to_be_hidden()
    assert address_of(page)[1]["run"] == "small"


NEW = ("compare?second=twin&feature=3", "runs?log=small/sae&log=twin/sae", "preference")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_fits_a_narrow_screen_in_both_themes(open_browser: Callable[..., Any], site: str, scheme: str):
    with watched(open_browser(420, 900, scheme), site) as page:
        for path in ("", "features", "feature", "prompt", "prompt?two=1", *NEW, "steer"):
            go(page, f"{site}{path}{'&' if '?' in path else '?'}run=small")
            page.wait_for_timeout(500)
            too_wide = page.evaluate(
                """() => [...document.querySelectorAll('[data-testid="stMainBlockContainer"] *')]
                    .filter(e => e.tagName !== 'INPUT' && e.getBoundingClientRect().right > innerWidth + 1
                        && !e.closest('.sx-scroll, [data-testid="stButtonGroup"], .sx-space'))
                    .map(e => e.outerHTML.slice(0, 120))"""
            )
            assert too_wide == [], path
            ground = page.evaluate("getComputedStyle(document.querySelector('.stApp')).backgroundColor")
            assert ground == {"light": "rgb(253, 252, 250)", "dark": "rgb(23, 24, 27)"}[scheme]
            if folder := os.environ.get("SAELAB_SCREENSHOTS"):
                name = re.sub(r"\W+", "_", path or "overview")
                page.screenshot(path=Path(folder) / f"{name}_{scheme}_narrow.png", full_page=True)


def test_a_feature_page_comes_within_a_second(page: Any, site: str):
    assert statistics.median(feature_seconds(page, site, "small")) < 1


def test_a_prompt_of_64_tokens_is_read_within_two_seconds(page: Any, site: str):
    assert statistics.median(prompt_seconds(page, site, "small")) < 2


@pytest.mark.demo
def test_the_demo_run_keeps_the_same_times(context: Any):
    if not (REPOSITORY / "runs" / "demo" / "index" / "DONE").exists():
        pytest.skip("there is no runs/demo; make demo builds it")
    with serving(REPOSITORY / "runs") as site, watched(context, site) as page:
        assert statistics.median(feature_seconds(page, site, "demo")) < 1
        assert statistics.median(prompt_seconds(page, site, "demo")) < 2


#: 64 tokens or more for every tokenizer.
PROMPT = (
    "The lighthouse keeper measures seven feet of rope while the old clock counts the hours of a winter night. "
    "Every sailor who paints the red door forgets a letter from Paris, and two inches of snow lie on the sea wall. "
    "In the morning my neighbour watches the harbour, drinks her coffee, and writes down what the wind has said to her."
)


def feature_seconds(page: Any, site: str, run: str) -> list[float]:
    """From a click on Next to the next feature's heading and tokens, seven times."""
    go(page, f"{site}feature?run={run}&feature=1")
    times = []
    for feature in range(2, 9):
        start = time.perf_counter()
        page.get_by_role("button", name="Next").click()
        page.get_by_text(f"Feature {feature}", exact=True).wait_for()
        times.append(time.perf_counter() - start)
        page.wait_for_selector(READY)
    return times


def prompt_seconds(page: Any, site: str, run: str) -> list[float]:
    """From a click on the button to the coloured text, five times, the model being loaded."""
    go(page, f"{site}prompt?run={run}")
    page.locator("span.token").first.wait_for(timeout=120_000)
    times = []
    for n in range(5):
        page.get_by_label("Text", exact=True).fill(f"{n} {PROMPT}")
        start = time.perf_counter()
        page.get_by_role("button", name="Read features").click()
        page.locator(".strip .text", has_text=re.compile(rf"^{n} The lighthouse")).wait_for()
        times.append(time.perf_counter() - start)
        page.wait_for_selector(READY)
    return times
