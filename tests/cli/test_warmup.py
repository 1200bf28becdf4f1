# SPDX-License-Identifier: Apache-2.0
"""`portakv warmup`: what it compiles is what copies need, and what it says."""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from support.benchmarks_cases import CPU, ON_CPU_AND_CUDA
from support.command_line import run, run_json
from support.guarded_memory import check_sentence

from portakv import CopyPlan, KVView
from portakv.backends.rows_kernel import kernels_of
from portakv.cli.sides import load_shapes
from portakv.runtime import cuda
from portakv.runtime import hip as _hip_driver
from portakv_conformance.vendor.hip_emulated import compiler, fake_driver

needs_nvrtc = pytest.mark.skipif(cuda.no_nvrtc() is not None, reason=str(cuda.no_nvrtc()))
NHD = "layer | kv block token head dim"
CHUNK = "kv layer token (head dim)"


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    folder = tmp_path / "kernels"
    monkeypatch.setenv("PORTAKV_CACHE_DIR", str(folder))
    return folder


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make both compilers answer immediately; the cached files and their names are as usual."""
    monkeypatch.setattr(cuda, "compile_text", lambda text, target: f"{text} {target}".encode())
    monkeypatch.setattr(_hip_driver, "compile_text", lambda *_: b"code")


def devices(monkeypatch: pytest.MonkeyPatch, hip: str | None, properties: list[Any]) -> None:
    """Give this machine GPUs, with these properties from torch."""
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(properties))
    ask = "get_device_capability" if hip is None else "get_device_properties"
    monkeypatch.setattr(torch.cuda, ask, properties.__getitem__)


def refuses(*words: str) -> str:
    code, out, err = run("warmup", *words)
    assert (code, out) == (1, "")
    message = err.removeprefix("portakv: ").rstrip("\n")
    check_sentence(message)
    return message


@needs_nvrtc
@pytest.mark.usefixtures("quick")
def test_kernels_are_compiled_once(cache: Path) -> None:
    words = ("warmup", "--arch", "90", "sm_80", "9.0", "--shape", "deepseek-mla", "encoder-cache")
    first = run_json(*words)
    assert first["directory"] == str(cache)
    counts = [(w["name"], w["target"], w["compiled"], w["kept"]) for w in first["warmed"]]
    assert counts == [
        ("deepseek-mla", "sm_90", 8, 0),  # both ways, slots and blocks, apart and together
        ("deepseek-mla", "sm_80", 8, 0),
        ("encoder-cache", "sm_90", 4, 0),  # one tensor
        ("encoder-cache", "sm_80", 4, 0),
    ]
    assert len(list(cache.iterdir())) == 24
    again = [(w["compiled"], w["kept"]) for w in run_json(*words)["warmed"]]
    assert again == [(0, 8), (0, 8), (0, 4), (0, 4)]
    assert len(list(cache.iterdir())) == 24


@needs_nvrtc
def test_the_table(cache: Path) -> None:
    ran = run("warmup", "--arch", "130", "--layout", NHD, CHUNK, "--heads", "4", "--layers", "2")
    assert (ran.code, ran.err) == (0, "")
    newest = cuda.architectures()[-1]
    assert f"compute_{newest}" in ran.out, "PTX where NVRTC does not know the architecture"
    assert "Compiled 8 kernels by NVRTC 13." in ran.out
    message = f"0 were cached before. All are stored in {cache}"
    assert message in " ".join(ran.out.split())


def _needed(device: torch.device) -> list[str]:
    """Kernels of caches and chunks of any size, of one model."""
    sources = []
    for blocks, tokens in ((3, 7), (40, 256)):
        chunk = torch.empty(2, 3, tokens, 2 * 64, dtype=torch.bfloat16, device=device)
        whole = torch.empty(3, 2, blocks, 16, 2, 64, dtype=torch.bfloat16, device=device)
        chunk_form = KVView(chunk, CHUNK, heads=2).form
        for caches, step in product((list(whole), [x.clone() for x in whole]), (1, 16)):
            cache_form = KVView(caches, NHD).form
            plans = [
                CopyPlan(cache_form, chunk_form, step, 0),
                CopyPlan(chunk_form, cache_form, 0, step),
            ]
            sources += [kernel.source for plan in plans for kernel in kernels_of(plan)]
    return sources


@needs_nvrtc
@ON_CPU_AND_CUDA
@pytest.mark.usefixtures("quick")
def test_what_copies_need_is_there(device: torch.device) -> None:
    major, minor = (9, 0) if device.type == "cpu" else torch.cuda.get_device_capability()
    architecture = 10 * major + minor
    extents = ("--layers", "3", "--heads", "2", "--dim", "64")
    assert not any(cuda.compiled_before(source, architecture) for source in _needed(device))
    run_json(
        "warmup",
        "--arch",
        str(architecture),
        "--layout",
        NHD,
        CHUNK,
        *extents,
        "--dtype",
        "bfloat16",
    )
    assert all(cuda.compiled_before(source, architecture) for source in _needed(device))


@needs_nvrtc
@pytest.mark.usefixtures("quick")
def test_by_default_every_shape_for_these_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    devices(monkeypatch, None, [(9, 0), (8, 0), (9, 0)])
    warmed = run_json("warmup")["warmed"]
    assert [w["target"] for w in warmed] == ["sm_90", "sm_80"] * len(load_shapes())
    assert [w["name"] for w in warmed[::2]] == list(load_shapes())
    assert all(w["compiled"] + w["kept"] for w in warmed)


@pytest.mark.skipif(compiler() is None, reason="there is no g++ for the fake HIP driver")
@pytest.mark.usefixtures("quick")
def test_amds_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    """hipRTC compiles for them; a longer name is another target. No name means every device."""
    monkeypatch.setattr(_hip_driver, "driver", fake_driver)
    words = ("--layout", NHD, CHUNK, "--heads", "2", "--layers", "3", "--dim", "64")
    first = run_json("warmup", "--arch", "gfx906", "gfx906", "gfx90a:xnack-", *words)
    targets = [(w["target"], w["compiled"], w["kept"]) for w in first["warmed"]]
    assert targets == [("gfx906", 8, 0), ("gfx90a:xnack-", 8, 0)]
    assert first["compilers"] == [f"hipRTC {_hip_driver.hiprtc_version(fake_driver())}"]
    for source in _needed(CPU):
        assert _hip_driver.compiled_before(fake_driver(), source, "gfx906")
        assert not _hip_driver.compiled_before(fake_driver(), source, "gfx90a")
    named = [SimpleNamespace(gcnArchName=name) for name in ("gfx936", "gfx90a:xnack-", "gfx936")]
    devices(monkeypatch, "6.3", named)
    again = run_json("warmup", *words)["warmed"]
    counts = [(w["target"], w["compiled"], w["kept"]) for w in again]
    assert counts == [("gfx936", 8, 0), ("gfx90a:xnack-", 0, 8)]


@needs_nvrtc
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--arch", "50", "--shape", "seed"], "Expected compute capability 7.5 or later"),
        (["--arch", "999", "--shape", "seed"], "Expected --arch to be a compute capability"),
        (["--shape", "seed", "sed"], "got 'sed'. Name one of"),
        (["--arch", "90", "--layout", "layer | bock dim", CHUNK], "axis"),
    ],
)
def test_what_cannot_be_compiled(words: list[str], message: str) -> None:
    assert message in refuses(*words)


@needs_nvrtc
@pytest.mark.usefixtures("quick")
def test_without_a_reader_of_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.10 has no reader of TOML, and the base package requires none."""
    reader = "tomllib" if sys.version_info >= (3, 11) else "tomli"
    monkeypatch.setitem(sys.modules, reader, None)
    message = refuses("--arch", "90")
    assert "tomli" in message
    assert "--layout" in message
    assert run("warmup", "--arch", "90", "--layout", NHD, CHUNK, "--layers", "2").code == 0


@needs_nvrtc
def test_a_cache_that_cannot_be_used(cache: Path) -> None:
    cache.write_bytes(b"")
    message = refuses("--arch", "90", "--shape", "seed")
    assert str(cache) in message.partition("PORTAKV_CACHE_DIR")[0]


NO_HIPRTC = _hip_driver.DriverMissing("hipRTC cannot be loaded (no such file); install ROCm")
REFUSED = RuntimeError("NVRTC refused the kernel:\na line that it did not like")
#: The failing function, its result, the architecture, and words of the message.
BROKEN: dict[str, tuple[Any, str, Mock, str, str]] = {
    "no NVRTC": (
        cuda, "no_nvrtc", Mock(return_value="cuda-bindings is not installed"), "90",
        "cannot be compiled: cuda-bindings is not installed."),
    "no hipRTC": (
        _hip_driver, "driver", Mock(side_effect=NO_HIPRTC), "gfx906",
        "hip backend cannot be compiled: hipRTC cannot be loaded (no such file); install"),
    "NVRTC refuses": (
        cuda, "compile_text", Mock(side_effect=REFUSED), "90", "the kernel:\na line"),
    "no device": (
        torch.cuda, "is_available", Mock(return_value=False), "",
        "torch finds none here. Name architectures"),
}  # fmt: skip


@needs_nvrtc
@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_is_told(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, broken, architecture, message = BROKEN[what]
    monkeypatch.setattr(owner, name, broken)
    arch = ["--arch", architecture] if architecture else []
    assert message in refuses(*arch, "--shape", "seed")
