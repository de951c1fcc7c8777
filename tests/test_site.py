"""The documentation in a real browser: it builds, finds what is searched, complains of nothing and fits the screen."""

import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.documentation import ROOT

pytestmark = pytest.mark.site

PHONE, DESKTOP = (390, 844), (1280, 900)
SMALLEST_WORDS = 9
"""Pixels of the height of a figure's words of 11 points, as shown."""

TERMINAL_WORDS = 14
"""Pixels of a recording's words in its own size."""

OVERFLOWING = """
const width = document.documentElement.clientWidth, found = [];
const scrolls = (e) => { for (e = e.parentElement; e && e !== document.body; e = e.parentElement) {
    if (getComputedStyle(e).overflowX !== 'visible') return true; } return false; };
for (const e of document.querySelectorAll('.md-content *')) {
    const box = e.getBoundingClientRect();
    if (box.width && box.right > width + 1 && !scrolls(e))
        found.push(e.tagName + ' ' + e.className + ': ' + e.textContent.slice(0, 60));
}
const whole = document.documentElement.scrollWidth;
if (whole > width) found.push('the page itself is ' + whole + ' wide');
return found;
"""
CUT = """
return [...document.querySelectorAll('.md-content pre > code, .md-content .md-typeset__scrollwrap')]
    .filter((e) => e.scrollWidth > e.clientWidth + 1)
    .map((e) => `${e.scrollWidth} in ${e.clientWidth} pixels: ${e.textContent.trim().slice(0, 60)}`);
"""
WRAPPED = """
const lines = (cell) => { const range = document.createRange(); range.selectNodeContents(cell);
    return new Set([...range.getClientRects()].map((box) => Math.round(box.top))).size; };
return [...document.querySelectorAll('.md-content .measured table')]
    .map((table) => [...table.querySelectorAll('td:first-child')])
    .filter((names) => names.every((e) => e.textContent.trim().length <= 20))
    .flat().filter((e) => lines(e) > 1).map((e) => e.textContent.trim());
"""
FIGURES = """
return [...document.querySelectorAll('.md-content img')].filter((e) => e.offsetParent !== null)
    .map((e) => ({name: e.src.split('/').slice(-2).join('/'), shown: e.getBoundingClientRect().width,
        natural: e.naturalWidth}));
"""
FOREIGN = (
    "return performance.getEntriesByType('resource').map((e) => e.name).filter((n) => !n.startsWith(location.origin));"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site: ``$QUANTCACHE_SITE``, or built here, strictly."""
    if given := os.environ.get("QUANTCACHE_SITE"):
        return Path(given).resolve()
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> list[str]:
    """Addresses of all pages below the root."""
    found = [str(page.parent.relative_to(site)) for page in sorted(site.rglob("index.html"))]
    return ["" if page == "." else f"{page}/" for page in found]


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module", params=["light", "dark"])
def browser(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Chromium of a reader who prefers light or dark; one each, since the theme remembers what it chose."""
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no Chromium with its driver; on Debian: apt-get install chromium chromium-driver")
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(argument)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    running = selenium.Chrome(options=options, service=selenium.ChromeService(driver))
    running.set_page_load_timeout(60)
    running.scheme = request.param
    preference = {"features": [{"name": "prefers-color-scheme", "value": request.param}]}
    running.execute_cdp_cmd("Emulation.setEmulatedMedia", preference)
    yield running
    running.quit()


def resize(browser: Any, size: tuple[int, int]) -> None:
    """Set the screen's size in CSS pixels."""
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def test_the_site_has_the_pages_of_the_navigation(pages: list[str]) -> None:
    wanted = {"", "getting-started/", "how-it-works/", "compared/", "benchmarks/", "reference/cache/", "glossary/"}
    assert wanted | {"changelog/", "contributing/", "supported/"} <= set(pages)


@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_every_page_fits_and_complains_of_nothing(
    browser: Any, address: str, pages: list[str], size: tuple[int, int]
) -> None:
    scheme = browser.scheme
    resize(browser, size)
    browser.get_log("browser")
    shots = os.environ.get("QUANTCACHE_SCREENSHOTS")
    for page in pages:
        browser.get(address + page)
        shown = browser.execute_script("return document.body.dataset.mdColorScheme")
        assert shown == {"light": "default", "dark": "slate"}[scheme], f"{page} is {shown}"
        wrong = browser.execute_script(OVERFLOWING)
        assert not wrong, f"{page} at {size[0]} pixels: {wrong}"
        if size == DESKTOP:
            cut = browser.execute_script(CUT)
            assert not cut, f"{page}: code or a table is cut: {cut}"
            wrapped = browser.execute_script(WRAPPED)
            assert not wrapped, f"{page}: names of rows are wrapped: {wrapped}"
        for figure in browser.execute_script(FIGURES):
            assert figure["natural"], f"{page}: {figure['name']} is not shown"
            terminal = figure["name"].startswith("recordings/")  # dark on both
            suits = terminal or figure["name"].split("#")[0].endswith(f"-{scheme}.svg")
            assert suits, f"{page}: {figure['name']} on {scheme}"
            words = (TERMINAL_WORDS if terminal else 11 * 96 / 72) * figure["shown"] / figure["natural"]
            assert words >= SMALLEST_WORDS, f"{page}: words of {words:.1f} pixels in {figure['name']}"
        assert not browser.execute_script(FOREIGN), f"{page} fetches from elsewhere"
        complaints = [entry for entry in browser.get_log("browser") if entry["level"] in {"SEVERE", "WARNING"}]
        assert not complaints, f"{page}: {complaints}"
        if shots:
            name = f"{page.strip('/').replace('/', '-') or 'index'}-{size[0]}-{scheme}.png"
            height = browser.execute_script("return document.documentElement.scrollHeight")
            metrics = {"width": size[0], "height": min(height, 6000), "deviceScaleFactor": 1, "mobile": size == PHONE}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
            browser.save_screenshot(str(Path(shots) / name))
            resize(browser, size)


@pytest.mark.parametrize(
    ("words", "page"),
    [("residual_length", "glossary/"), ("use_cache_quantization", "moving-from-use-cache-quantization/")],
)
def test_search_finds(browser: Any, address: str, words: str, page: str) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    resize(browser, DESKTOP)
    browser.get(address)
    field = browser.find_element(By.CSS_SELECTOR, "input.md-search__input")
    browser.execute_script("arguments[0].focus()", field)
    field.send_keys(words)
    found = "a.md-search-result__link"
    WebDriverWait(browser, 30).until(lambda b: b.find_elements(By.CSS_SELECTOR, found))
    links = [link.get_attribute("href") for link in browser.find_elements(By.CSS_SELECTOR, found)]
    assert any(link.startswith(address + page) for link in links), links
