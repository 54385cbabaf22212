"""The pages of MLflow, the report and DVC in a real browser: what a person sees, not only that a server answers."""

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal
from urllib.parse import quote

import pytest
from playwright.sync_api import Browser, Page, expect

from pipeline.helpers import COMMIT_RESULTS, Shell, free_port, running, runs_by_name

pytestmark = pytest.mark.slow
expect.set_options(timeout=60_000)


@pytest.fixture(scope="module")
def compared(checkout: Path, shell: Shell, reproduced: str) -> dict[str, str]:
    """Two runs, by name, with their ids: the pipeline's and an experiment's."""
    shell(f"{COMMIT_RESULTS} && dvc exp run -n slower -S train.learning_rate=0.0005")
    return {name: run.info.run_id for name, run in runs_by_name(checkout).items()}


@pytest.fixture(scope="module")
def address(checkout: Path, environment: dict[str, str], compared: object) -> Iterator[str]:
    port = free_port()
    command = ["mlflow", "ui", "--port", str(port), "--workers", "1"]
    with running(command, checkout, environment, f"http://127.0.0.1:{port}") as address:
        yield address


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    page.set_default_timeout(60_000)
    yield page
    page.close()


def test_the_printed_address_shows_the_curves_of_all_runs(
    page: Page, address: str, compared: dict[str, str], reproduced: str
) -> None:
    printed = re.search(r"http://127.0.0.1:5000(/#/experiments/\S+)", reproduced)
    assert printed and len(compared) == 2
    page.goto(address + printed[1])
    for name in compared:
        expect(page.get_by_text(name, exact=True).first).to_be_visible()
    expect(page.get_by_text("train/loss vs val/loss").first).to_be_visible()
    for name, loss in itertools.product(compared, ("train/loss", "val/loss")):
        expect(page.get_by_text(f"{name} ({loss})").first).to_be_visible()
    expect(page.locator("path.js-line").nth(3)).to_be_attached()  # two curves for each run


def test_two_runs_side_by_side_show_the_parameter_that_differs(
    page: Page, address: str, compared: dict[str, str]
) -> None:
    runs = quote(json.dumps([*compared.values()]))
    page.goto(f"{address}/#/compare-runs?runs={runs}&experiments={quote(json.dumps(['1']))}")
    expect(page.get_by_text("train.learning_rate").first).to_be_visible()
    expect(page.get_by_text("0.0005").first).to_be_visible()
    expect(page.get_by_text("0.002").first).to_be_visible()


def test_a_version_shows_its_figures_and_its_card(page: Page, address: str, compared: object) -> None:
    page.goto(f"{address}/#/models/gpt2/versions/1")
    expect(page.get_by_text(re.compile(r"Perplexity \d+\.\d \(test \d+\.\d")).first).to_be_visible()
    for heading in ("Data", "How to load", "A sample"):
        expect(page.get_by_role("heading", name=heading)).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_opens_from_the_disk_without_network(
    browser: Browser, checkout: Path, reproduced: str, scheme: Literal["light", "dark"]
) -> None:
    page = browser.new_page(viewport={"width": 400, "height": 800}, color_scheme=scheme, offline=True)
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto((checkout / "data" / "report" / "index.html").as_uri())
    for heading in ("Results", "Loss during the training", "Calibration", "Attention", "Samples"):
        expect(page.get_by_role("heading", name=re.compile(heading)).first).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    brightness = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3)")
    assert (max(map(int, brightness)) < 128) == (scheme == "dark")
    assert page.locator("img, svg").count() >= 6
    assert not [url for url in requests if not url.startswith(("file:", "data:"))]
    page.close()


@pytest.mark.parametrize("command", ["dvc plots show", "dvc plots diff HEAD slower"])
def test_plots_are_drawn_without_network(
    browser: Browser, checkout: Path, shell: Shell, compared: object, command: str
) -> None:
    shell(command)
    page = browser.new_page(offline=True)
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto((checkout / "dvc_plots" / "index.html").as_uri())
    expect(page.locator("svg.marks").nth(5)).to_be_visible()  # both losses on one chart, and each curve on its own
    assert not [url for url in requests if not url.startswith(("file:", "data:"))]
    page.close()
