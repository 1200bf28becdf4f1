# SPDX-License-Identifier: Apache-2.0
"""The checksum kernel has the sums of torch's operators, for parts of any shape.

Here g++ compiles its text; tests marked ``gpu`` run it on a device.
"""

from __future__ import annotations

import ctypes.util
import importlib.util
import logging
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.command_line import python
from support.core_cases import noise
from support.cuda_on_cpu import why_not
from support.sums_on_cpu import CPU, SMALL, HostDriver, LastTiles, ended_memory, host_kernel
from torch.cuda import _sleep

from portakv.errors import TransferError, Unsupported
from portakv.migrate import checksum
from portakv.migrate.checksum import (
    AXES,
    CUT,
    BoxSums,
    SumKernel,
    SummedPart,
    box_checksums,
    kernel_of,
    kernel_text,
    load_kernel,
)
from portakv.runtime import cuda, hip
from portakv.runtime.cuda import compile_kernel
from portakv.runtime.word_sums import AXIS, MODULUS, driver_of, key_of

pytestmark = pytest.mark.xdist_group("checksum-kernel")
needs_gxx = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
needs_nvrtc = pytest.mark.skipif(cuda.no_nvrtc() is not None, reason=str(cuda.no_nvrtc()))
FULL = pytest.mark.full
GPU = torch.device("cuda", 0)
DTYPES = [torch.int8, torch.bfloat16, torch.float32, torch.int64, torch.complex128]


def sums_by(kernel: SumKernel, parts: Sequence[SummedPart]) -> list[int]:
    """The checksums of numbers, which may repeat."""
    totals = [0] * (1 + max(part.number for part in parts))
    numbers, sums = kernel.sum_parts(parts)
    for number, value in zip(numbers, sums.tolist(), strict=True):
        totals[number] += value
    return [total % MODULUS for total in totals]


def sums_by_torch(parts: Sequence[SummedPart]) -> list[int]:
    """The same by the operators of torch, on the host."""
    sums = BoxSums()
    sums.add([part._replace(tensor=part.tensor.cpu()) for part in parts])
    return sums.results(1 + max(part.number for part in parts))


@st.composite
def drawn_parts(draw: st.DrawFn, device: torch.device = CPU) -> list[SummedPart]:
    """Parts of tensors, cut and turned: a few share numbers."""
    parts = []
    for _ in range(draw(st.integers(1, 4))):
        dtype = draw(st.sampled_from(DTYPES))
        shape = draw(st.lists(st.integers(1, 9), max_size=7).filter(few))
        nbytes = noise(*shape, dtype.itemsize, dtype=torch.uint8, seed=draw(st.integers(0, 99)))
        tensor = nbytes.to(device).view(dtype)[..., 0]
        for axis, n in enumerate(shape):
            step = draw(st.sampled_from([1, 1, 2]))
            at = draw(st.integers(0, min(n, 3)))
            tensor = tensor.narrow(axis, at, n - at)
            tensor = tensor[(slice(None),) * axis + (slice(None, None, step),)]
        tensor = tensor.permute(draw(st.permutations(range(len(shape)))))
        start = tuple(draw(st.integers(0, 1 << 33)) for _ in shape)
        unit = draw(st.sampled_from([4, 4, 2, 1]))
        parts.append(SummedPart(draw(st.integers(0, 3)), tensor, start, unit))
    return parts


def few(shape: Sequence[int]) -> bool:
    return torch.Size(shape).numel() <= 600


@pytest.fixture(scope="module")
def small() -> SumKernel:
    return host_kernel(SMALL)


@pytest.fixture(scope="module")
def usual() -> SumKernel:
    return host_kernel()


@needs_gxx
@given(drawn_parts())
def test_parts_have_the_sums_of_torch(small: SumKernel, parts: list[SummedPart]) -> None:
    assert sums_by(small, parts) == sums_by_torch(parts)


#: Parts with whole and partial tiles of the cut that devices use.
LARGE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "wide rows": lambda words: words.view(75, 4000),
    "rows of an odd length": lambda words: words.view(75, 4000)[:, :3999],
    "one row": lambda words: words,
    "one row from an odd address": lambda words: words[1:],
    "three rows": lambda words: words.view(3, -1),
    "narrow rows": lambda words: words.view(-1, 3),
    "columns": lambda words: words.view(75, 4000).T,
    "every second word": lambda words: words[::2],
    "four axes": lambda words: words.view(15, 20, 10, 100)[:, 3:, :9],
    "repeated rows": lambda words: words[:3000].expand(50, 3000),
    "half words": lambda words: words.view(torch.int16)[1:].view(-1, 599_999)[:, 1:],
    "bytes": lambda words: words[:75_000].view(torch.int8).view(-1, 3),
}


@needs_gxx
@pytest.mark.parametrize("case", LARGE)
def test_large_parts_have_the_sums_of_torch(usual: SumKernel, case: str) -> None:
    words = noise(300_000, 4, dtype=torch.uint8).view(torch.int32)[:, 0]
    tensor = LARGE[case](words)
    parts = [SummedPart(0, tensor, (7,) * tensor.ndim, 4)]
    assert sums_by(usual, parts) == sums_by_torch(parts)


@needs_gxx
def test_many_parts_are_one_launch_and_one_sum_for_each_number() -> None:
    driver = HostDriver()
    kernel = SumKernel(CPU, driver, SMALL)
    tensors = [noise(4, 1 + n % 7, dtype=torch.float32, seed=n) for n in range(200)]
    parts = [SummedPart(n // 2, x, (n, 0)) for n, x in enumerate(tensors)]
    parts.append(SummedPart(3, torch.zeros(0, 5), (0, 0)))
    assert sums_by(kernel, parts) == sums_by_torch(parts)
    assert len(driver.launches) == 1
    assert kernel.sum_parts([parts[-1]])[0] == []
    assert len(driver.launches) == 1


@needs_gxx
@pytest.mark.parametrize(("most", "launches"), [(1, 3), (300, 2), (1 << 20, 1)])
def test_copies_of_parts_are_limited(
    most: int, launches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Words of a transposed tensor do not lie side by side: 168 bytes each are copied."""
    monkeypatch.setattr(checksum, "MOST_COPIED", most)
    driver = HostDriver()
    kernel = SumKernel(CPU, driver, SMALL)
    tensors = [noise(14, 16, dtype=torch.int8, seed=n) for n in range(6)]
    tensors = [x[:, :12].T.contiguous().T if n % 2 else x[:, :12] for n, x in enumerate(tensors)]
    parts = [SummedPart(n, x, (0, 0)) for n, x in enumerate(tensors)]
    assert sums_by(kernel, parts) == sums_by_torch(parts)
    assert len(driver.launches) == launches


@needs_gxx
def test_more_axes_than_the_kernel_has_are_several_parts() -> None:
    tensor = noise(*[2] * (AXES + 4), dtype=torch.int32)
    parts = [SummedPart(0, tensor, (*range(tensor.ndim),))]
    kernel = host_kernel(SMALL)
    assert len(kernel.sum_parts(parts)[0]) == 8
    assert sums_by(kernel, parts) == sums_by_torch(parts)


@needs_gxx
@pytest.mark.parametrize("shape", [(1 << 33,), (1 << 20, 1 << 13), (3, 1 << 13, 1 << 20)])
def test_parts_of_more_words_than_32_bits_count(shape: tuple[int, ...]) -> None:
    """The last tile of a part that repeats one word: its positions alone decide the sum."""
    kernel = SumKernel(CPU, LastTiles(1), CUT)
    tensor = torch.full((1,), -5, dtype=torch.int32).expand(shape)
    (_, sums) = kernel.sum_parts([SummedPart(0, tensor, (1 << 40,) * len(shape))])
    # Axes of one stride stay in order: rows come before columns.
    key = 1
    lengths = LastTiles.lengths(shape, CUT)
    for axis, (extent, length) in enumerate(zip(shape, lengths, strict=True)):
        first = axis * AXIS + (1 << 40) + extent - length
        key *= sum(key_of(first + at) for at in range(length))
    assert sums.item() % MODULUS == -5 * key % MODULUS


@needs_gxx
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.int32])
@pytest.mark.parametrize("columns", [1, 7, 32, 33, 64])
@pytest.mark.parametrize("rows", [1, 3, 4, 29])
def test_nothing_outside_of_a_part_is_read(dtype: torch.dtype, columns: int, rows: int) -> None:
    """A read of the pages next to the memory would end the process."""
    nbytes = columns * rows * dtype.itemsize
    kernel = host_kernel(SMALL)
    for at_end in (True, False):
        with ended_memory(nbytes, at_end) as memory:
            memory.copy_(noise(nbytes, dtype=torch.uint8))
            parts = [SummedPart(0, memory.view(dtype).view(rows, columns), (1, 2))]
            assert sums_by(kernel, parts) == sums_by_torch(parts)


# The choice between the kernel and torch's operators


@needs_gxx
def test_parts_of_a_device_with_a_kernel_use_it(
    usual: SumKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    boxes = [(noise(5, 6, dtype=torch.float16), (1, 2)), (noise(3, dtype=torch.float64), (4,))]
    reference = box_checksums(boxes)
    driver = HostDriver()
    kernel = SumKernel(CPU, driver)
    monkeypatch.setattr(checksum, "kernel_of", lambda device: kernel)
    assert box_checksums(boxes) == reference
    assert len(driver.launches) == 1


def test_the_host_and_devices_without_a_driver_have_no_kernel(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert kernel_of(CPU) is None
    with caplog.at_level(logging.DEBUG, checksum.__name__):
        assert load_kernel(torch.device("xpu", 0), driver_of) is None
    assert "does not serve xpu devices" in caplog.text


FAULTS: dict[str, dict[str, str]] = {
    "none": {},
    "a factor of keys": {"0x94D049BB133111EBull": "0x94D049BB133111EDull"},
    "words without a sign": {"(u64)(i64)(int)part_of": "(u64)part_of"},
    "bytes without a sign": {"Single<signed char>": "Single<unsigned char>"},
    "the last rows": {"for (; row < tile.rows; row += lines)": "for (; false;)"},
    "the key of a single position": {" * shape.factor": ""},
}


@needs_gxx
@pytest.mark.parametrize("fault", FAULTS)
def test_a_kernel_with_wrong_sums_is_not_used(fault: str, caplog: pytest.LogCaptureFixture) -> None:
    """The fault "none" is the negative control."""
    kernel = load_kernel(CPU, lambda device: HostDriver(**FAULTS[fault]))
    assert (kernel is None) == (fault != "none")
    assert ("the kernel's sums are wrong" in caplog.text) == (fault != "none")


@pytest.mark.parametrize("error", [RuntimeError("the log"), TransferError("x"), OSError("y")])
def test_a_kernel_that_cannot_be_loaded_is_not_used(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(HostDriver):
        def load(self, source: str, names: Any) -> Any:
            raise error

    assert load_kernel(CPU, lambda device: Failing()) is None
    assert str(error) in caplog.text


def test_a_driver_that_is_missing_is_named() -> None:
    with pytest.raises(Unsupported, match="does not serve xpu devices"):
        driver_of(torch.device("xpu", 0))


def test_rocm_without_its_libraries_has_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    if ctypes.util.find_library("amdhip64"):
        pytest.skip("AMD's libraries are installed")
    with suppress(hip.DriverMissing):
        hip.driver()
        pytest.skip("a test before has loaded an emulated runtime")
    with pytest.raises(Unsupported, match=r"kernel of sums on cuda:0.*HIP runtime"):
        driver_of(GPU)


# Compilers and devices


@needs_nvrtc
@pytest.mark.parametrize(
    "architecture",
    [pytest.param(80, marks=pytest.mark.full), 90, pytest.param(100, marks=pytest.mark.full)],
)
def test_nvrtc_compiles_the_kernel(
    architecture: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PORTAKV_CACHE_DIR", str(tmp_path))
    assert compile_kernel(kernel_text(CUT), architecture).startswith(b"\x7fELF")


def disassembler() -> str | None:
    """``nvdisasm`` of Triton's wheel or of a CUDA toolkit."""
    spec = importlib.util.find_spec("triton")
    inside = Path(str(spec.origin)).parent / "backends/nvidia/bin/nvdisasm" if spec else None
    return str(inside) if inside and inside.exists() else shutil.which("nvdisasm")


@needs_nvrtc
@pytest.mark.skipif(disassembler() is None, reason="nvdisasm is not installed: pip install triton")
@pytest.mark.full
def test_machine_code_starts_the_loads_of_a_batch_together(tmp_path: Path) -> None:
    """Four loads of 16 bytes stand within few instructions, and no register is spilled."""
    path = tmp_path / "kernel.cubin"
    path.write_bytes(cuda.compile_text(kernel_text(CUT), "sm_90"))
    command = [str(disassembler()), str(path)]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    operations = re.findall(r"/\*[0-9a-f]{4,}\*/ +(?:@!?U?P\d+ )?([A-Z][A-Z0-9_.]*)", code)
    wide = [at for at, name in enumerate(operations) if name == "LDG.E.128"]
    assert min(last - first for first, last in zip(wide, wide[3:], strict=False)) < 20
    assert not [name for name in operations if name.startswith(("LDL", "STL"))]


# In a separate process: the library brings an LLVM along.
HIPRTC = """
import torch
torch.version.hip = "5.2.21153"
from portakv.migrate.checksum import CUT, kernel_text
from portakv.runtime import hip
print(hip.compile_text(hip.driver(), kernel_text(CUT), "gfx90a")[:4])
"""


@pytest.mark.skipif(
    ctypes.util.find_library("amdhip64") is None,
    reason="AMD's libamdhip64 is not installed: apt-get install libamdhip64-dev",
)
def test_amds_hiprtc_compiles_the_kernel() -> None:
    assert python("-c", HIPRTC).strip() == repr(b"\x7fELF")


@pytest.mark.gpu
def test_a_gpu_has_the_kernel() -> None:
    assert kernel_of(GPU) is not None


@pytest.mark.gpu
@given(drawn_parts(GPU))
def test_parts_on_a_gpu_have_the_sums_of_torch(parts: list[SummedPart]) -> None:
    kernel = kernel_of(GPU)
    assert kernel is not None
    assert sums_by(kernel, parts) == sums_by_torch(parts)


@pytest.mark.gpu
@pytest.mark.parametrize("case", LARGE)
def test_large_parts_on_a_gpu_have_the_sums_of_torch(case: str) -> None:
    words = noise(300_000, 4, dtype=torch.uint8).to(GPU).view(torch.int32)[:, 0]
    tensor = LARGE[case](words)
    kernel = kernel_of(GPU)
    assert kernel is not None
    parts = [SummedPart(0, tensor, (7,) * tensor.ndim, 4)]
    assert sums_by(kernel, parts) == sums_by_torch(parts)


@pytest.mark.gpu
def test_a_gpu_sums_after_the_work_of_the_current_stream() -> None:
    """The stream is busy while the parts are added, and nothing waits for it before the results."""
    stream = torch.cuda.Stream()
    tensors = [torch.zeros(1 << 18, dtype=torch.int32, device=GPU) for _ in range(64)]
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):  # loads the kernel, and takes memory for a table
        assert box_checksums([(x, (0,)) for x in tensors]) == [0] * 64
    torch.cuda.synchronize()
    sums = BoxSums()
    with torch.cuda.stream(stream):
        _sleep(1_000_000_000)  # about half a second
        for number, tensor in enumerate(tensors):
            tensor.fill_(number + 1)
        sums.add([SummedPart(number, x, (0,)) for number, x in enumerate(tensors)])
        assert not stream.query()
        results = sums.results(64)
    whole = [(torch.full((1 << 18,), number + 1, dtype=torch.int32), (0,)) for number in range(64)]
    assert results == box_checksums(whole)
