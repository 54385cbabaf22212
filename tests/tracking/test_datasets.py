import pytest
from mlflow.data.dataset_source_registry import resolve_dataset_source

from gpt2.tracking.datasets import address_of


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("source", "address"),
    [
        ("data/raw/a@b.txt", "data/raw/a@b.txt"),
        ("hf:data/raw/mine", "data/raw/mine"),
        ("hf:owner/name:en@c0ffee", "https://huggingface.co/datasets/owner/name/tree/c0ffee"),
    ],
)
def test_every_source_has_an_address_that_mlflow_takes(source: str, address: str) -> None:
    assert address_of(source) == address
    assert address in resolve_dataset_source(address).to_dict().values()
