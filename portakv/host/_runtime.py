# SPDX-License-Identifier: Apache-2.0
"""The few calls of the CUDA or HIP runtime that register host memory.

A call that fails leaves its error in the runtime, where the next kernel launch finds it
(vLLM #51081), so each failure here is cleared at once. The library is the one that torch has
loaded: each copy of the runtime, as the one inside ``cuda.bindings``, has an error of its own.
"""

from __future__ import annotations

import ctypes
import os
import re
from contextlib import suppress
from functools import cache
from typing import Any

import torch

# cudaHostRegisterPortable and its siblings; HIP has the same numbers.
PORTABLE, MAPPED, READ_ONLY = 1, 2, 8
# cudaErrorInvalidValue, cudaErrorHostMemoryAlreadyRegistered and ...NotRegistered; HIP likewise.
INVALID, ALREADY, UNKNOWN = 1, 712, 713
_STEMS = {"cuda": "libcudart", "hip": "libamdhip64"}


class CallRefused(Exception):
    """The runtime refused a call; its error has been cleared.

    Args:
        code: the runtime's number.
        text: the runtime's words.
    """

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{text} ({code})")
        self.code = code


class Runtime:
    """Calls of one loaded runtime library.

    Args:
        library: holds the functions as attributes, under the names of C.
        prefix: ``cuda`` or ``hip``, how those names begin.
    """

    def __init__(self, library: Any, prefix: str) -> None:
        self._register = getattr(library, f"{prefix}HostRegister")
        self._unregister = getattr(library, f"{prefix}HostUnregister")
        self._device_pointer = getattr(library, f"{prefix}HostGetDevicePointer")
        self._last_error = getattr(library, f"{prefix}GetLastError")
        self._text = getattr(library, f"{prefix}GetErrorString")

    def register(self, address: int, nbytes: int, flags: int) -> None:
        """Pin memory that exists. Raises `CallRefused`."""
        self._check(self._register(address, nbytes, flags))

    def unregister(self, address: int) -> None:
        """Undo `register` of the memory that begins there. Raises `CallRefused`."""
        self._check(self._unregister(address))

    def device_address(self, address: int) -> int:
        """Where the current device finds mapped memory; HIP may have it elsewhere than the host.

        Raises `CallRefused`.
        """
        found = ctypes.c_void_p()
        self._check(self._device_pointer(ctypes.byref(found), address, 0))
        return found.value or 0

    def _check(self, code: int) -> None:
        if code:
            self._last_error()  # reads and forgets it
            text = self._text(code)
            raise CallRefused(code, text.decode() if isinstance(text, bytes) else str(text))


class ThroughTorch:
    """What torch itself offers of the runtime, for builds that have it linked in statically."""

    def __init__(self) -> None:
        self._cudart: Any = torch.cuda.cudart()

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        return int(self._cudart.cudaHostRegister(address, nbytes, flags).value)

    def cudaHostUnregister(self, address: int) -> int:
        return int(self._cudart.cudaHostUnregister(address).value)

    def cudaHostGetDevicePointer(self, found: Any, address: int, flags: int) -> int:
        found._obj.value = address  # one address space on every 64-bit CUDA system
        return 0

    def cudaGetLastError(self) -> int:
        # Not offered; but torch asks for it behind each launch, and forgets it.
        with suppress(RuntimeError):
            torch.empty(1, device="cuda").fill_(0)
        return 0

    def cudaGetErrorString(self, code: int) -> str:
        return f"CUDA error {code}"


def find() -> Runtime | None:
    """The runtime of CUDA or ROCm devices; None where registration is not to be had: `why_not`."""
    return None if why_not() is not None else _loaded()


def why_not() -> str | None:
    """What keeps host memory from being registered in this process; None where nothing does."""
    if torch.cuda._is_in_bad_fork():
        return "CUDA does not survive fork; start this process by spawn"
    return None if torch.cuda.is_available() else "there is no CUDA or ROCm device"


def through_torch() -> bool:
    """True where there is a device of another kind, for which torch's own allocator pins."""
    if torch.cuda._is_in_bad_fork() or torch.cuda.is_available():
        return False
    return torch.accelerator.is_available()


@cache
def _loaded() -> Runtime:
    # Until torch has begun with the device torch takes no memory for pinned, even if it is.
    torch.cuda.init()
    prefix = "cuda" if torch.version.hip is None else "hip"
    path = loaded_library(_STEMS[prefix], (torch.version.cuda or "").split(".")[0])
    if path is None:
        return Runtime(ThroughTorch(), "cuda")  # these names on ROCm as well
    return Runtime(declared(ctypes.CDLL(path), prefix), prefix)


def declared(library: Any, prefix: str) -> Any:
    """The library, with the types of what is called: addresses are wider than C's int."""
    pointer, size, flags = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint
    getattr(library, f"{prefix}HostRegister").argtypes = (pointer, size, flags)
    getattr(library, f"{prefix}HostUnregister").argtypes = (pointer,)
    getattr(library, f"{prefix}HostGetDevicePointer").argtypes = (pointer, pointer, flags)
    getattr(library, f"{prefix}GetLastError").argtypes = ()
    text = getattr(library, f"{prefix}GetErrorString")
    text.argtypes, text.restype = (ctypes.c_int,), ctypes.c_char_p
    return library


def loaded_library(stem: str, version: str, maps: str = "/proc/self/maps") -> str | None:
    """The file of a library that this process has loaded, of a major version if there are several.

    Args:
        stem: how the file's name begins, up to ``.so``.
        version: the major version that is preferred; may be empty.
        maps: the kernel's list of mappings.
    """
    found: list[str] = []
    with suppress(OSError), open(maps) as lines:
        for line in lines:
            path = line.partition("/")[2].rstrip("\n")
            name = os.path.basename(path)
            if re.match(rf"{stem}(-[0-9a-f]+)?\.so", name) and f"/{path}" not in found:
                found.append(f"/{path}")
    named = re.compile(rf"\.so\.{version}(\.|$)|-[0-9a-f]+\.so\.{version}(\.|$)")
    preferred = [path for path in found if version and named.search(path)]
    return next(iter(preferred + found), None)


def quiesce() -> None:
    """Block the host until no device of this process reads or writes host memory any more.

    A device that has failed does neither: its error is left to its next user.
    """
    if torch.cuda.is_initialized() and not torch.cuda._is_in_bad_fork():
        inside: Any = torch._C
        for index in range(torch.cuda.device_count()):
            if inside._cuda_hasPrimaryContext(index):  # waiting must not make one
                with suppress(RuntimeError):
                    torch.cuda.synchronize(index)
    elif through_torch():
        for index in range(torch.accelerator.device_count()):
            with suppress(RuntimeError):
                torch.accelerator.synchronize(index)


def capturing() -> bool:
    """True where waiting for a device, or unregistering, would break a graph's capture."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
