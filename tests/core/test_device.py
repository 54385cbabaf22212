import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from gpt2.core import device
from gpt2.core.device import (
    check_memory,
    choose_device,
    choose_micro_batch_size,
    choose_precision,
    use_threads,
)

ErrorLine = Callable[[Callable[[], object]], str]
SOURCE = Path(__file__).parents[2] / "src"


@pytest.mark.parametrize(
    ("name", "capabilities", "expected"),
    [
        ("auto", {"amx_bf16": True}, torch.bfloat16),
        ("auto", {"avx512_bf16": True}, torch.bfloat16),
        ("auto", {"avx2": True, "amx_bf16": False}, torch.float32),
        ("auto", {}, torch.float32),
        ("bfloat16", {}, torch.bfloat16),
        ("float32", {"amx_bf16": True}, torch.float32),
    ],
)
def test_auto_takes_bfloat16_where_the_processor_computes_it(
    monkeypatch: pytest.MonkeyPatch, name: str, capabilities: dict[str, bool], expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert choose_precision(name, torch.device("cpu")) == expected


def test_a_device_that_is_not_there_is_refused(error_line: ErrorLine) -> None:
    assert "device cuda:99 is not available here" in error_line(lambda: choose_device("cuda:99"))


def test_what_cannot_fit_into_memory_is_refused(error_line: ErrorLine) -> None:
    check_memory(10**6, torch.device("cpu"))
    check_memory(10**18, torch.device("cuda"))  # tells so itself
    assert "need at least 1,000,000,000 GB" in error_line(lambda: check_memory(10**18, torch.device("cpu")))


@pytest.mark.parametrize(("limit", "gigabytes"), [("3000000000\n", 3), ("max\n", 5), (None, 5)])
def test_nor_what_cannot_fit_into_the_memory_of_a_container(
    error_line: ErrorLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str | None, gigabytes: int
) -> None:
    monkeypatch.setattr(device, "CGROUP_LIMIT", tmp_path / "memory.max")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=5 * 10**9))
    if limit:
        (tmp_path / "memory.max").write_text(limit)
    line = error_line(lambda: check_memory(6 * 10**9, torch.device("cpu")))
    assert line.endswith(f"this machine has {gigabytes} GB\n")


def test_auto_computes_more_at_once_on_gpus() -> None:
    found = [choose_micro_batch_size("auto", torch.device(name)) for name in ("cpu", "cuda", "mps")]
    assert found[0] < found[1] == found[2]
    assert choose_micro_batch_size(3, torch.device("cuda")) == 3


def test_auto_takes_the_cpus_that_the_process_may_use() -> None:
    code = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); " * hasattr(os, "sched_setaffinity")
    code += "from gpt2.core.device import use_threads; import torch; "
    code += "print(use_threads('auto'), torch.get_num_threads(), use_threads(3), torch.get_num_threads())"
    environment = os.environ | {"PYTHONPATH": str(SOURCE)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    auto, used, *fixed = map(int, done.stdout.split())
    assert auto == used == (1 if hasattr(os, "sched_setaffinity") else used) and fixed == [3, 3]


def test_processes_of_one_machine_share_its_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    for cpus, threads in ((9, 2), (2, 1)):
        monkeypatch.setattr("gpt2.core.device.cpu_count", lambda cpus=cpus: cpus)
        assert use_threads("auto") == torch.get_num_threads() == threads
