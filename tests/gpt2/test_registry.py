"""The champion gives way to a lower test loss, or to a model that was measured in another way."""

from types import SimpleNamespace
from typing import Any

import pytest
from mlflow.entities.model_registry import ModelVersion, ModelVersionTag

from gpt2.registry import TEST_LOSS, TEST_SHA256, TEST_STRIDE, reproduction, takes_over
from gpt2.tracking import COMMIT, MODEL_SHA256


def version(number: int, loss: float, split: str = "a", stride: int = 256) -> ModelVersion:
    tags = {TEST_LOSS: repr(loss), TEST_SHA256: split, TEST_STRIDE: str(stride), MODEL_SHA256: "5" * 64}
    return ModelVersion("gpt2", str(number), 0, tags=[ModelVersionTag(*tag) for tag in tags.items()])


@pytest.mark.parametrize(
    ("challenger", "expected", "reason"),
    [
        (version(2, 4.9), True, "4.9000 is below the 5.0000 of version 1"),
        (version(2, 5.0), False, "5.0000 is not below the 5.0000 of version 1"),
        (version(2, 5.1), False, "5.1000 is not below the 5.0000 of version 1"),
        (version(2, 9.9, split="b"), True, "another test split"),
        (version(2, 9.9, stride=1), True, "another stride"),
        (version(1, 5.0), True, "already"),
    ],
)
def test_who_is_champion(challenger: ModelVersion, expected: bool, reason: str) -> None:
    wins, verdict = takes_over(challenger, version(1, 5.0))
    assert wins is expected and reason in verdict


def test_the_first_version_is_champion() -> None:
    assert takes_over(version(1, 9.0), None) == (True, "no version held the alias")


def test_making_a_version_again_takes_its_commit_its_texts_and_tells_what_is_missing() -> None:
    def commands(commit: str, source: str) -> list[str]:
        run: Any = SimpleNamespace(info=SimpleNamespace(run_id="1"), data=SimpleNamespace(tags={COMMIT: commit}))
        return reproduction(version(1, 5.0), run, source).splitlines()

    clean, dirty = commands("abc", "sotu"), commands("abc-dirty", "./data/raw/mine.txt")
    for lines in (clean, dirty):
        assert "git -C ../gpt2-55555555 checkout --quiet abc" in lines
    assert not any("not committed" in line or "data/raw" in line for line in clean)
    assert dirty[1].startswith("# Not all of its code was committed")
    assert "cp -r data/raw ../gpt2-55555555/data/" in dirty
    assert commands("", "sotu") == ["# It was made outside git, so there is no commit to make it again from."]
