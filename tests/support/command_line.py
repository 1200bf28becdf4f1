# SPDX-License-Identifier: Apache-2.0
"""Commands run in process, and small backends that answer in each possible way."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from portakv.backends.base import Backend, Decision
from portakv.backends.reference import Reference
from portakv.cli import main
from portakv.registry.registry import REGISTRY, register_backend
from support import ready
from support.small_backends import small_backend

#: vLLM flash attention to the default chunk.
FOUNDING = ("layer | kv block token head dim", "kv layer token (head dim)")


class Ran(NamedTuple):
    """The output and the exit status of a command."""

    code: int
    out: str
    err: str


def run(*words: str) -> Ran:
    """Run `portakv` with these words. What is not understood raises SystemExit."""
    out = io.StringIO()
    err = io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(words)
    return Ran(code, out.getvalue(), err.getvalue())


def run_json(*words: str) -> Any:
    """Return the output of a command with --json, which is JSON alone."""
    ran = run(*words, "--json")
    assert (ran.code, ran.err) == (0, "")
    return json.loads(ran.out)


def python(*words: str, **environment: str | None) -> str:
    """Return the output of Python with these words, in a separate process where no backend is
    forced. Variables of the environment are changed (None: unset)."""
    done = ready.run(*words, env=_variables(environment))
    assert done.returncode == 0, done.stderr
    return done.stdout


def new_python(*words: str, **environment: str) -> str:
    """Return the same of a new Python, for variables that its loader reads."""
    command = [sys.executable, *words]
    done = subprocess.run(command, capture_output=True, text=True, env=_variables(environment))
    assert done.returncode == 0, done.stderr
    return done.stdout


def _variables(changed: Mapping[str, str | None]) -> dict[str, str]:
    unset = {"PORTAKV_BACKEND": None, "TRITON_INTERPRET": None}
    values = {**os.environ, **unset, **changed}
    return {name: value for name, value in values.items() if value is not None}


def bash(script: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script of the repository, under this Python."""
    around = {**os.environ, "PYTHON": sys.executable, **environment}
    return subprocess.run(["bash", script, *words], capture_output=True, text=True, env=around)


def rejection(backend: type[Backend], device: torch.device) -> str:
    """Return the reason why a backend rejects a device."""
    decision = backend.probe(device)
    assert not decision.accepted
    return decision.reason


def settle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set 80 columns without colours, and force nothing."""
    for name in ("PORTAKV_BACKEND", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "80")


@contextmanager
def registered(**backends: type[Backend] | str) -> Iterator[None]:
    """Register backends by name for a while."""
    names: list[str] = []
    try:
        for name, target in backends.items():
            register_backend(name, target)
            names.append(name)
        yield
    finally:
        for name in names:
            REGISTRY.unregister(name)


class Absent(Reference):
    """Rejects every device."""

    name = "absent"

    @classmethod
    def probe(cls, device: torch.device) -> Decision:
        return Decision(cls.name, False, "its driver [v2] is not installed")


#: Accepts a device, but only plans that 16-byte accesses suit.
Shy = small_backend("shy", alignment=16)
#: Accepts any plan in `check`, and only the self-check's plan in `prepare`.
Late = small_backend("late", refuses=lambda plan: plan.nests[0].run != 2 * 32 * 2)
