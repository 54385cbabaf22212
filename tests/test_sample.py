"""The page of samples shows each prompt and its text, whatever they hold."""

import pandas as pd

from sample import page


def test_page_quotes_every_line_of_a_prompt_and_its_text() -> None:
    row = {"prompt": "One\ntwo", "temperature": 0.7, "top_k": 40, "top_p": None, "repetition_penalty": 1.0}
    table = pd.DataFrame([row | {"min_p": None, "seed": 1, "text": " three\n\nfour"}])
    assert page(table) == (
        "# Samples\n\n## One two\n\n*temperature 0.7, top_k 40, seed 1*\n\n> **One\n> two** three\n> \n> four\n"
    )
