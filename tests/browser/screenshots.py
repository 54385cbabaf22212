"""Takes the README's pictures, of this checkout's runs and report.

Run by `PYTHONPATH=src:tests python tests/browser/screenshots.py`.
"""

import os
import shutil
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

from pipeline.helpers import ROOT, free_port, running

FOLDER = Path(__file__).parent
CHARTS = "#/experiments/1/runs?workflowType=machine_learning&compareRunsMode=CHART&viewStateShareKey=losses"
NO_ASSISTANT = "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1"  # MLflow's own, which opens once


def main() -> None:
    port = free_port()
    command = ["mlflow", "ui", "--port", str(port), "--workers", "1"]
    with (
        sync_playwright() as playwright,
        running(command, ROOT, dict(os.environ), f"http://127.0.0.1:{port}") as address,
    ):
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 700})
        page.add_init_script(f"localStorage.setItem('{NO_ASSISTANT}', 'true')")
        page.goto(f"{address}/{CHARTS}")
        page.get_by_role("button", name="Hide banner").click()
        expect(page.locator("path.js-line").nth(1)).to_be_attached(timeout=60_000)
        page.wait_for_timeout(3_000)  # for the last drawing
        page.screenshot(path=FOLDER / "charts.png")
        page.set_viewport_size({"width": 800, "height": 1100})
        page.goto((ROOT / "data" / "report" / "index.html").as_uri())
        page.screenshot(path=FOLDER / "report.png")


if __name__ == "__main__":
    main()
