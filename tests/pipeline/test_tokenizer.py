"""A vocabulary trained on the corpus, from params.yaml to a registered model beside one of GPT-2's."""

import re
import shutil
from pathlib import Path

import pytest

from gpt2.core.files import sha256_of
from gpt2.core.paths import TOKENIZER_FILE
from pipeline.helpers import COMMIT_RESULTS, Shell

pytestmark = pytest.mark.slow


def test_an_experiment_with_a_vocabulary_of_its_own(
    checkout: Path, shell: Shell, tmp_path: Path, reproduced: object
) -> None:
    mine = shutil.copytree(checkout, tmp_path / "gpt2", symlinks=True)
    here = f"cd {mine} &&"
    text = "Ῥόδα {i} = ροδόεντα;\n\tfor (int i = 0; i < {i}; ++i) バラは赤い、すみれは青い。\n\n"
    (mine / "data/raw/poems.txt").unlink()
    (mine / "data/raw/roses.txt").write_text("".join(text.replace("{i}", str(i)) for i in range(300)))
    shell(f"{here} {COMMIT_RESULTS} && python src/register.py --repair")
    said = shell(f"{here} dvc exp run -S prepare.tokenizer=bpe -S prepare.vocab_size=300").stdout
    assert re.search(
        r"version 2 is (not )?champion: scored again on \d+ of \d+ validation documents, bits per byte", said
    )
    kept = [mine / "data" / folder / TOKENIZER_FILE for folder in ("tokens", "model")]
    assert sha256_of(kept[0]) == sha256_of(kept[1])
    written = [
        shell(f"{here} python src/infer.py -m {model} -p 'バラは' -t 9 --seed 1").stdout
        for model in ("models:/gpt2/2", "data/model")
    ]
    assert written[0] == written[1] and written[0].startswith("バラは")
    assert "vocab_size 50257" in shell(f"{here} python src/infer.py -m models:/gpt2/1 -p The -t 1").stderr
    # With GPT-2's tokenizer, what was made before comes back.
    shell(f"{here} dvc exp run -S prepare.tokenizer=gpt2 -S prepare.vocab_size=null")
    assert not any(path.exists() for path in kept)
