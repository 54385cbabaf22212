"""A browser without a window, and what the pipeline's tests share."""

import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, sync_playwright

from pipeline.conftest import checkout, environment, no_kept_connections, reproduced, shell

__all__ = ["checkout", "environment", "no_kept_connections", "reproduced", "shell"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("chromium is not installed (on Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
