# SPDX-License-Identifier: Apache-2.0
"""`hip` on the host's side, EMULATED: its reports about devices, the libraries that it loads, its
calls of the driver, its errors."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from support.command_line import rejection
from support.cuda_cases import COPIES, Copy, by, chunk, pool, seed_bug
from support.guarded_memory import refused, same

from portakv import AdaptiveConnector, BackendUnavailable, TransferError, Unsupported
from portakv.backends import rows_launch
from portakv.backends.hip import Hip
from portakv.backends.rows_kernel import RowsKernel
from portakv.registry import registry
from portakv.registry.registry import self_check
from portakv.runtime import hip as _hip_driver
from portakv.runtime.cuda import raw_stream
from portakv.runtime.hip import Card
from portakv_conformance.vendor.hip_emulated import (
    HipEmulated,
    HostCard,
    built,
    compiler,
    fake_driver,
    library,
)

pytestmark = [
    pytest.mark.skipif(compiler() is None, reason="there is no g++ for the fake HIP driver"),
    pytest.mark.xdist_group("hip"),
]
CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache on disk that holds nothing."""
    monkeypatch.setenv("PORTAKV_CACHE_DIR", str(tmp_path / "cache"))


def reason(device: torch.device = CUDA) -> str:
    return rejection(Hip, device)


@contextmanager
def failing(function: str, error: int) -> Iterator[None]:
    """Inside, a function of the fake driver returns an error."""
    library().hip_fake_fail(function.encode(), error)
    try:
        yield
    finally:
        library().hip_fake_fail(function.encode(), 0)


def rocm(patched: pytest.MonkeyPatch, name: str = "", architecture: str = "gfx90a") -> None:
    """A torch for ROCm with one device, over the fake driver."""
    properties = SimpleNamespace(name=name, gcnArchName=architecture)
    patched.setattr(torch.version, "hip", "6.3.42134")
    patched.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    patched.setattr(Hip, "open_driver", staticmethod(fake_driver))


# What it reports about devices


def test_other_builds_of_torch_load_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hip, "open_driver", Mock(side_effect=AssertionError))
    monkeypatch.setattr(torch.version, "hip", None)
    assert reason().startswith("this torch is not built for ROCm; for a device of AMD install ")
    assert reason().endswith("for a DCU the torch of Hygon's DTK")


@pytest.mark.parametrize(
    ("name", "architecture", "description"),
    [
        ("AMD Instinct MI250X", "gfx90a:sramecc+:xnack-", "gfx90a (AMD Instinct MI250X)"),
        ("", "gfx906", "gfx906 (unnamed)"),
        ("Z100", "gfx906", "gfx906 (Z100, a Hygon DCU)"),
        ("", "gfx926", "gfx926 (unnamed, a Hygon DCU)"),
        ("K100_AI", "gfx928", "gfx928 (K100_AI, a Hygon DCU)"),
        ("BW1000", "gfx936:xnack-", "gfx936 (BW1000, a Hygon DCU)"),
        ("a later one", "gfx938", "gfx938 (a later one, a Hygon DCU)"),
    ],
)
def test_a_device_is_named(
    name: str, architecture: str, description: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rocm(monkeypatch, name, architecture)
    decision = Hip.probe(CUDA)
    assert decision.accepted
    assert decision.reason.startswith("hipRTC 0.0 of HIP 0.0.")
    assert decision.reason.endswith(f" compiles its kernel for {description}")


@pytest.mark.parametrize(
    ("function", "error", "device", "why"),
    [
        ("hipGetDeviceCount", 100, 0,
         "HIP finds no device: hipGetDeviceCount returned hipErrorNoDevice (100), no ROCm-capable "
         "device is detected; check that /dev/kfd can be opened and that HIP_VISIBLE_DEVICES leaves"
         " a device"),
        ("", 0, 3, "HIP finds 1 devices, so that there is no cuda:3"),
        ("", 0, 0, "Expected an architecture of cuda:0 such as gfx906 from torch, got ''"),
        ("hiprtcVersion", 3, 0, "version of hipRTC failed: HIPRTC_ERROR_INVALID_INPUT (3)"),
        ("hipRuntimeGetVersion", 1, 0, "hipRuntimeGetVersion failed: hipErrorInvalidValue (1)"),
    ],
)  # fmt: skip
def test_what_the_driver_or_torch_does_not_tell_is_the_reason(
    function: str, error: int, device: int, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rocm(monkeypatch, architecture="")
    with failing(function, error):
        assert why in reason(torch.device("cuda", device))


@pytest.mark.parametrize(("number", "release"), [(50221153, "5.2.21153"), (60325422, "6.3.25422")])
def test_a_release_is_read_from_its_number(number: int, release: str) -> None:
    assert _hip_driver.hip_release(number) == release


# Which libraries it loads, and which backend is chosen


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Return the places of libraries, of which there are none at first."""
    places: dict[str, list[str]] = {}
    monkeypatch.setattr(_hip_driver, "places", lambda stem, _=None: iter(places.get(stem, [])))
    monkeypatch.setattr(_hip_driver, "driver", _hip_driver.driver.__wrapped__)
    monkeypatch.setattr(torch.version, "hip", "6.3")
    return places


@pytest.mark.parametrize(
    ("runtime", "compiler", "first", "last"),
    [
        (
            "/nowhere/libamdhip64.so.6",
            "",
            "the HIP runtime cannot be loaded (/nowhere/libamdhip64.so.6: ",
            "install ROCm for an AMD device, or load the environment of the DTK for a Hygon DCU",
        ),
        ("libc.so.6", "", "hipRTC cannot be loaded (", ""),
        (
            "libc.so.6",
            "libc.so.6",
            "libc.so.6 has no function hipGetDeviceCount; this HIP is not",
            " supported",
        ),
    ],
    ids=["none", "no hipRTC", "not HIP"],
)
def test_libraries_that_cannot_be_used(
    runtime: str, compiler: str, first: str, last: str, libraries: dict[str, list[str]]
) -> None:
    libraries.update(amdhip64=[runtime], hiprtc=[compiler] * bool(compiler))
    assert reason().startswith(first)
    assert reason().endswith(last)


def test_the_dtk_s_runtime_with_hiprtc(libraries: dict[str, list[str]], tmp_path: Path) -> None:
    """`libgalaxyhip.so` comes after one that does not load; the compiler is in the runtime."""
    place = tmp_path / "libgalaxyhip.so.5"
    place.write_bytes(built())
    libraries["amdhip64"] = ["/nowhere/libamdhip64.so"]
    libraries["galaxyhip"] = [str(place)]
    driver = _hip_driver.driver()
    assert driver.runtime is driver.compiler
    assert driver.error(100).startswith("hipErrorNoDevice (100)")


def test_a_loaded_library_is_preferred_then_one_beside(tmp_path: Path) -> None:
    """The C library stands for it: whatever torch loaded comes before every other copy."""
    places = list(_hip_driver.places("c"))
    assert Path(places[0]).name.startswith("libc.so")
    assert Path(places[0]).is_absolute()
    assert places[-4:] == ["libc.so", "libc.so.7", "libc.so.6", "libc.so.5"]
    (tmp_path / "libportakv_none.so.7").touch()
    nearby = list(_hip_driver.places("portakv_none", tmp_path))
    assert nearby[0] == str(tmp_path / "libportakv_none.so.7")


def test_which_backend_a_torch_for_rocm_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor can lie on such a device here: the self-check copies by its driver on the host."""
    rocm(monkeypatch, "BW1000", "gfx936")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(registry, "REGISTRY", registry.Registry())
    monkeypatch.setattr(registry, "self_check", lambda backend: self_check(HipEmulated(CPU)))
    assert registry.choose(AdaptiveConnector("cuda").device).name == "hip"
    of_rocm = "this torch is built for ROCm, not for CUDA"
    with pytest.raises(BackendUnavailable, match=of_rocm) as raised:
        AdaptiveConnector("cuda", backend="cuda")
    assert any(str(decision).startswith("hip: accepted") for decision in raised.value.trace)
    trace = {decision.name: decision for decision in registry.trace(CUDA)}
    assert trace["hip"].accepted
    assert trace["hip"].reason.endswith(
        "compiles its kernel for gfx936 (BW1000, a Hygon DCU); self-check passed, every byte right"
    )
    assert (trace["cuda"].accepted, trace["cuda"].reason) == (False, of_rocm)
    for decision in trace.values():
        assert decision.reason
        assert not re.search("Traceback|it failed to load", decision.reason), decision


# Errors on the way


def test_a_compile_error_carries_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    seed_bug(monkeypatch, ("if (at >= all)", "if (nothing >= all)", "gather"))
    with pytest.raises(RuntimeError) as caught:
        HipEmulated(CPU).prepare(COPIES["gather"]().plan())
    assert str(caught.value).startswith("hipRTC refused the kernel for gfx906:\nportakv_rows.hip:")
    assert "was not declared in this scope" in str(caught.value)
    assert "\0" not in str(caught.value)


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        ("hiprtcCreateProgram", 3, "Creating a program of hipRTC failed: HIPRTC_ERROR_INVALID_I"),
        ("hiprtcCompileProgram", 5, "hipRTC refused the kernel for gfx906:\nHIPRTC_ERROR_INVALID_"),
        ("hiprtcGetCodeSize", 4, "Reading the size of a result of hipRTC failed: HIPRTC_ERRO"),
        ("hiprtcGetCode", 4, "Reading a result of hipRTC failed: HIPRTC_ERROR_INVALID_PROGRAM"),
        ("hipModuleLoadData", 200, "Loading the kernel: expected success of HIP, got hipError"),
        ("hipModuleGetFunction", 500, "Finding the kernel: expected success of HIP, got hipEr"),
        ("hipModuleLaunchKernel", 719, "The launch: expected success of HIP, got hipErrorLaun"),
        ("hipHostGetDevicePointer", 1, "Finding the status word: expected success of HIP, got"),
    ],
)
def test_an_error_of_the_driver_is_told(function: str, error: int, message: str) -> None:
    copied = COPIES["one plane"]()
    status = torch.zeros(1, dtype=torch.int64)
    before = copied.dst.tensors.clone()
    # What a launch meets comes to the caller; what a compiler says is a reason of the registry's.
    kind = RuntimeError if function.startswith("hiprtc") else TransferError
    with failing(function, error), pytest.raises(kind) as caught:
        launch(HipEmulated(CPU), copied, status)
    assert str(caught.value).startswith(message)
    assert same(copied.dst.tensors, before)
    launch(HipEmulated(CPU), copied, status)
    assert not same(copied.dst.tensors, before)


def launch(backend: Hip, copied: Copy, status: torch.Tensor | None = None, **more: Any) -> None:
    src = copied.src
    dst = copied.dst
    backend.prepare(copied.plan())(
        src.view(), dst.view(), src.index(), dst.index(), copied.count, more.get("stream"), status
    )


def test_the_text_has_nothing_of_nvidia_or_of_warps() -> None:
    """Code under NVIDIA's own conditions does not count."""
    plan = COPIES["gather"]().plan()
    text = RowsKernel(plan).source
    nvidia = r"^#if[^\n]*(__CUDA_ARCH__|__CUDACC_RTC__).*?^#(else|endif)|^ *//[^\n]*"
    code = re.sub(nvidia, "", text, flags=re.MULTILINE | re.DOTALL)
    assert "portakv_rows" in code
    for word in (
        "asm",
        "__isGlobal",
        "__shfl",
        "__syncwarp",
        "warpSize",
        "ballot",
        "0xffffffff",
        "__ldg",
        "& 31",
        "grid_constant__",
    ):
        assert word not in code, word


# What it passes to the driver


def last_launch() -> tuple[list[int], int | None]:
    """Grid, block and shared memory of the last launch that the driver saw, and its stream."""
    seven = (ctypes.c_uint * 7)()
    stream = ctypes.c_void_p()
    library().hip_fake_last(seven, ctypes.byref(stream))
    return list(seven), stream.value


def test_a_launch_is_cut_into_blocks_of_whole_waves() -> None:
    copied = Copy(by(pool(), [11, 0, 3, 5] * 100), chunk(400), 400)
    before = library().hip_fake_launches()
    launch(HipEmulated(CPU), copied)
    # A row of 32 B in 6 planes, in vectors of 16 B.
    assert last_launch() == ([-(-400 * 2 // 256), 6, 1, 256, 1, 1, 0], None)
    launch(HipEmulated(CPU), Copy(by(pool(), [1]), chunk(1), 0))  # a copy of nothing
    assert library().hip_fake_launches() == before + 1


def test_a_text_is_compiled_once_and_kept_on_disk() -> None:
    first = HipEmulated(CPU)
    second = HipEmulated(CPU)
    plan = COPIES["gather"]().plan()
    source = RowsKernel(plan).source
    assert not _hip_driver.compiled_before(fake_driver(), source, "gfx906")
    first.prepare(plan)
    assert _hip_driver.compiled_before(fake_driver(), source, "gfx906")
    assert not _hip_driver.compiled_before(fake_driver(), source, "gfx90a")
    with failing("hiprtcCompileProgram", 6):
        first.prepare(plan)
        second.prepare(plan)


def test_what_the_fake_refuses() -> None:
    """A launch that a device would refuse must not pass here."""
    backend = HipEmulated(CPU)
    plan = COPIES["gather"]().plan()
    (loaded,) = backend._kernels.functions([RowsKernel(plan)])
    refused_by = fake_driver().runtime.hipModuleLaunchKernel
    argument = ctypes.create_string_buffer(4096)
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
    for grid, block in (((0, 1), 256), ((1, 1), 2048), ((1, 65536), 256), ((1 << 24, 1), 256)):
        assert refused_by(loaded[1], *grid, 1, block, 1, 1, 0, 0, pointers, None) == 1
    assert refused_by(loaded[1], 1, 1, 1, 256, 1, 1, 0, 0, None, None) == 1


# Devices, streams, captures, processes


class OtherCard(HostCard):
    """A device that is current only where it was made so, with streams."""

    entered = inside = 0

    @contextmanager
    def current(self) -> Iterator[None]:
        OtherCard.entered = OtherCard.entered + 1
        OtherCard.inside = OtherCard.inside + 1
        yield
        OtherCard.inside -= 1

    def number(self, stream: Any) -> int | None:
        if not OtherCard.inside:
            return None
        return 0x5EED if stream is None else raw_stream(stream)


class HipOnOther(HipEmulated):
    find_card = staticmethod(OtherCard)


def test_a_launch_makes_its_device_current_and_takes_the_stream() -> None:
    backend = HipOnOther(CPU)
    copied = COPIES["gather"]()
    launch(backend, copied)
    # Loading, launching.
    assert (OtherCard.entered, last_launch()[1]) == (2, 0x5EED)
    stream: Any = SimpleNamespace(cuda_stream=0xCAFE)
    launch(backend, copied, stream=stream)
    assert (OtherCard.entered, last_launch()[1]) == (3, 0xCAFE)


def test_nothing_is_loaded_during_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = HipOnOther(CPU)
    copied = COPIES["gather"]()
    reason = "same call once before the capture"
    with monkeypatch.context() as patched, refused(Unsupported, reason, watch=copied.dst.tensors):
        patched.setattr(rows_launch, "capturing", lambda device: True)
        with failing("hiprtcCompileProgram", 6):
            launch(backend, copied)
    backend.prepare(copied.plan())
    monkeypatch.setattr(rows_launch, "capturing", lambda device: True)
    launch(backend, copied)  # what was loaded before can be captured


def test_a_card_asks_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the name cuda, by the functions that a torch for ROCm has."""
    rocm(monkeypatch, "MI210", "gfx90a")
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 1, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda at: 7 + at, raising=False)
    cards = [Card(torch.device("cuda", n), Mock()) for n in (0, 1)]
    assert [card.number(None) for card in cards] == [None, 8]
