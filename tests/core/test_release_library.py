# SPDX-License-Identifier: Apache-2.0
"""The libraries of a release: built by ziglang, for every Linux since glibc 2.17."""

from __future__ import annotations

import ctypes
import importlib
import platform
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.waits import LIMIT

from portakv.core.sources import hash_of

pytestmark = [pytest.mark.wheel, pytest.mark.xdist_group("release library")]
ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "native" / "core"
ARCHITECTURES = ("x86_64", "aarch64")
#: A program of Debian that runs another processor's programs, and that processor's glibc.
EMULATOR = "qemu-aarch64-static"
FOREIGN = Path("/usr/aarch64-linux-gnu")
#: The names of versions of glibc's functions that a library needs.
VERSION = re.compile(rb"GLIBC_(\d+)\.(\d+)")
DECLARED = re.compile(r"^PORTAKV_API [^;(]*?(\w+)\(", re.MULTILINE)


@pytest.fixture(scope="module")
def compile_core() -> Iterator[Any]:
    """build_backend/compile_core.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "build_backend"))
        module: Any = importlib.import_module("compile_core")
        yield module


@pytest.fixture(scope="module")
def zig(compile_core: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the release of ziglang that builds use."""
    environment = tmp_path_factory.mktemp("zig")
    venv.create(environment, with_pip=True, symlinks=True)
    run(environment / "bin/python", "-m", "pip", "install", "-q", compile_core.ZIGLANG)
    return environment / "bin/python"


@pytest.fixture(scope="module")
def built(zig: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Architecture -> its library, and "again" -> the first one, built in another folder."""
    folder = tmp_path_factory.mktemp("built")
    tree = folder / "another folder"
    shutil.copytree(ROOT / "build_backend", tree / "build_backend")
    shutil.copytree(SOURCES, tree / "native/core")
    (tree / "src/portakv/core").mkdir(parents=True)
    shutil.copy(ROOT / "portakv/core/sources.py", tree / "src/portakv/core")
    builds = {name: (ROOT, name) for name in ARCHITECTURES}
    builds["again"] = (tree, ARCHITECTURES[0])
    with ThreadPoolExecutor(2) as pool:
        ended = []
        for name, (root, target) in builds.items():
            script = root / "build_backend/compile_core.py"
            words = ["--target", target, "--output", str(folder / f"{name}.so")]
            ended.append(pool.submit(run, zig, script, *words))
        for each in ended:
            each.result()
    return {name: folder / f"{name}.so" for name in builds}


def run(*words: str | Path) -> str:
    """Run a command, and return what it prints; its output joins the failure."""
    done = subprocess.run(
        [str(word) for word in words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, f"{words} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


def test_the_tools_of_a_release_are_those_of_the_build(compile_core: Any) -> None:
    pins = (ROOT / ".ci/tools.txt").read_text(encoding="utf-8").splitlines()
    assert compile_core.ZIGLANG in pins


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_needs_no_newer_glibc(built: dict[str, Path], architecture: str) -> None:
    needed = {(int(x), int(y)) for x, y in VERSION.findall(built[architecture].read_bytes())}
    assert needed
    assert max(needed) <= (2, 17)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_exports_the_functions_of_the_header_alone(
    built: dict[str, Path], architecture: str
) -> None:
    if shutil.which("nm") is None:
        pytest.skip("there is no nm")
    listed = run("nm", "-D", "--defined-only", built[architecture]).splitlines()
    exported = {line.split()[-1] for line in listed}
    assert exported == set(DECLARED.findall((SOURCES / "core.h").read_text()))


def test_two_builds_have_the_same_bytes(built: dict[str, Path]) -> None:
    assert built["again"].read_bytes() == built[ARCHITECTURES[0]].read_bytes()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_says_nothing_of_its_folder(built: dict[str, Path], architecture: str) -> None:
    content = built[architecture].read_bytes()
    assert str(ROOT).encode() not in content
    assert hash_of(SOURCES).encode() in content


@pytest.mark.skipif(platform.machine() != "x86_64", reason="another processor")
def test_this_machine_loads_its_library(built: dict[str, Path]) -> None:
    assert ctypes.CDLL(str(built["x86_64"])).portakv_core_self_test() == 0


@pytest.mark.skipif(
    shutil.which(EMULATOR) is None or not FOREIGN.exists(),
    reason="apt-get install qemu-user-static libc6-arm64-cross",
)
def test_the_library_of_aarch64_passes_its_self_test(
    zig: Path, built: dict[str, Path], tmp_path: Path
) -> None:
    """Emulated: the order of writes that two threads see is this machine's, which is stricter."""
    program = tmp_path / "run_self_test"
    source = Path(__file__).with_name("run_self_test.c")
    compiler = [zig, "-m", "ziglang", "cc", "-target", "aarch64-linux-gnu.2.17"]
    run(*compiler, "-O2", source, "-o", program, "-ldl")
    printed = run(EMULATOR, "-L", FOREIGN, program, built["aarch64"])
    assert printed == hash_of(SOURCES) + "\n"


def test_a_target_needs_ziglang(compile_core: Any, tmp_path: Path) -> None:
    """Also where a compiler is: a release is built the same everywhere."""
    script = ROOT / "build_backend/compile_core.py"
    output = tmp_path / "library.so"
    done = subprocess.run(
        [sys.executable, "-S", str(script), "--target", "aarch64", "--output", str(output)],
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 1
    assert f"Run `pip install {compile_core.ZIGLANG}`." in done.stderr
    assert not output.exists()
