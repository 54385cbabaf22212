"""MLflow's pages in a real browser: charts of runs, two runs side by side, a version with its card."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from pipeline.helpers import COMMIT_RESULTS, Shell, client_of, free_port, running, runs_by_name

pytestmark = pytest.mark.slow
SCREENSHOTS = Path(__file__).parent
CURVES = re.compile(r"js-line|lines|scatterlayer")


@pytest.fixture(scope="module")
def compared(checkout: Path, shell: Shell, reproduced: str) -> dict[str, str]:
    """Three runs, by name, with their ids: the pipeline's and two experiments'."""
    shell(COMMIT_RESULTS)
    for name, change in (("slower", "train.learning_rate=0.0005"), ("longer", "train.max_steps=9")):
        shell(f"dvc exp run -n {name} -S {change}")
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
    page: Page, address: str, checkout: Path, compared: dict[str, str], reproduced: str
) -> None:
    printed = re.search(r"http://127.0.0.1:5000(/#/experiments/\S+)", reproduced)
    assert printed
    page.goto(address + printed[1])
    for name in compared:
        expect(page.get_by_text(name, exact=True).first).to_be_visible()
    chart = page.get_by_text("train/loss", exact=True).first
    chart.scroll_into_view_if_needed()
    expect(chart).to_be_visible()
    page.wait_for_selector(".scatterlayer .trace path.js-line", state="attached")
    page.wait_for_timeout(1500)
    assert len(page.query_selector_all(".scatterlayer .trace path.js-line")) >= 3
