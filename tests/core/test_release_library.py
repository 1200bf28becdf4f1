# SPDX-License-Identifier: Apache-2.0
"""The libraries of a release: built by ziglang, for every Linux since glibc 2.17."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.core_build import ROOT, SCRIPT, SOURCES, copy_of_the_build, declared, loaded
from support.waits import LIMIT

from portakv.core.sources import hash_of

#: Seconds in which zig compiles the core, and first the standard library of C++, on a busy machine.
PATIENCE = 1700
pytestmark = [
    pytest.mark.wheel,
    pytest.mark.xdist_group("release library"),
    pytest.mark.timeout(2 * PATIENCE),  # two targets
]
ARCHITECTURES = ("x86_64", "aarch64")
#: A program of Debian that runs another processor's programs, and that processor's glibc.
EMULATOR = "qemu-aarch64-static"
FOREIGN = Path("/usr/aarch64-linux-gnu")
#: The names of versions of glibc's functions that a library needs.
VERSION = re.compile(rb"GLIBC_(\d+)\.(\d+)")


@pytest.fixture(scope="module")
def zig(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the release of ziglang that builds use."""
    environment = tmp_path_factory.mktemp("zig")
    venv.create(environment, with_pip=True, symlinks=True)
    run(environment / "bin/python", "-m", "pip", "install", "-q", loaded().ZIGLANG)
    return environment / "bin/python"


@pytest.fixture(scope="module")
def built(zig: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Architecture -> its library, and "again" -> the first one, built in another folder."""
    folder = tmp_path_factory.mktemp("built")
    tree = copy_of_the_build(folder / "another folder")
    # Both builds for one architecture may share the compiled C++ runtime.
    cache = os.environ.get("ZIG_GLOBAL_CACHE_DIR", str(folder / "cache"))
    builds = {name: (ROOT, name) for name in ARCHITECTURES}
    builds["again"] = (tree, ARCHITECTURES[0])
    with ThreadPoolExecutor(2) as pool:
        ended = []
        for name, (root, target) in builds.items():
            script = root / SCRIPT
            words = ["--target", target, "--output", str(folder / f"{name}.so")]
            ended.append(pool.submit(run, zig, script, *words, ZIG_GLOBAL_CACHE_DIR=cache))
        for each in ended:
            each.result()
    return {name: folder / f"{name}.so" for name in builds}


def run(*words: str | Path, **variables: str) -> str:
    """Run a command, and return what it prints; its output joins the failure."""
    done = subprocess.run(
        [str(word) for word in words],
        env={**os.environ, **variables},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, f"{words} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


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
    assert exported == declared()


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
    target = ["-target", "aarch64-linux-gnu.2.17"]
    run(zig, "-m", "ziglang", "cc", *target, "-O2", source, "-o", program, "-ldl")
    printed = run(EMULATOR, "-L", FOREIGN, program, built["aarch64"])
    assert printed == hash_of(SOURCES) + "\n"


def test_a_target_needs_ziglang(tmp_path: Path) -> None:
    """Also where a compiler is: a release is built the same everywhere."""
    script = ROOT / SCRIPT
    output = tmp_path / "library.so"
    done = subprocess.run(
        [sys.executable, "-S", str(script), "--target", "aarch64", "--output", str(output)],
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 1
    assert f"Run `pip install {loaded().ZIGLANG}`." in done.stderr
    assert not output.exists()
