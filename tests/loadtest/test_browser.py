"""The report in a real browser, without a network: everything is drawn, and nothing goes wrong."""

import io
import shutil

import pytest
from PIL import Image
from playwright.sync_api import sync_playwright

from loadtest.page import render_page
from tests.loadtest.test_page import make_report

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
SMALLEST_PIXELS = 200
# Axes and labels alone are about one pixel in a hundred.
LEAST_INK = 0.015


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no chromium; `apt-get install chromium` brings one")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def share_of_ink(png):
    """Pixels that have not the most common colour."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    pixels = image.width * image.height
    return 1 - max(count for count, _ in image.getcolors(pixels)) / pixels


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_is_drawn_offline_on_light_and_dark(browser, tmp_path, scheme):
    page_file = tmp_path / "report.html"
    page_file.write_text(render_page(*make_report()))
    context = browser.new_context(
        offline=True, color_scheme=scheme, viewport={"width": 1100, "height": 900}
    )
    page, problems, asked = context.new_page(), [], []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(page_file.as_uri())
    figures = page.locator("figure svg").all()
    assert len(figures) == 6
    for figure in figures:
        box = figure.bounding_box()
        assert min(box["width"], box["height"]) >= SMALLEST_PIXELS
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 1100
        assert share_of_ink(figure.screenshot()) > LEAST_INK
    assert (problems, asked) == ([], [page_file.as_uri()])
    text, paper = (
        page.evaluate(f"getComputedStyle(document.body).{name}")
        for name in ("color", "backgroundColor")
    )
    brightness = [sum(map(int, color.strip("rgba()").split(",")[:3])) for color in (text, paper)]
    assert (brightness[0] < brightness[1]) == (scheme == "light")
    assert abs(brightness[0] - brightness[1]) > 300


def test_the_report_can_be_read_on_a_telephone_and_on_paper(browser, tmp_path):
    page_file = tmp_path / "report.html"
    page_file.write_text(render_page(*make_report()))
    page = browser.new_page(viewport={"width": 390, "height": 800})
    page.goto(page_file.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.emulate_media(media="print", color_scheme="dark")  # nobody prints white on black
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background in ("rgb(255, 255, 255)", "rgba(0, 0, 0, 0)")
