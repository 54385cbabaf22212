"""The page shows all texts as they are, and loads nothing."""

from html.parser import HTMLParser
from typing import Any

import pandas as pd
import pytest

from gpt2.report.page import PICTURES, Results, page

EVIL = '<script src="https://example.com/x.js">&amp;</p>'
SVG = '<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"><path id="a"/></svg>'


class Reader(HTMLParser):
    """Collects the names of elements, the addresses that they load or lead to, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.addresses += [value or "" for name, value in attributes if name.split(":")[-1] in ("src", "href", "data")]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def results(shipped: dict[str, Any]) -> Results:
    lineage = {name: shipped[name] for name in ("prepare", "model", "train", "runtime")}
    lineage["prepare"] |= {"source": EVIL}
    lineage |= {"train_key": "k", "commit": "c", "uncommitted": [EVIL], "environment": "Python", "threads": 2}
    figures = {"loss": 2.0, "perplexity": 7.4, "bits_per_byte": 1.0, "tokens": 1234, "stride": 8}
    samples = [{"prompt": EVIL, "temperature": "0.7", "top_k": "", "repetition_penalty": "1.0", "text": f"\n\n{EVIL}"}]
    return Results(
        model_sha256="0123456789" * 6 + "abcd",
        parameters=1000,
        steps=80,
        vocab_size=50257,
        lineage=lineage | {"files": {EVIL: "sha"}},
        evaluated=figures | {f"val_{name}": value for name, value in figures.items()},
        sampled={"distinct_1": 0.25, "model": "01234567"},
        accuracy=0.25,
        samples=pd.DataFrame(samples),
        passage=[(text, 0.1 * index) for index, text in enumerate(f"{EVIL} é 日本")],
        passage_name=EVIL,
        pictures=dict.fromkeys(PICTURES, SVG) | {"attention": b"png"},
    )


def test_the_page_escapes_texts_and_loads_nothing(results: Results) -> None:
    html = page(results)
    reader = Reader(html)
    assert not {"script", "link", "iframe", "base", "object"} & set(reader.elements)
    assert reader.addresses == ["data:image/png;base64,cG5n"]
    assert "url(" not in html and "@import" not in html
    # The source twice, the change, the file, the passage's name and text, the heading, the prompt and the sample.
    assert reader.text.count(EVIL) == 9 and "é 日本" in reader.text
    assert reader.elements.count("svg") == len(PICTURES) - 1
    for shown in ("temperature 0.7\n", "1,234", "25.0%", "0.25", "ln 50,257 = 10.82"):
        assert shown in reader.text, shown
    assert "top_k ," not in reader.text and "repetition_penalty" not in reader.text


def test_the_more_surprising_the_stronger_the_colour(results: Results) -> None:
    html = page(results)
    levels = [int(part[0]) for part in html.split('<span class="s')[6:]]  # after the legend
    assert levels == sorted(levels) and set(levels) >= {0, 1, 2}
