# SPDX-License-Identifier: Apache-2.0
"""Code alongside a real engine in a separate process, for facts of a whole process: the chosen
integration, the defaults of torch before the first use, workers that were forked or spawned."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from portakv.integrations import INTEGRATIONS
from support import ready
from support.waits import LIMIT

#: Settings of torch that an engine may have changed before PortaKV's first use.
_DEFAULTS = """
import torch
if "{name}" != "cuda":
    from portakv_conformance import simdev
    simdev.load("{name}")
torch.set_default_device("{name}")
torch.set_default_dtype(torch.bfloat16)
"""
#: The simulated device under a vendor's name, and a real one.
accelerators = pytest.mark.parametrize("name", ["mlu", pytest.param("cuda", marks=pytest.mark.gpu)])
#: Says with which exit codes workers ended that did the same ``work`` as their parent before.
_IN_WORKERS = """
if __name__ == "__main__":
    import multiprocessing

    work()
    codes = {}
    for how in ("fork", "spawn"):
        worker = multiprocessing.get_context(how).Process(target=work)
        worker.start()
        worker.join(240)
        codes[how] = worker.exitcode
    print(codes)
"""


def defaults(name: str) -> str:
    """Return code after which an accelerator is torch's default device, and bf16 its default
    dtype."""
    return _DEFAULTS.format(name=name)


def in_a_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new process, in which only ``environment`` chooses an integration."""
    chosen = {integration.variable for integration in INTEGRATIONS.values()}
    inherited = {name: value for name, value in os.environ.items() if name not in chosen}
    inherited["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    with TemporaryDirectory() as folder:
        script = Path(folder, "script.py")  # a file, since a spawned worker reads it again
        script.write_text(textwrap.dedent(code), encoding="utf-8")
        return ready.run(script, env=inherited | environment, timeout=LIMIT)


def answer(code: str, **environment: str) -> str:
    """Return the last line that code in a new process prints."""
    done = in_a_process(code, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().splitlines()[-1]


def check_in_workers(code: str, **environment: str) -> None:
    """Check that a forked and a spawned worker end well after their parent's first use. All do
    ``work()``, which the code defines."""
    ended = answer(textwrap.dedent(code) + _IN_WORKERS, **environment)
    assert ended == "{'fork': 0, 'spawn': 0}"
