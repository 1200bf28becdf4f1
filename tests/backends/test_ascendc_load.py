# SPDX-License-Identifier: Apache-2.0
"""The library of the AscendC kernel: where it is looked for, what is refused of it, its launches.

The libraries here are built by g++: the host's part of the real one over a made-up platform,
the emulation, and some with one thing wrong.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from portakv import TransferError
from portakv.backends import _ascend_kernel as _ascendc
from portakv.backends._ascend_kernel import find_kernel, open_kernel
from portakv.runtime.devices import Unusable
from portakv_conformance.record import RunRecord
from portakv_conformance.report import support
from portakv_conformance.simdev import build

ASCEND = Path(__file__).resolve().parents[2] / "native" / "ascend"
SCRIPT = ["bash", str(ASCEND / "emulation" / "run.sh"), "library"]
pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None, reason="g++ is not installed: no library can be built"
)
# CANN's header as far as host.cpp wants it, and what bisheng would have compiled.
PLATFORM = """
#include <cstdint>
#ifndef CORES
#define CORES 40
#endif
namespace platform_ascendc {
enum class CoreMemType { UB };
struct PlatformAscendCManager {
    static PlatformAscendCManager* GetInstance() { static PlatformAscendCManager it; return &it; }
    void GetCoreMemSize(CoreMemType, uint64_t& bytes) { bytes = 192 << 10; }
    uint32_t GetCoreNumAiv() { return CORES; }
};
}
"""
LAUNCH = """
#include "copy.h"
int64_t launched[18];
extern "C" const int64_t* told() { return launched; }
extern "C" void portakv_ascend_launch(
    const portakv::Copy* copy, uint32_t blocks, uint32_t ub_bytes, void* stream) {
    static_assert(sizeof(*copy) == 15 * 8, "a Copy is 15 numbers");
    __builtin_memcpy(launched, copy, sizeof *copy);
    launched[15] = blocks;
    launched[16] = ub_bytes;
    launched[17] = (int64_t)stream;
}
"""
CMAKE = """
set(home ${CMAKE_CURRENT_LIST_DIR})
function(ascendc_library name kind)
  add_library(${name} ${kind} ${home}/launch.cpp)
endfunction()
function(ascendc_include_directories name)
  target_include_directories(${name} ${ARGN})
endfunction()
"""
SOUND = {
    "portakv_ascend_abi": f"unsigned portakv_ascend_abi() {{ return {_ascendc.ABI}; }}",
    "portakv_ascend_emulated": "unsigned portakv_ascend_emulated() { return EMULATED; }",
    "portakv_ascend_platform": (
        "int portakv_ascend_platform(unsigned* blocks, unsigned* bytes) "
        "{ *blocks = 8; *bytes = 4096; return 0; }"
    ),
    "portakv_ascend_rows": (
        "int portakv_ascend_rows(const void*, unsigned, unsigned, void*) { return 507011; }"
    ),
    "portakv_emulation_lend": "void portakv_emulation_lend(const void*, unsigned) {}",
}
Built = Callable[..., str]


@pytest.fixture
def built(tmp_path: Path) -> Built:
    """Builds a library of some text and returns its path."""

    def build(text: str, *flags: str, name: str = "libportakv_ascend.so") -> str:
        source, target = tmp_path / "library.cpp", tmp_path / name
        source.write_text(text)
        command = ["g++", "-std=c++17", "-shared", "-fPIC", str(source), "-o", str(target), *flags]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return str(target)

    return build


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No library is named or lies in the tree; what a test loads is asked anew."""
    monkeypatch.delenv(_ascendc.VARIABLE, raising=False)
    monkeypatch.setattr(_ascendc, "files", lambda package: tmp_path / "native")
    yield
    _ascendc.KERNELS.clear()


def sound(emulated: int = 0, **changed: str) -> str:
    """A library's text with some functions in other words, or without them."""
    functions = {**SOUND, **changed}
    return f'#define EMULATED {emulated}\nextern "C" {{\n' + "\n".join(functions.values()) + "\n}\n"


def refusal(path: str, emulated: bool = False) -> str:
    """Why a library is refused."""
    with pytest.raises(Unusable) as raised:
        open_kernel(path, emulated)
    return str(raised.value)


# Where it is looked for


@pytest.fixture
def in_place(built: Built, tmp_path: Path) -> None:
    """A library where run_in_cann.sh leaves it."""
    lib = tmp_path / "native" / "lib"
    lib.mkdir(parents=True)
    shutil.copy(built(sound()), lib)


def test_the_place_where_run_in_cann_leaves_it(in_place: None) -> None:
    kernel, told = find_kernel(False)
    assert kernel is not None
    assert (kernel.blocks, kernel.ub_bytes, kernel.emulated) == (8, 4096, False)
    assert told == "by the AscendC kernel in libportakv_ascend.so"
    # What lies there and cannot be used was not asked for: the ops serve, and it is said why.
    kernel, told = find_kernel(True)
    assert kernel is None
    assert told.startswith("by its ops, since of the AscendC kernel libportakv_ascend.so is for an")
    script, cmake = ((ASCEND / x).read_text() for x in ("run_in_cann.sh", "CMakeLists.txt"))
    assert '--install "$work" --prefix "$here/lib"' in script
    assert "install(TARGETS portakv_ascend portakv_ascend_kernel DESTINATION .)" in cmake


def test_the_variable_goes_first(
    in_place: None, built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(_ascendc.VARIABLE, built(sound(), name="mine.so"))
    assert find_kernel(False)[1] == "by the AscendC kernel in mine.so"


# What is refused

ELSE = "libportakv_ascend.so"


@pytest.mark.parametrize(
    ("text", "emulated", "told"),
    [
        (sound(portakv_ascend_abi="unsigned portakv_ascend_abi() { return 7; }"), False,
         f"{ELSE} has the interface 7, and 1 is launched here; build it again, from native/ascend "
         "of this release"),
        *((sound(emulated=1, **{name: ""}), True,
           f"{ELSE} has no function {name}; build it again") for name in SOUND),
        (sound(portakv_ascend_platform=(
            "int portakv_ascend_platform(unsigned*, unsigned*) { return 1; }")), False,
         f"{ELSE} found no vector cores, or none with a unified buffer (code 1)"),
        (sound(emulated=1), False, f"{ELSE} emulates the kernel on a CPU, and this NPU is real"),
        (sound(), True, f"{ELSE} is for an NPU, and this one is emulated"),
    ],
    ids=["interface", *SOUND, "platform", "emulation for a real NPU", "the other way round"],
)  # fmt: skip
def test_a_library_is_refused(text: str, emulated: bool, told: str, built: Built) -> None:
    assert refusal(built(text), emulated).startswith(told)


def test_a_library_that_it_needs_and_that_is_missing(built: Built, tmp_path: Path) -> None:
    built('extern "C" int aclInit() { return 0; }', name="libascendcl.so")
    uses = 'extern "C" int aclInit();\nint used = aclInit();\n'
    path = built(uses + sound(), f"-L{tmp_path}", "-lascendcl")
    (tmp_path / "libascendcl.so").unlink()
    assert refusal(path) == (
        "libportakv_ascend.so cannot be loaded (libascendcl.so: cannot open shared object file: No "
        "such file or directory); source CANN's set_env.sh, or build it again, from native/ascend "
        "of this release"
    )


def test_a_file_that_is_no_library(tmp_path: Path) -> None:
    (tmp_path / "rows.so").write_text("no ELF")
    assert "rows.so cannot be loaded (" in refusal(str(tmp_path / "rows.so"))
    assert "there is no such file" in refusal(str(tmp_path))


# Launches


def test_a_launch_that_is_refused_tells_its_code(built: Built) -> None:
    kernel = open_kernel(built(sound()), False)
    with pytest.raises(TransferError, match=r"in libportakv_ascend.so returned 507011; the copy"):
        kernel.launch(bytes(15 * 8), (), 0)


def test_the_real_library_s_host_part(built: Built, tmp_path: Path) -> None:
    """host.cpp as it is, over a made-up platform: the loader takes it, arguments arrive."""
    header = tmp_path / "tiling" / "platform" / "platform_ascendc.h"
    header.parent.mkdir(parents=True)
    header.write_text(PLATFORM)
    flags = "-Wall", "-Wextra", "-Werror", f"-I{tmp_path}", f"-I{ASCEND}"
    words = str(ASCEND / "host.cpp"), *flags
    path = built(LAUNCH, *words)
    kernel = open_kernel(path, False)
    assert (kernel.blocks, kernel.ub_bytes, kernel.emulated) == (40, 192 << 10, False)
    numbers = list(range(100, 115))
    kernel.launch(bytes((ctypes.c_int64 * 15)(*numbers)), (), 2**40 + 8)
    told = kernel.library.told
    told.restype = ctypes.POINTER(ctypes.c_int64 * 18)
    assert list(told().contents) == [*numbers, 40, 192 << 10, 2**40 + 8]
    with pytest.raises(TransferError, match=r"returned 1; the copy was not made, or in part\. 1"):
        kernel.launch(bytes(15 * 8), (), 0)  # a launch without a nest
    none = built(LAUNCH, *words, "-DCORES=0", name="none.so")
    assert "none.so found no vector cores" in refusal(none)


@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")
def test_cmake_builds_and_installs_a_library_that_loads(tmp_path: Path) -> None:
    """CMakeLists.txt over a made-up CANN, whose compiler of kernels is g++ with another launch."""
    cann = tmp_path / "cann"
    texts = {
        "include/tiling/platform/platform_ascendc.h": PLATFORM,
        "tools/tikcpp/ascendc_kernel_cmake/launch.cpp": LAUNCH,
        "tools/tikcpp/ascendc_kernel_cmake/ascendc.cmake": CMAKE,
    }
    for name, text in texts.items():
        (cann / name).parent.mkdir(parents=True, exist_ok=True)
        (cann / name).write_text(text)
    (cann / "lib64").mkdir()
    for name in ("ascendcl", "platform", "tiling_api"):
        library = str(cann / "lib64" / f"lib{name}.so")
        subprocess.run(["g++", "-shared", "-x", "c++", "/dev/null", "-o", library], check=True)
    work, lib = str(tmp_path / "work"), str(tmp_path / "native" / "lib")
    mode = ["-DRUN_MODE=npu", f"-DASCEND_CANN_PACKAGE_PATH={cann}"]
    for words in (
        ["-S", str(ASCEND), "-B", work, *mode],
        ["--build", work, "--target", "portakv_ascend"],
        ["--install", work, "--prefix", lib],
    ):
        done = subprocess.run(["cmake", *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    shutil.rmtree(work)  # what is installed stands alone
    kernel, told = find_kernel(False)
    assert kernel is not None
    assert (told, kernel.blocks) == ("by the AscendC kernel in libportakv_ascend.so", 40)
    kernel.launch(bytes((ctypes.c_int64 * 15)(*range(1, 16))), (), 0)


@pytest.fixture(scope="module")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The library that ``run.sh library`` builds for a simulated NPU."""
    path = tmp_path_factory.mktemp("kernel") / "libportakv_ascend.so"
    done = subprocess.run([*SCRIPT, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"PORTAKV_ASCENDC={path} names it for a simulated NPU" in done.stdout
    return str(path)


def test_the_emulation_launches_nothing_by_itself(emulation: str) -> None:
    kernel = open_kernel(emulation, True)
    assert kernel.emulated
    numbers = bytes((ctypes.c_int64 * 15)(1, *[0] * 12, 1, 0))
    with pytest.raises(TransferError, match="returned 2"):
        kernel.launch(numbers, [(64, 8, True)], 0)
    done = subprocess.run(SCRIPT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == "run.sh library was not told where to; name a file.\n"


@pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))
@pytest.mark.parametrize("by", ["kernel", pytest.param("ops", marks=pytest.mark.full)])
def test_the_command_of_docs_hardware_judges_the_kernel(
    by: str, emulation: str, tmp_path: Path
) -> None:
    """Here on the simulated device; the report says by what copies went."""
    done = subprocess.run(
        [sys.executable, "-m", "portakv", "conform", "ascend", "--device", "simdev:npu",
         "--profile", "core", "--only", "cases/test_core.py::test_rows_move[gather-int32-1]",
         "--report", str(tmp_path)],
        env={**os.environ, _ascendc.VARIABLE: emulation if by == "kernel" else ""},
        capture_output=True, text=True,
    )  # fmt: skip
    told = done.stdout + done.stderr
    assert re.search(r"\b\d+ passed in ", told), told
    report = (tmp_path / "conformance.json").read_text()
    said, device = json.loads(report)["environment"], support.device(RunRecord.read(report))
    if by == "ops":
        assert said["carried out by"] == "the ops of torch_npu"
        assert "library" not in said
        assert device == "npu, emulated"
        return
    assert "copies go by the AscendC kernel in libportakv_ascend.so, emulated" in report
    assert said["carried out by"] == "the AscendC kernel"
    digest = hashlib.sha256(Path(emulation).read_bytes()).hexdigest()
    assert said["library"] == {"libportakv_ascend.so": digest}
    assert device == "npu, emulated, by the AscendC kernel"
