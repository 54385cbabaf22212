"""A page that DVC makes from the template draws its plots without network."""

import re
from pathlib import Path

import pytest
from dvc_render import render_html  # type: ignore[import-untyped]
from dvc_render.vega import VegaRenderer  # type: ignore[import-untyped]

from gpt2.report.plots_template import PACKAGE, write_plots_template

pytest.importorskip(PACKAGE)


def test_a_page_of_plots_needs_no_network(tmp_path: Path) -> None:
    write_plots_template(tmp_path / "plots.html")
    points = [{"step": step, "loss": 4.5, "rev": "workspace"} for step in (1, 2)]
    plot = VegaRenderer(points, "loss", template="simple", x="step", y="loss")
    render_html([plot], tmp_path / "index.html", html_template=tmp_path / "plots.html")
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "{plot_divs}" not in page and "vegaEmbed('#loss', spec)" in page
    first, *plots = re.findall(r"<script[^>]*>(.*?)</script>", page, flags=re.DOTALL)
    assert "vegaEmbed" in first and "vegaLite" in first and len(plots) == 1
    assert not re.search(r"<(script|link)[^>]*(src|href)=", page)
