# SPDX-License-Identifier: Apache-2.0
"""`triton`: its kernel under the interpreter and on a GPU, and what it says of devices."""

from __future__ import annotations

import builtins
import importlib.util
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from support.guarded_memory import refused
from support.triton_cases import CASES, chunk, dense, paged, pool, prepared, rows_of, word

from portakv import BackendUnavailable, Index, SlotError, Unsupported, copy_rows
from portakv.backends import triton as triton_backend
from portakv.backends.triton import Triton, compile_kernel
from portakv.registry import registry
from portakv.runtime.devices import this_process

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
)
TESTS = str(Path(__file__).resolve().parents[1])
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


# The kernel makes the right copies


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    """For each case what went wrong under Triton's interpreter, in one process for all."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment.pop("PORTAKV_BACKEND", None)
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [TESTS, environment.get("PYTHONPATH")])
    )
    command = [sys.executable, "-m", "support.triton_cases"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    found: dict[str, str] = json.loads(ran.stdout)
    return found


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_under_the_interpreter(interpreted: dict[str, str], name: str) -> None:
    assert not interpreted[name], interpreted[name]


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_on_a_gpu(name: str) -> None:
    CASES[name]("cuda")


# What it says of devices


def _reason(device: torch.device) -> str:
    decision = Triton.probe(device)
    assert not decision.accepted
    return decision.reason


def test_it_is_asked_before_the_reference() -> None:
    names = registry.REGISTRY.names()
    assert names.index("triton") < names.index("reference")


def test_the_host_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "TRITON_INTERPRET=1" in _reason(CPU)
    assert "GPU" in _reason(CPU)


def test_the_host_is_refused_without_importing_triton() -> None:
    program = (
        "import sys, torch\n"
        "from portakv.backends.triton import Triton\n"
        "assert not Triton.probe(torch.device('cpu')).accepted\n"
        "assert 'triton' not in sys.modules\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr


def test_forced_on_the_host_it_says_how_to_ask_for_the_interpreter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(registry, "REGISTRY", registry.Registry())
    caches, rows = pool("cpu"), chunk("cpu", 2)
    with refused(BackendUnavailable, "'triton'", "TRITON_INTERPRET=1", watch=[*caches, rows]):
        registry.choose("cpu", "triton")


def _failing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Let every import of triton fail."""
    usual = builtins.__import__

    def fails(name: str, *args: Any, **more: Any) -> Any:
        if name.partition(".")[0] == "triton":
            raise error
        return usual(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", fails)
    monkeypatch.delitem(sys.modules, "portakv.backends._triton_kernel", raising=False)
    import portakv.backends as package

    monkeypatch.delattr(package, "_triton_kernel", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ModuleNotFoundError("No module named 'triton'", name="triton"), "install portakv[triton]"),
        (ImportError("libtriton.so: undefined symbol: foo\nmore"), "undefined symbol: foo"),
        (OSError("libtriton.so: file too short"), "file too short"),
        (RuntimeError("this build needs another Python"), "another Python"),
    ],
)
def test_triton_missing_or_broken(
    monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    _failing(monkeypatch, error)
    assert reason in _reason(CUDA)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert reason in _reason(CPU)


class _Driver:
    """Stands for Triton's driver: serves devices of one type, or cannot be made."""

    def __init__(self, serves: str) -> None:
        self.serves = serves

    def get_active_torch_device(self) -> torch.device:
        return torch.device(self.serves)


@needs_triton
def test_a_driver_that_fails_or_serves_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    def broken() -> Any:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    monkeypatch.setattr(triton_backend, "_driver", broken)
    assert "Failed to find C compiler" in _reason(CUDA)
    monkeypatch.setattr(triton_backend, "_driver", lambda: _Driver("xpu"))
    assert "serves xpu devices, not cuda" in _reason(CUDA)


@needs_triton
def test_a_gpu_under_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "unset it" in _reason(CUDA)


@needs_triton
def test_an_interpreter_asked_for_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    import portakv.backends._triton_kernel  # noqa: F401 - imported without the interpreter

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "before Python starts" in _reason(CPU)


# On a GPU


def _gather(tokens: int = 8) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    return pool("cuda"), chunk("cuda", tokens), torch.arange(tokens, device="cuda")


@pytest.mark.gpu
def test_another_length_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def counted(*args: Any) -> Any:
        compiled.append(args)
        return compile_kernel(*args)

    monkeypatch.setattr(triton_backend, "compile_kernel", counted)
    backend, caches = Triton(CUDA), pool("cuda", blocks=300)
    for tokens in (1, 2, 7, 64, 1000):
        for dtype in (torch.int32, torch.int64):
            rows, slots = chunk("cuda", tokens), torch.randperm(1200)[:tokens].to("cuda", dtype)
            src, dst, ids = paged(caches), dense(rows), Index(slots)
            _, launch = prepared(src, dst, ids, Index(), backend)
            launch(src, dst, ids, Index(), tokens, None, None)
            assert torch.equal(rows.cpu(), rows_of(caches)[:, :, slots.cpu()])
    assert len(compiled) == 1


@pytest.mark.gpu
def test_a_captured_launch_reads_the_slots_of_each_replay() -> None:
    caches, rows, slots = _gather()
    src, dst, ids, status = paged(caches), dense(rows), Index(slots), word("cuda")
    _, launch = prepared(src, dst, ids, Index())
    launch(src, dst, ids, Index(), 8, None, status)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(src, dst, ids, Index(), 8, None, status)
    for seed in range(3):
        drawn = torch.randperm(24, generator=torch.Generator().manual_seed(seed))[:8]
        drawn[seed] = -1
        slots.copy_(drawn)
        rows.zero_()
        graph.replay()
        torch.cuda.synchronize()
        wanted = rows_of(caches)[:, :, drawn]
        wanted[:, :, seed] = 0
        assert torch.equal(rows.cpu(), wanted)
    slots.fill_(99)
    graph.replay()
    torch.cuda.synchronize()
    assert 1 <= int(status) <= 8


@pytest.mark.gpu
def test_a_first_use_inside_a_capture_is_refused() -> None:
    caches, rows, slots = _gather()
    src, dst, ids = paged(caches), dense(rows), Index(slots)
    backend, side = Triton(CUDA), torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        graph.capture_begin()
        try:
            with pytest.raises(Unsupported, match="capture"):
                prepared(src, dst, ids, Index(), backend)
        finally:
            graph.capture_end()
    prepared(src, dst, ids, Index(), backend)


@pytest.mark.gpu
def test_bad_device_ids_leave_the_context_usable() -> None:
    caches, rows, slots = _gather()
    slots[3] = 24
    with pytest.raises(SlotError, match="Position 3"):
        copy_rows(paged(caches), dense(rows), slots, backend="triton").synchronize()
    slots[3] = 23
    copy_rows(paged(caches), dense(rows), slots, backend="triton").synchronize()
    assert torch.equal(rows.cpu(), rows_of(caches)[:, :, slots.cpu()])


@pytest.mark.gpu
def test_a_stream_is_honoured() -> None:
    caches, rows, slots = _gather()
    src, dst, ids = paged(caches), dense(rows), Index(slots)
    _, launch = prepared(src, dst, ids, Index())
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        caches[0].add_(1)
    launch(src, dst, ids, Index(), 8, side, None)
    side.synchronize()
    assert torch.equal(rows.cpu(), rows_of(caches)[:, :, :8])
    side_by_side = torch.Stream(device="cuda")  # not a torch.cuda.Stream
    rows.zero_()
    torch.cuda.synchronize()
    launch(src, dst, ids, Index(), 8, side_by_side, None)
    side_by_side.synchronize()
    assert torch.equal(rows.cpu(), rows_of(caches)[:, :, :8])


@pytest.mark.gpu
def test_a_forked_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    caches, rows, slots = _gather()
    src, dst, ids = paged(caches), dense(rows), Index(slots)
    _, launch = prepared(src, dst, ids, Index())
    monkeypatch.setattr(this_process(), "forked", True)
    with refused(Unsupported, "forked", watch=[*caches, rows]):
        launch(src, dst, ids, Index(), 8, None, None)


@pytest.mark.gpu
def test_several_threads_launch_at_once() -> None:
    caches = pool("cuda", blocks=300)
    _, launch = prepared(paged(caches), dense(chunk("cuda", 4)), Index([0]), Index())
    wrong: list[int] = []

    def work(seed: int) -> None:
        drawn = torch.randperm(1200, generator=torch.Generator().manual_seed(seed))[:4]
        ids = Index(drawn.cuda())
        for _ in range(50):
            rows = chunk("cuda", 4)
            launch(paged(caches), dense(rows), ids, Index(), 4, None, None)
            if not torch.equal(rows.cpu(), rows_of(caches)[:, :, drawn]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
