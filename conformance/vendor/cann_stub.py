# SPDX-License-Identifier: Apache-2.0
"""Stub libraries in place of CANN, built from what a torch_npu wheel asks for.

``cann_stub.c`` is the part that works. Every other symbol that the wheel leaves undefined becomes a
function that says its name and fails; no ``aclnn`` function exists at all.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

_SOURCE = Path(__file__).with_name("cann_stub.c")
# One library holds everything; the others, which torch_npu opens by name, lead to it.
_WHOLE = "ascendcl"
_NAMES = (
    "hccl",
    "acl_op_compiler",
    "ge_runner",
    "graph",
    "acl_tdt_channel",
    "opapi",
    "cust_opapi",
)
_FUNCTION = re.compile(r"^(?:acl|rt|Msprof|Hccl|hccl)[A-Za-z0-9_]*$")
# The adapter for ATB, which torch_npu loads only if NNAL is installed.
_OPTIONAL = "libop_plugin_atb.so"


class StubError(RuntimeError):
    """The stub cannot be built; the message is a sentence that says why."""


def build(packages: Path, folder: Path) -> list[str]:
    """Build the stub for the torch_npu in ``packages`` (a site-packages) below ``folder``; the
    names that raise. `StubError` if torch_npu is not there, or a tool is missing or failed."""
    wheel = packages / "torch_npu"
    result = (*wheel.glob("_C*.so"), *wheel.glob("lib/*.so"))
    libraries = [library for library in result if library.name != _OPTIONAL]
    if not libraries:
        raise StubError(
            f"Expected the libraries of torch_npu in {wheel}, got none. Install its wheel there."
        )
    for part in ("lib", "runtime", "compiler", "opp"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    wanted = _symbols(libraries, "--undefined-only") - _symbols(libraries, "--defined-only")
    text = _SOURCE.read_text(encoding="utf-8")
    object_file = folder / "cann_stub.o"
    run("gcc", "-Wall", "-Wextra", "-Werror", "-c", "-fPIC", "-o", str(object_file), str(_SOURCE))
    have = _symbols([object_file], "--defined-only", dynamic=False)
    raising = sorted(name for name in wanted - have if _FUNCTION.match(name))
    whole = folder / "cann_stub.c"
    whole.write_text(text + "".join(f"RAISES({name})\n" for name in raising), encoding="utf-8")
    lib = folder / "lib"
    run("gcc", "-O1", "-shared", "-fPIC", "-o", str(lib / f"lib{_WHOLE}.so"), str(whole))
    empty = folder / "empty.c"
    empty.write_text("", encoding="utf-8")
    for name in _NAMES:
        run(
            "gcc",
            "-shared",
            "-fPIC",
            str(empty),
            "-Wl,--no-as-needed",
            f"-L{lib}",
            f"-l{_WHOLE}",
            "-Wl,-rpath,$ORIGIN",
            "-o",
            str(lib / f"lib{name}.so"),
        )
    return raising


def environment(folder: Path) -> dict[str, str]:
    """Return the variables under which torch_npu finds the stub in ``folder``."""
    path = os.pathsep.join(filter(None, [str(folder / "lib"), os.environ.get("LD_LIBRARY_PATH")]))
    return {
        "ASCEND_HOME_PATH": str(folder),
        "ASCEND_OPP_PATH": str(folder / "opp"),
        "LD_LIBRARY_PATH": path,
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "TASK_QUEUE_ENABLE": "0",
    }


def _symbols(files: Iterable[Path], which: str, *, dynamic: bool = True) -> set[str]:
    options = ["-D", which] if dynamic else [which]
    reported = run("nm", "--format=posix", *options, *map(str, files))
    lines = (line.split() for line in reported.splitlines())
    return {line[0].partition("@")[0] for line in lines if len(line) > 1 and line[1] not in "vw"}


def run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    except FileNotFoundError as error:
        what = f"{command[0]}, which is not here; install gcc and binutils"
        raise StubError(f"The stub of CANN needs {what}.") from error
    except subprocess.CalledProcessError as error:
        raise StubError(f"{' '.join(command)} failed: {error.stderr.strip()}") from error
    return done.stdout
