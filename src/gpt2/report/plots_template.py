"""The page of `dvc plots` with its scripts inside, so that it opens without network (plots.html_template of DVC).

DVC fills in {plot_divs}, and would fill in {scripts}, which load Vega, Vega-Lite and Vega-Embed from the web.
"""

from importlib.resources import files
from pathlib import Path

from gpt2.core.files import write_text

PACKAGE, BUNDLE = "js_lib_vega_embed", "static/js_lib_vega_embed/vega-embed-full.js"  # all three, of Vega-Lite 5
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
{refresh_tag}
<title>DVC plots</title>
<style>body { font-family: sans-serif } table { border-spacing: 15px }</style>
<script>%s</script>
</head>
<body>
{plot_divs}
</body>
</html>
"""


def write_plots_template(path: Path) -> None:
    """Write the template for the pages of `dvc plots show` and `dvc plots diff`."""
    write_text(path, PAGE.replace("%s", files(PACKAGE).joinpath(BUNDLE).read_text(encoding="utf-8")))
