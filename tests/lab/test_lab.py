"""What readers have before them, in a real browser: notebooks in JupyterLab, and the pages.

Run by `make test-lab`; the pages only after `make site`. It needs Chromium or Chrome, found on the
path, or named by the variable CHROMIUM; the browser is headless, and JupyterLab is that of the
Python that readers use, named by the variable LAB. The notebooks are copied, and their copies run.
"""

import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import threading
import time
import urllib.request
from pathlib import Path

import pytest

playwright = pytest.importorskip(
    "playwright.sync_api", reason="Playwright is not installed here: run `make test-lab`"
)

ROOT = Path(__file__).resolve().parents[2]
LAB = ROOT / os.environ.get("LAB", ".venv/bin/python")
SCREENSHOTS = ROOT / "build" / "lab"
SITE = ROOT / "build" / "site"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MINUTES = 60_000  # Playwright counts in milliseconds
SETTINGS = {
    # All cells stay in the page, also those far from the window; else they cannot be looked at.
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}


def chromium():
    """The browser's path, or None. A browser that CHROMIUM names must be there."""
    if named := os.environ.get("CHROMIUM"):
        assert shutil.which(named), f"CHROMIUM is {named!r}, which is not there"
        return shutil.which(named)
    return next((path for path in map(shutil.which, NAMES) if path), None)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A project of notebooks without their outputs: what shows up was made."""
    place = tmp_path_factory.mktemp("lab")
    (place / "notebooks").mkdir()
    (place / "pyproject.toml").touch()
    (place / "figures").mkdir()
    shutil.copy(ROOT / "figures" / "vanishing.gif", place / "figures")
    for path in sorted((ROOT / "notebooks").glob("[0-9][0-9]-*.ipynb")):
        notebook = json.loads(path.read_text())
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                cell.update(outputs=[], execution_count=None)
                cell["metadata"].pop("jupyter", None)  # a folded cell shows no number
        (place / "notebooks" / path.name).write_text(json.dumps(notebook))
    return place


@pytest.fixture(scope="module")
def address(copy):
    """JupyterLab, serving the copy, with no settings but those above."""
    for name, values in SETTINGS.items():
        path = copy / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    own = {name: str(copy / "own") for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR")}
    environment = {
        **os.environ,
        **own,
        "JUPYTERLAB_SETTINGS_DIR": str(copy / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(copy / "workspaces"),
    }
    log = copy / "server.log"
    options = ["--no-browser", "--allow-root", "--port=0", "--ServerApp.ip=127.0.0.1"]
    with log.open("w") as file:
        server = subprocess.Popen(
            [LAB, "-m", "jupyterlab", *options, "--IdentityProvider.token=lab",
             f"--ServerApp.root_dir={copy}"],
            cwd=copy,
            env=environment,
            stderr=file,
        )  # fmt: skip
    try:
        yield wait_for_address(server, log)
    finally:
        server.terminate()
        server.wait(60)


def wait_for_address(server, log):
    for _ in range(240):
        assert server.poll() is None, log.read_text()
        if found := re.search(r"http://127\.0\.0\.1:\d+/", log.read_text()):
            with urllib.request.urlopen(f"{found[0]}api?token=lab") as answer:
                assert answer.status == 200
            return found[0]
        time.sleep(0.5)
    raise AssertionError(f"no address after two minutes:\n{log.read_text()}")


@pytest.fixture(scope="module")
def page():
    executable = chromium()
    if executable is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is on the path, CHROMIUM is not set")
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=executable)
        page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
        page.set_default_timeout(2 * MINUTES)
        yield page
        browser.close()


def committed(number):
    found = sorted((ROOT / "notebooks").glob(f"{number}-*.ipynb"))
    if not found:
        pytest.skip(f"there is no notebook {number}")
    return found[0]


def pictures_in(path):
    """How many cells of the notebook show a figure as it is run."""
    sources = ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"]]
    return sum(bool(re.search(r"^figures\.show\(", source, re.M)) for source in sources)


def run_all(page, address, path):
    """Open the notebook and choose Run > Run All Cells; returns its panel when all are done."""
    page.goto(f"{address}lab/tree/notebooks/{path.name}?token=lab&reset")
    panel = page.locator(".jp-NotebookPanel:visible")
    panel.locator(".jp-CodeCell").first.wait_for()
    # Whoever runs a cell before the kernel is there is asked to select one.
    page.locator(".jp-StatusBar-Widget").get_by_text("Python 3 (ipykernel) | Idle").wait_for()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    prompts = wait_for_all(page, panel)
    errors = panel.locator(".jp-RenderedText[data-mime-type*='error']").all_inner_texts()
    assert not errors, errors[0]
    assert [int(re.sub(r"\D", "", prompt)) for prompt in prompts] == [*range(1, len(prompts) + 1)]
    return panel


def wait_for_all(page, panel, minutes=20):
    """The prompts of the code cells, once none waits; a cell shows [*]: while it waits or runs."""
    end = time.monotonic() + 60 * minutes
    while time.monotonic() < end:
        page.wait_for_timeout(1000)
        prompts = panel.locator(".jp-CodeCell .jp-InputPrompt").all_inner_texts()
        failed = panel.locator(".jp-RenderedText[data-mime-type*='error']").count()
        if failed or all(re.search(r"\d", prompt) for prompt in prompts):
            return prompts
    screenshot(page, "timeout")
    raise AssertionError(f"not done after {minutes} minutes: {prompts}")


def screenshot(page, name):
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png")


@pytest.mark.parametrize("number", ["01", "05"])
def test_run_all_cells_and_move_a_slider(number, page, address):
    path = committed(number)
    panel = run_all(page, address, path)
    noise = panel.locator(".jp-RenderedText[data-mime-type*='stderr']").all_inner_texts()
    assert not noise, noise[0]
    images = panel.locator(".jp-OutputArea-output img")
    assert images.count() >= pictures_in(path) > 0
    for image in images.all():
        image.scroll_into_view_if_needed()
        assert image.evaluate("image => image.complete && image.naturalWidth") > 100
    images.first.scroll_into_view_if_needed()
    screenshot(page, path.stem)
    slider_changes_the_picture(page, panel)
    screenshot(page, f"{path.stem}-slider")


def slider_changes_the_picture(page, panel):
    """The handle is moved with the keyboard; readout and picture follow."""
    handle = panel.locator(".widget-slider .noUi-handle").first
    picture = panel.locator(".jupyter-widgets.widget-box .jp-OutputArea-output img").first
    readout = panel.locator(".widget-readout").first
    picture.wait_for()
    before, percent = picture.get_attribute("src"), readout.inner_text()
    handle.focus()
    for _ in range(3):
        handle.press("ArrowRight")
    page.wait_for_function(
        "([image, before]) => image.isConnected ? image.src !== before : true",
        arg=[picture.element_handle(), before],
    )
    picture.wait_for()
    assert picture.get_attribute("src") != before
    assert readout.inner_text() != percent
    handle.scroll_into_view_if_needed()


class Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def site():
    if not SITE.exists():
        pytest.skip("there are no pages: run `make site`")
    handler = functools.partial(Silent, directory=SITE)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.mark.parametrize("width", [1280, 390])  # a desk's, a telephone's
def test_pages_fit_load_nothing_from_elsewhere_and_work(width, page, site):
    page = page.context.new_page()
    trouble = []
    page.on("response", lambda r: trouble.append(f"{r.status} {r.url}") if r.status >= 400 else 0)
    page.on("request", lambda r: None if r.url.startswith((site, "data:", "blob:"))
            else trouble.append(r.url))  # fmt: skip
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.set_viewport_size({"width": width, "height": 844})
    for path in sorted(SITE.glob("*.html")):
        page.goto(site + path.name)
        page.wait_for_load_state("networkidle")
        wide = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        assert wide <= 0, f"{path.name} is {wide} pixels too wide"
        screenshot(page, f"site-{width}-{path.stem}")

    page.goto(f"{site}05-four-pruning-experiments.html")
    film = page.locator(".film")
    before = film.locator("img").get_attribute("src")
    film.locator("input").press("End")
    assert film.locator("img").get_attribute("src") != before
    film.scroll_into_view_if_needed()
    screenshot(page, f"site-{width}-film")
    page.locator("#search input").fill("Hutchinson")
    page.locator("#search a", has_text="Five ways to a diagonal").first.click()
    page.wait_for_url("**/04-five-ways-to-a-diagonal.html*")
    assert not trouble
    page.close()
