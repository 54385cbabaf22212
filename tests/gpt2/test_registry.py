"""The champion gives way to a lower test loss, or to a model that was measured in another way."""

import pytest
from mlflow.entities.model_registry import ModelVersion, ModelVersionTag

from gpt2.registry import TEST_LOSS, TEST_SHA256, TEST_STRIDE, takes_over


def version(number: int, loss: float, split: str = "a", stride: int = 256) -> ModelVersion:
    tags = {TEST_LOSS: repr(loss), TEST_SHA256: split, TEST_STRIDE: str(stride)}
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
