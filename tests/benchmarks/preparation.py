"""prepare at size, beside tiktoken alone on one thread: bytes per second by the clock and of CPU time, peak memory.

python tests/benchmarks/preparation.py --megabytes 1000

The texts are pieces of the default corpus: short rows (.jsonl), long ones, and one plain file. Each measurement is a
process of its own; nothing else should run meanwhile.
"""

import argparse
import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

from joblib import cpu_count

from peers import ROOT, print_circumstances

sys.path.insert(0, str(ROOT / "src"))

from gpt2.config import PrepareParams, load_params
from gpt2.core.paths import PARAMS
from gpt2.data.corpus import read_corpus, read_sotu
from gpt2.data.readers import read_file
from gpt2.data.token_files import write_token_files
from gpt2.data.tokenizer import gpt2_tokenizer

ROWS = {"short.jsonl": 800, "long.jsonl": 20_000, "plain.txt": 5_000}  # characters of a row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--measure", nargs=2, metavar=("WHAT", "FILE"), help="(of a process of its own)")
    arguments = parser.parse_args()
    if arguments.measure:
        what, file = arguments.measure
        measure(what, Path(file))
        return
    print_circumstances(cpu_count())
    corpus = "".join(text for part in read_sotu() for text in part.read())
    with TemporaryDirectory() as folder:
        for name, length in ROWS.items():
            file = Path(folder, name)
            with file.open("w", encoding="utf-8") as lines:
                for text in pieces(corpus, length, arguments.megabytes * 10**6):
                    lines.write(json.dumps({"text": text}) + "\n" if file.suffix == ".jsonl" else f"{text}\n")
            rates = []
            for what in ("tiktoken", "prepare"):
                command = [sys.executable, __file__, "--measure", what, str(file)]
                told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                rate, cpu_rate, peak = map(float, told.split())
                rates.append((rate / (cpu_count() if what == "prepare" else 1), cpu_rate))
                print(f"{name:12} {what:9} {rate:6.1f} MB/s, {cpu_rate:6.1f} MB a CPU second, {peak:5.0f} MB at most")
            fraction, cpu_fraction = (ours / theirs for theirs, ours in zip(*rates, strict=True))
            print(
                f"{name:12} {fraction:.2f} of {cpu_count()} times tiktoken's; {cpu_fraction:.2f} by CPU time",
                flush=True,
            )


def pieces(corpus: str, length: int, total: int) -> Iterator[str]:
    """Yield pieces of the corpus of about `length` characters, `total` together."""
    generator = random.Random(1)
    while total > 0:
        start = generator.randrange(len(corpus) - length)
        yield corpus[start : start + length]
        total -= length


def measure(what: str, file: Path) -> None:
    """Print MB of text per second, and per second of CPU time, and the peak memory of this process in MB."""
    params: PrepareParams = load_params(PARAMS).prepare.model_copy(update={"source": file.name})
    gpt2_tokenizer().encoding.encode_ordinary("a")
    if what == "tiktoken":
        texts = list(islice(read_file(file, params), 20_000 if file.suffix == ".jsonl" else 2))
        began, cpu_began = time.perf_counter(), time.process_time()
        for text in texts:
            gpt2_tokenizer().encoding.encode_ordinary(text)
        size = sum(map(len, texts))
    else:
        began, cpu_began = time.perf_counter(), time.process_time()
        with TemporaryDirectory() as folder:
            meta, _ = write_token_files(read_corpus(params, file.parent)[0], Path(folder), params)
        size = sum(split["bytes"] for split in meta["splits"].values())
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())  # getrusage tells the parent's too
    print(size / seconds / 1e6, size / cpu_seconds / 1e6, int(peak[1]) / 1e3 if peak else 0)


if __name__ == "__main__":
    main()
