# SPDX-License-Identifier: Apache-2.0
"""Builds the C++ of emulations with the machine's compiler, once for each source and compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from portakv.runtime import kernel_cache


class CompilerError(Exception):
    """A compiler failed; the text is the first of its errors."""


def compiler(*names: str) -> str | None:
    """Return the C++ compiler: ``CXX``, else the first installed one of the names, else None."""
    named = os.environ.get("CXX")
    return next(filter(None, map(shutil.which, [named] if named else names)), None)


def built(command: Sequence[str], sources: Sequence[str]) -> bytes:
    """Return the library that a compiler makes, cached on disk by command and compiler version.

    A compiler has no limit of time: on a busy machine it takes many times as long.

    Args:
        command: the compiler and its arguments; the file that it writes is added.
        sources: the texts, and whatever else decides the library.

    Raises:
        CompilerError: the compiler failed.
    """
    reported = subprocess.run(
        [command[0], "--version"], capture_output=True, text=True, check=False
    )
    return kernel_cache.cached((*sources, *command, reported.stdout), lambda: _build(command))


def _build(command: Sequence[str]) -> bytes:
    with tempfile.TemporaryDirectory(prefix="portakv-cpp-") as folder:
        target = Path(folder, "library.so")
        try:
            done = subprocess.run(
                [*command, "-o", str(target)],
                capture_output=True,
                text=True,
                check=False,
                env={**os.environ, "LD_PRELOAD": ""},  # a sanitizer's runtime is not for it
            )
        except OSError as error:
            raise CompilerError(str(error)) from error
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or ["no output"]
            raise CompilerError(lines[0].strip())
        return target.read_bytes()


def in_memory(name: str, library: bytes) -> str:
    """Return the path from which this process can load a library that has no name on disk.

    So nothing can replace it between check and load. The file stays open: the loader would take a
    path that comes again for the library that it had.
    """
    handle = os.memfd_create(name)
    with os.fdopen(handle, "wb", closefd=False) as file:
        file.write(library)
    return f"/proc/{os.getpid()}/fd/{handle}"
