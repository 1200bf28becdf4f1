# SPDX-License-Identifier: Apache-2.0
"""A stand-in for the CUDA runtime: what it registers, what it refuses, and the error it keeps."""

from __future__ import annotations

from mmap import PAGESIZE as PAGE
from typing import Any

import pytest

from portakv.host import _registration


class FakeLibrary:
    """Registers ranges, refuses a page a second time as CUDA does, and remembers its last error
    until it is read."""

    def __init__(self) -> None:
        self.registered: dict[int, tuple[int, int]] = {}  # by address: bytes, flags
        self.refuse: dict[int, int] = {}  # by number of a call of cudaHostRegister: its error
        self.sticky = 0  # the error that the next kernel launch would find
        self.calls = 0
        self.log: list[str] = []  # what happened, in order

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        self.calls += 1
        code = self.refuse.get(self.calls - 1, 0)
        first = address // PAGE
        last = (address + nbytes - 1) // PAGE
        for start, (length, _) in self.registered.items():
            if start // PAGE <= last and first <= (start + length - 1) // PAGE:
                code = 712
        if not code:
            self.registered[address] = nbytes, flags
            self.log.append("register")
        return self._end(code)

    def cudaHostUnregister(self, address: int) -> int:
        self.log.append("unregister")
        return self._end(0 if self.registered.pop(address, None) else 713)

    def cudaHostGetDevicePointer(self, out: Any, address: int, flags: int) -> int:
        if address not in self.registered:
            return self._end(1)
        out._obj.value = address + (1 << 40)
        return 0

    def cudaGetLastError(self) -> int:
        error = self.sticky
        self.sticky = 0
        return error

    def cudaGetErrorString(self, code: int) -> bytes:
        return b"refused by the test"

    def _end(self, code: int) -> int:
        self.sticky = code or self.sticky
        return code


def installed(patch: pytest.MonkeyPatch) -> FakeLibrary:
    """Put a stand-in in the place of the runtime."""
    library = FakeLibrary()
    patch.setattr(_registration, "device_runtime", lambda: (library, "cuda"))
    patch.setattr(_registration, "why_not", lambda: None)
    patch.setattr(_registration, "quiesce", lambda: library.log.append("quiesce"))
    return library


def absent(patch: pytest.MonkeyPatch) -> None:
    """Stand for a machine without a device."""
    patch.setattr(_registration, "why_not", lambda: "the test has taken every device away")


def claimed() -> int:
    """Return the number of page ranges that are registered or claimed."""
    return len(_registration.live)
