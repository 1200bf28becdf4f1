# SPDX-License-Identifier: Apache-2.0
"""Find devices by name, and explain why a device cannot be used.

Also sets the current device and stream, and detects graph capture and forked processes.
"""

from __future__ import annotations

import difflib
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch

from portakv.errors import BackendUnavailable, DeviceMismatch, Unsupported

_HOST = torch.device("cpu")

# --- names ----------------------------------------------------------------------------------------

#: For each type that a vendor's package adds to torch: the package, and what to install.
VENDOR_PACKAGES = {
    "npu": (
        "torch_npu",
        f"torch_npu=={'.'.join(torch.__version__.split('.')[:2])}.* and CANN, and source CANN's "
        f"set_env.sh",
    ),
    "mlu": ("torch_mlu", "torch_mlu and torch_mlu_ops of Cambricon Neuware"),
}
#: Device types of torch itself that have memory for a cache.
_OF_TORCH = ("cpu", "cuda", "xpu", "mps", "hpu", "mtia")
#: Other names of devices, and the type that torch has for them; "": the type of this machine.
_ALIASES = {
    "gpu": "",
    "nvidia": "cuda",
    "amd": "cuda",
    "rocm": "cuda",
    "hip": "cuda",
    "dcu": "cuda",
    "hygon": "cuda",
    "ascend": "npu",
    "huawei": "npu",
    "cambricon": "mlu",
    "intel": "xpu",
    "metal": "mps",
    "host": "cpu",
}


@dataclass(frozen=True, slots=True)
class Named:
    """The name of a device whose type torch does not know, so that no `torch.device` exists."""

    type: str
    index: int | None = None

    def __str__(self) -> str:
        return self.type if self.index is None else f"{self.type}:{self.index}"


class Unusable(Exception):
    """A vendor's package cannot be used.

    Attributes:
        why: the reason, as a sentence without its stop.
        install: a package to install, or an empty text.
    """

    def __init__(self, why: str, install: str = "") -> None:
        super().__init__(f"{why}; install {install}" if install else why)
        self.why = why
        self.install = install


class DeviceAbsent(Exception):
    """Torch cannot use a device here; the text is the end of a sentence.

    Attributes:
        install: a package to install, or an empty text.
        meant: the device that the caller probably meant, or an empty text.
        known: torch or the library knows the type.
    """

    def __init__(
        self, device: torch.device | Named, why: str, install: str = "", meant: str = ""
    ) -> None:
        todo = ""
        if install:
            todo = f"; install {install}"
        elif meant:
            todo = f"; did you mean {meant!r}?"
        super().__init__(f"{why}{todo}")
        self.device = device
        self.install = install
        self.meant = meant
        self.known = isinstance(device, torch.device) or device.type in VENDOR_PACKAGES


def imported(package: str, install: str) -> ModuleType:
    """Import and return the module ``package``.

    Args:
        install: the package that a user has to install for it.

    Raises:
        Unusable: the package is not installed, or its import failed.
    """
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        lacking = package if error.name == package else f"{error.name}, which {package} needs,"
        raise Unusable(f"{lacking} is not installed", install) from error
    except Exception as error:  # such as OSError if a library of the vendor's is missing
        why = f"{type(error).__name__}: {' '.join(str(error).split()).rstrip('.')}"
        fitting = f", in the release for torch {torch.__version__} and for this machine's driver"
        raise Unusable(
            f"{package} is installed, but its import failed ({why})",
            f"{install}{fitting}" if install else "",
        ) from error


def version_of(module: object) -> str:
    """Return the version that a module declares."""
    return str(getattr(module, "__version__", "of unknown version"))


def known(device: torch.device | str | int) -> torch.device:
    """Return the device of that name.

    A type that is not torch's own comes with a vendor's package, ``torch_`` and the type. This
    function imports the package if it is installed and torch has not loaded it.

    Raises:
        DeviceAbsent: torch does not know the type, or the package fails, with its own error text.
    """
    kind, _, index = str(device).partition(":")
    named = Named(kind, int(index) if index.isdecimal() else None)
    try:
        place = torch.device(device)
        if kind != "hip":  # torch has a type of that name, but no device of it
            return place
    except (TypeError, ValueError):
        why = "it is not a device of torch; pass one such as 'cuda', 'cuda:0', or a torch.device"
        raise DeviceAbsent(named, why) from None
    except RuntimeError as error:
        if kind in _OF_TORCH or str(named) != device or not kind.isidentifier():
            why = f"it is not a device of torch ({_first_line(error)})"
            raise DeviceAbsent(named, why, meant=_meant(named)) from error
    package, install = VENDOR_PACKAGES.get(kind, (f"torch_{kind}", ""))
    torch_type = _ALIASES.get(kind.lower(), "")
    why = f"torch knows no {kind} devices"
    if torch_type:
        why = f"torch calls {kind} devices {torch_type}"
    if not install:
        installed = None
        with suppress(ImportError, ValueError):
            installed = find_spec(package)
        if installed is None:
            raise DeviceAbsent(named, why, meant=_meant(named))
    try:
        imported(package, install)
        return torch.device(device)
    except Unusable as error:
        why = f"{why}, and {error.why}"
        install = error.install
    except RuntimeError:
        why = f"{why}, and {package} was imported, but does not bring them"
        install = ""
    except SystemExit as error:  # a broken package must not end this process
        why = f"{why}, and {package} ends the process when it is imported (SystemExit: {error})"
    raise DeviceAbsent(named, why, install)


def _meant(named: Named) -> str:
    """Return the device that an unknown name probably means, or an empty text."""
    kind = named.type.lower()
    near = difflib.get_close_matches(kind, (*_OF_TORCH, *VENDOR_PACKAGES), n=1, cutoff=0.7)
    type_meant = _ALIASES.get(kind, near[0] if near else None)
    if type_meant is None:
        return ""
    here = torch.accelerator.current_accelerator()
    return str(Named(type_meant or ("cuda" if here is None else here.type), named.index))


def indexed(device: torch.device | str | int) -> torch.device:
    """Return the device with its index, so that ``cuda`` and ``cuda:0`` are equal.

    Raises:
        DeviceAbsent: as `known` raises it, or torch does not find the device.
    """
    place = known(device)
    if place.type == "cpu":
        return _HOST
    try:
        module = torch.get_device_module(place)
        # Called also if an index is named: it fails if the driver does. torch.mps lacks it.
        current = getattr(module, "current_device", lambda: 0)()
        index = current if place.index is None else place.index
        count = getattr(module, "device_count", lambda: index + 1)()
    except (RuntimeError, AssertionError, AttributeError, OSError) as error:
        built = place.type != "cuda" or torch.backends.cuda.is_built()
        install = "" if built else "torch's build for CUDA, or for ROCm"
        why = f"torch cannot use it here ({_first_line(error)})"
        raise DeviceAbsent(place, why, install) from error
    if not 0 <= index < count:
        present = f"{count} of that type, and counts from 0" if count else "no device of that type"
        raise DeviceAbsent(place, f"torch cannot use it here (it finds {present})")
    return torch.device(place.type, index)


def resolve(device: torch.device | str | int) -> torch.device:
    """Return the device as `indexed` does, for host memory; raise `BackendUnavailable` if it is
    absent."""
    try:
        return indexed(device)
    except DeviceAbsent as error:
        why = str(error).rstrip(".")
        raise BackendUnavailable(
            f"Expected a device of this machine for host memory, got {device}: {why}"
            f"{'' if why.endswith('?') else '.'} Name a device of this machine, or leave it out."
        ) from None


def devices_present() -> list[torch.device]:
    """Return the CPU, and one device of the accelerator's type if this machine has one."""
    devices = [_HOST]
    # A vendor's package that fails may leave its name, or half a module, in torch.
    with suppress(RuntimeError, AttributeError):
        kind = torch.accelerator.current_accelerator()
        if kind is not None and torch.accelerator.is_available():
            devices.append(torch.device(kind.type, torch.accelerator.current_device_index()))
    return devices


def usual_device() -> torch.device:
    """Return the accelerator if there is one, else the CPU."""
    return devices_present()[-1]


def usable_device(text: str) -> torch.device:
    """Return the device of that name, after an allocation on it by torch.

    Raises:
        DeviceMismatch: torch does not know the device, or cannot use it here.
    """
    try:
        device = known(text)
        torch.empty(0, dtype=torch.uint8, device=device)
    except Exception as error:  # torch raises a different type for each device
        more = f" What each backend lacks: portakv backends --device {text}"
        if isinstance(error, DeviceAbsent) and not error.known:
            more = ""
        raise DeviceMismatch(
            f"Expected a device of this machine, got {text!r}: torch cannot use it here "
            f"({_first_line(error)}); this machine has "
            f"{', '.join(map(str, devices_present()))}.{more}"
        ) from error
    return device


def device_name(device: torch.device) -> str:
    """Return the model's name if torch reports it, else the machine's architecture or an empty
    text."""
    if device.type == "cpu":
        return platform.machine()
    get_name = getattr(torch.get_device_module(device), "get_device_name", None)
    return str(get_name(device)) if get_name else ""


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


# --- the current device and stream ----------------------------------------------------------------


def inside(where: torch.device | torch.Stream | None) -> AbstractContextManager[object]:
    """Make a device, or a stream and its device, current for this thread.

    None and the CPU change nothing. On a CUDA device the thread then has a context, also
    afterwards.
    """
    if where is None:
        return nullcontext()
    if isinstance(where, torch.device):
        if where.type == "cpu":
            return nullcontext()
        if where.type == "cuda":
            return _inside_cuda(where)
        return torch.get_device_module(where).device(where)  # type: ignore[no-any-return]
    return torch.get_device_module(where.device).stream(where)  # type: ignore[no-any-return]


@contextmanager
def _inside_cuda(device: torch.device) -> Iterator[None]:
    with torch.cuda.device(device):
        torch.cuda.current_stream(device)  # initialises the device in torch
        torch._C._cuda_setDevice(device.index)  # gives a new thread a context, for the driver
        yield


# --- graph capture --------------------------------------------------------------------------------


def capturing(device: torch.device) -> bool:
    """Return True while the current stream of ``device`` is being captured into a graph."""
    if device == _HOST or torch.accelerator.current_device_index() == device.index:
        return capture_question(device)()
    with torch.get_device_module(device).device(device):
        return capture_question(device)()


@cache
def capture_question(device: torch.device) -> Callable[[], bool]:
    """Return the function that answers `capturing` for a device while it is current."""
    if device.type == "cuda":
        # torch.cuda's function of that name calls this one, at three times the cost.
        return torch._C._cuda_isCurrentStreamCapturing
    module = None if device == _HOST else torch.get_device_module(device)
    return getattr(module, "is_current_stream_capturing", bool)  # bool() is False


def refuse_capture(
    what: str = "Preparing a copy",
    why: str = "its kernel has to be compiled and loaded first; make the same call once before the "
    "capture",
) -> Unsupported:
    """Return the error for an operation that a capture forbids; by default for preparing."""
    return Unsupported(f"{what} inside graph capture", why)


# --- the process ----------------------------------------------------------------------------------


class Process:
    """The process that created an object; ``forked`` is True in a child of it.

    Reading it is cheaper than a system call at each launch.
    """

    forked = False


_process = Process()


def this_process() -> Process:
    """Return the current process.

    Objects that do not survive a fork store it, and check ``forked``.
    """
    _watch_forks()
    return _process


@cache
def _watch_forks() -> None:
    def forget() -> None:
        global _process
        _process.forked = True
        _process = Process()

    os.register_at_fork(after_in_child=forget)


def refuse_fork(driver: str) -> Unsupported:
    """Return the error for a launch in a process that was forked from the one that prepared it."""
    return Unsupported(
        "Launching in a forked process", f"{driver} does not survive fork; start it by spawn"
    )
