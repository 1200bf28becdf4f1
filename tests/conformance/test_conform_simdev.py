# SPDX-License-Identifier: Apache-2.0
"""The simulated device, each time in a process of its own: torch takes one such device for good."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from support.conform_runs import python

from portakv_conformance.simdev import build

HERE = Path(__file__).parent
why_not = build.missing()
COPY = HERE.parent / "copy"
MODULES = [HERE / "test_simdev_device.py", COPY / "test_copies.py", COPY / "test_ordering.py"]
pytestmark = pytest.mark.skipif(why_not is not None, reason=why_not or "")


run = partial(python, SIMDEV_NAME="simdev")


@pytest.mark.parametrize(
    ("name", "chosen"),
    [("npu", "name or chooses or waits_for"), ("mlu", "name or chooses or freed")],
)
def test_the_device_under_another_name(name: str, chosen: str) -> None:
    words = ("-m", "pytest", "-q", "-n0", "--no-header", "-p", "no:cacheprovider", "-m", "simdev")
    done = run(*words, *map(str, MODULES), "-k", chosen, SIMDEV_NAME=name)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"^\d\d+ passed", done.stdout, re.MULTILINE), done.stdout
    assert "skipped" not in done.stdout


@pytest.mark.parametrize("compiler", ["/nowhere/g++", "false"])
def test_no_compiler_is_a_clear_error(compiler: str, tmp_path: Path) -> None:
    code = "from portakv_conformance import simdev; print(simdev.available()); simdev.load()"
    done = run("-c", code, CXX=compiler, PORTAKV_CACHE_DIR=str(tmp_path))
    assert done.returncode == 1
    assert "SimulatedDeviceError: " in done.stderr
    if compiler == "false":
        assert done.stdout == "None\n"
        assert re.search(r"false failed to compile the simulated device.*C\+\+20", done.stderr)
    else:
        assert re.match(r"The simulated device .* no C\+\+ compiler .*CXX=", done.stdout)
        assert "set CXX" in done.stderr


def test_another_package_in_its_place_is_a_clear_error() -> None:
    code = (
        "import torch; torch.utils.rename_privateuse1_backend('acme_card')\n"
        "from portakv_conformance import simdev; print(simdev.available()); simdev.load()"
    )
    done = run("-c", code)
    assert done.returncode == 1
    assert done.stdout.startswith("Another package has made 'acme_card'")
    assert "SimulatedDeviceError: Another package" in done.stderr


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
    environment = {**os.environ, "CXX": str(compiler), "PORTAKV_CACHE_DIR": str(tmp_path / "kept")}
    command = [sys.executable, "-c", code]
    several = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert [process.communicate(timeout=120)[0] for process in several] == ["library\n\n"] * 3
    assert (tmp_path / "log").read_text() == "built\n"


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
    ("code", "ended", "told"),
    [
        (TOUCH, -11, "the host touched memory of the simulated device outside of a job"),
        (FAULT, 0, "aten::index on stream 0 of simdev:0 failed"),  # nothing waited for it
        (FORK, 7, "'spawn'"),
    ],
    ids=["the host touches device memory", "a fault is told at the end", "a forked process"],
)
def test_what_is_wrong_is_told(code: str, ended: int, told: str) -> None:
    done = run("-c", f"import torch; from support.simdev_cases import DEVICE\n{code}")
    assert (done.returncode < 0) if ended < 0 else (done.returncode == ended), done.stderr
    assert told in done.stderr


@pytest.mark.slow
def test_the_suite_fails_every_time_without_the_connectors_wait() -> None:
    suite = ["-m", "pytest", "-q", "-x", "-n0", "-p", "no:cacheprovider", "--pyargs",
             "portakv_conformance", "--portakv-backend", "reference", "--portakv-device", "simdev",
             "-k", "test_a_copy_waits_for_its_producer and side"]  # fmt: skip
    whole = run(*suite)
    assert whole.returncode == 0, whole.stdout
    for seed in range(100):
        done = run(*suite, "-p", "support.no_wait", "--portakv-seed", str(seed))
        assert done.returncode == 1, done.stdout
        assert "1 failed" in done.stdout
