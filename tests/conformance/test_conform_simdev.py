# SPDX-License-Identifier: Apache-2.0
"""The simulated device, each time in a separate process: torch takes one such device for good."""

from __future__ import annotations

import fcntl
import os
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support import simulated
from support.conform_runs import ROOT, python

from portakv_conformance.simdev import build

MODULES = "conformance/test_simdev_device.py", "copy/test_copies.py", "copy/test_ordering.py"
pytestmark = pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))
PYTEST = "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider"
run = partial(python, SIMDEV_NAME="simdev")


def test_the_simulated_device_is_compiled() -> None:
    """The one test that fails if the compiler does; those that need the device are skipped."""
    assert (why := simulated.built()) is None, why


ONE = "test_the_simulated_device_is_compiled"


def test_if_the_compiler_fails_one_test_fails_and_the_others_are_skipped(tmp_path: Path) -> None:
    """It is called once. Without any compiler no test fails."""
    compiler = tmp_path / "compiler"
    log = tmp_path / "log"
    compiler.write_text(f"#!/bin/sh\necho called >>{log}\necho 'error: no room' >&2; exit 1\n")
    compiler.chmod(0o755)
    words = [*PYTEST, "-rs", "-k", f"{ONE} or says_what_it_is or padding_and_block_tables"]
    files = "conformance/test_conform_simdev.py", "backends/test_mlu.py", MODULES[0]
    modules = [str(ROOT / "tests" / file) for file in files]
    clean: Any = {"PORTAKV_CACHE_DIR": str(tmp_path), simulated.VARIABLE: ""}
    done = python(*words, *modules, CXX=str(compiler), **clean)
    assert re.search(r"^1 failed, (\d+ passed, )?[1-9]\d* skipped", done.stdout, re.MULTILINE), done
    assert "compile the simulated device, got an error (error: no room)" in done.stdout
    assert log.read_text().count("called") == 2  # its version, and the device
    done = python(*words, *modules, CXX=str(tmp_path / "none"), **clean)
    assert "no C++ compiler" in done.stdout
    assert "failed" not in done.stdout


@pytest.mark.parametrize(
    ("name", "chosen"),
    [("npu", "waits_for"), pytest.param("mlu", "freed", marks=pytest.mark.full)],
)
@pytest.mark.full
def test_the_device_under_another_name(name: str, chosen: str) -> None:
    words = [*PYTEST, "-m", "simdev", "-k", f"name or chooses or {chosen}"]
    done = run(*words, *(str(ROOT / "tests" / module) for module in MODULES), SIMDEV_NAME=name)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"^\d\d+ passed", done.stdout, re.MULTILINE), done.stdout
    assert "skipped" not in done.stdout


LOAD = "from portakv_conformance import simdev; print(simdev.available()); simdev.load()"
RENAME = "import torch; torch.utils.rename_privateuse1_backend('acme_card')\n"


@pytest.mark.parametrize(
    ("before", "compiler", "available", "error"),
    [
        ("", "/nowhere/g++", r"The simulated device .* no C\+\+ compiler .*CXX=", "set CXX"),
        pytest.param(
            "",
            "false",
            "None\n",
            r"Expected \S*false to compile the simulated device, got an error.*C\+\+20",
            marks=pytest.mark.full,
        ),
        pytest.param(
            RENAME,
            "g++",
            "Another package has made 'acme_card'",
            "Another package",
            marks=pytest.mark.full,
        ),
    ],
    ids=["no compiler", "a compiler that fails", "another package in its place"],
)
def test_a_device_that_cannot_be_had_is_a_clear_error(
    before: str, compiler: str, available: str, error: str, tmp_path: Path
) -> None:
    done = run("-c", before + LOAD, CXX=compiler, PORTAKV_CACHE_DIR=str(tmp_path))
    assert done.returncode == 1
    assert re.match(available, done.stdout)
    assert re.search(f"SimulatedDeviceError: .*{error}", done.stderr, re.DOTALL)


@pytest.mark.full
def test_processes_that_start_together_build_it_once(tmp_path: Path) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text(
        "#!/bin/sh\n"
        '[ "$1" = --version ] && exit\n'
        f"echo built >>{tmp_path}/log; sleep 1\n"
        'while [ "$1" != -o ]; do shift; done; echo library >"$2"\n'
    )
    compiler.chmod(0o755)
    code = (
        "from portakv_conformance.simdev import build\n"
        "build.ctypes.CDLL = lambda path: print(open(path).read())\n"
        "build.load_library()"
    )
    retained = str(tmp_path / "kept")
    with ThreadPoolExecutor(3) as threads:
        several = [
            threads.submit(run, "-c", code, CXX=str(compiler), PORTAKV_CACHE_DIR=retained)
            for _ in range(3)
        ]
    assert [done.result().stdout for done in several] == ["library\n\n"] * 3
    assert (tmp_path / "log").read_text() == "built\n"


def lock_of(folder: Path) -> int:
    """Return a descriptor of the builders' lock file, which has no lock."""
    return os.open(folder / "simdev.lock", os.O_RDWR | os.O_CREAT, 0o600)


def test_a_process_that_was_forked_meanwhile_does_not_keep_the_lock(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It has the same open file, as a copy of the descriptor has."""
    monkeypatch.setenv("PORTAKV_CACHE_DIR", str(tmp_path))
    other = lock_of(tmp_path)
    path = os.path.realpath(tmp_path / "simdev.lock")
    opened = dict[int, str]()
    with build.one_builder():
        for number in map(int, os.listdir("/proc/self/fd")):
            with suppress(OSError):
                opened[number] = os.readlink(f"/proc/self/fd/{number}")
        inherited = [os.dup(x) for x, name in opened.items() if name == path and x != other]
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert len(inherited) == 1
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    for descriptor in (*inherited, other):
        os.close(descriptor)


TOUCH = """
import ctypes
x = torch.zeros(4, device=DEVICE); torch.accelerator.synchronize()
ctypes.string_at(x.data_ptr(), 4)
"""
FAULT = """
x = torch.zeros(4, device=DEVICE); y = x[torch.tensor([9], device=DEVICE)]
e = torch.Event(DEVICE); e.record()
while not e.query(): pass
"""
FORK = """
import os, sys
x = torch.zeros(4, device=DEVICE)
if os.fork():
    os._exit(os.waitstatus_to_exitcode(os.wait()[1]))
try:
    x + 1
except RuntimeError as error:
    print(error, file=sys.stderr, flush=True); os._exit(7)
"""


@pytest.mark.parametrize(
    ("code", "ended", "expected"),
    [
        pytest.param(
            TOUCH,
            -11,
            "the host touched memory of the simulated device outside of a job",
            id="the host touches device memory",
        ),
        pytest.param(
            FAULT,
            0,
            "aten::index on stream 0 of simdev:0 failed",
            id="a fault is reported at the end",
        ),  # nothing waited for it
        pytest.param(FORK, 7, "'spawn'", id="a forked process", marks=pytest.mark.full),
    ],
)
def test_what_is_wrong_is_told(code: str, ended: int, expected: str) -> None:
    done = run("-c", f"import torch; from support.simdev_cases import DEVICE\n{code}")
    assert done.returncode == ended or done.returncode < 0 > ended, done.stderr
    assert expected in done.stderr


@pytest.mark.slow
def test_the_suite_fails_every_time_without_the_connectors_wait() -> None:
    suite = [
        *PYTEST,
        "-x",
        "--pyargs",
        "portakv_conformance",
        "--portakv-backend=reference",
        "--portakv-device=simdev",
        "-k",
        "test_a_copy_waits_for_its_producer and side",
    ]
    whole = run(*suite)
    assert whole.returncode == 0, whole.stdout
    for seed in range(100):
        done = run(*suite, "-p", "support.no_wait", "--portakv-seed", str(seed))
        assert done.returncode == 1, done.stdout
        assert "1 failed" in done.stdout
