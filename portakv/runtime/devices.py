# SPDX-License-Identifier: Apache-2.0
"""Devices: one by its name, or why it cannot be used; the current device and stream; graph capture;
forked processes."""

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
from typing import Any

import torch

from portakv.errors import BackendUnavailable, DeviceMismatch, Unsupported

_HOST = torch.device("cpu")

# --- names ----------------------------------------------------------------------------------------

#: For each type that a vendor's package adds to torch: the package, and what to install.
VENDOR_PACKAGES = {
    "npu": (
        "torch_npu",
        f"torch_npu=={'.'.join(torch.__version__.split('.')[:2])}.* beside CANN, and source CANN's "
        f"set_env.sh",
    ),
    "mlu": ("torch_mlu", "torch_mlu and torch_mlu_ops of Cambricon Neuware"),
}
#: Types that torch knows by itself and that have memory for a cache.
_OF_TORCH = ("cpu", "cuda", "xpu", "mps", "hpu", "mtia")
#: Other names of devices, and the type that torch has for them; "": that of this machine's.
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
    """The name of a device whose type torch does not know, so that there is no `torch.device`."""

    type: str
    index: int | None = None

    def __str__(self) -> str:
        return self.type if self.index is None else f"{self.type}:{self.index}"


class Unusable(Exception):
    """``why`` a vendor's package cannot be used, and what to ``install`` or nothing, as a sentence
    without its stop."""

    def __init__(self, why: str, install: str = "") -> None:
        super().__init__(f"{why}; install {install}" if install else why)
        self.why = why
        self.install = install


class DeviceAbsent(Exception):
    """Why torch cannot use a device here, as the end of a sentence; with what to install, or the
    device that was probably ``meant``. ``known``: torch or the library knows the type."""

    def __init__(
        self, device: torch.device | Named, why: str, install: str = "", meant: str = ""
    ) -> None:
        todo = f"; install {install}" if install else f"; did you mean {meant!r}?" if meant else ""
        super().__init__(f"{why}{todo}")
        self.device = device
        self.install = install
        self.meant = meant
        self.known = isinstance(device, torch.device) or device.type in VENDOR_PACKAGES


def imported(package: str, install: str) -> Any:
    """The module ``package``; ``install`` is what a user has to install for it, in words. Raises
    `Unusable` if it is not installed, or its import failed in whatever way."""
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        what = package if error.name == package else f"{error.name}, which {package} needs,"
        raise Unusable(f"{what} is not installed", install) from error
    except Exception as error:  # such as OSError if a library of the vendor's is missing
        why = f"{type(error).__name__}: {' '.join(str(error).split()).rstrip('.')}"
        fitting = f", in the release for torch {torch.__version__} and for this machine's driver"
        raise Unusable(
            f"{package} is installed, but its import failed ({why})",
            f"{install}{fitting}" if install else "",
        ) from error


def version_of(module: Any) -> str:
    """The version that a module says it has."""
    return str(getattr(module, "__version__", "of unknown version"))


def known(device: torch.device | str | int) -> torch.device:
    """The device of that name. A type that is not torch's own comes with a package of its vendor's,
    ``torch_`` and the type, which is imported if it is here and torch has not loaded it.

    Raises:
        DeviceAbsent: torch does not know the type, or the package fails, in its own words.
    """
    kind, _, index = str(device).partition(":")
    named = Named(kind, int(index) if index.isdecimal() else None)
    try:
        place = torch.device(device)
        if kind != "hip":  # torch has a type of that name, and calls no device by it
            return place
    except (TypeError, ValueError):
        why = "it is no device of torch's; expected one such as 'cuda', 'cuda:0', or a torch.device"
        raise DeviceAbsent(named, why) from None
    except RuntimeError as error:
        if kind in _OF_TORCH or str(named) != device or not kind.isidentifier():
            why = f"it is no device of torch's ({_first_line(error)})"
            raise DeviceAbsent(named, why, meant=_meant(named)) from error
    package, install = VENDOR_PACKAGES.get(kind, (f"torch_{kind}", ""))
    called = _ALIASES.get(kind.lower(), "")
    why = f"torch calls {kind} devices {called}" if called else f"torch knows no {kind} devices"
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
    except SystemExit as error:  # a broken package must not take others down
        why = f"{why}, and {package} ends the process when it is imported (SystemExit: {error})"
    raise DeviceAbsent(named, why, install)


def _meant(named: Named) -> str:
    """The device that was probably meant by a name that torch does not know; or empty."""
    kind = named.type.lower()
    near = difflib.get_close_matches(kind, (*_OF_TORCH, *VENDOR_PACKAGES), n=1, cutoff=0.7)
    found = _ALIASES.get(kind, near[0] if near else None)
    if found is None:
        return ""
    here = torch.accelerator.current_accelerator()
    return str(Named(found or ("cuda" if here is None else here.type), named.index))


def indexed(device: torch.device | str | int) -> torch.device:
    """The device with its index, so that ``cuda`` and ``cuda:0`` are one; raises `DeviceAbsent` as
    `known` does, or if torch does not find the device."""
    place = known(device)
    if place.type == "cpu":
        return _HOST
    try:
        module = torch.get_device_module(place)
        # Asked with an index too: it fails if the driver does. torch.mps has no such function.
        current = getattr(module, "current_device", lambda: 0)()
        index = current if place.index is None else place.index
        count = getattr(module, "device_count", lambda: index + 1)()
    except (RuntimeError, AssertionError, AttributeError, OSError) as error:
        built = place.type != "cuda" or torch.backends.cuda.is_built()
        install = "" if built else "torch's build for CUDA, or for ROCm"
        why = f"torch cannot use it here ({_first_line(error)})"
        raise DeviceAbsent(place, why, install) from error
    if not 0 <= index < count:
        found = f"{count} of that type, and counts from 0" if count else "no device of that type"
        raise DeviceAbsent(place, f"torch cannot use it here (it finds {found})")
    return torch.device(place.type, index)


def resolve(device: torch.device | str | int) -> torch.device:
    """As `indexed`, for memory of the host; `BackendUnavailable` if the device is not here."""
    try:
        return indexed(device)
    except DeviceAbsent as error:
        why = str(error).rstrip(".")
        raise BackendUnavailable(
            f"Host memory was to be used with the device {device}, and {why}"
            f"{'' if why.endswith('?') else '.'} Name a device of this machine, or leave it out."
        ) from None


def devices_present() -> list[torch.device]:
    """One device of each type that this machine has: the CPU, then the accelerator, if any."""
    found = [_HOST]
    # A vendor's package that fails may leave its name, or half a module, behind.
    with suppress(RuntimeError, AttributeError):
        kind = torch.accelerator.current_accelerator()
        if kind is not None and torch.accelerator.is_available():
            found.append(torch.device(kind.type, torch.accelerator.current_device_index()))
    return found


def usual_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    return devices_present()[-1]


def usable_device(text: str) -> torch.device:
    """The device of that name, after asking torch for memory on it; raises `DeviceMismatch` if
    torch does not know the device, or cannot use it here."""
    try:
        device = known(text)
        torch.empty(0, dtype=torch.uint8, device=device)
    except Exception as error:  # torch says it in a different type for each device
        more = f" What each backend lacks: portakv backends --device {text}"
        if isinstance(error, DeviceAbsent) and not error.known:
            more = ""
        raise DeviceMismatch(
            f"Device {text!r} was asked for, but torch cannot use it here ({_first_line(error)}); "
            f"this machine has {', '.join(map(str, devices_present()))}.{more}"
        ) from error
    return device


def device_name(device: torch.device) -> str:
    """The model's name if torch tells it, else the machine's architecture or nothing."""
    if device.type == "cpu":
        return platform.machine()
    ask = getattr(torch.get_device_module(device), "get_device_name", None)
    return str(ask(device)) if ask else ""


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


# --- the current device and stream ----------------------------------------------------------------


def inside(where: torch.device | torch.Stream | None) -> AbstractContextManager[object]:
    """Inside, a device, or a stream and its device, are this thread's current ones; None and the
    CPU change nothing. On a CUDA device the thread has a context then, also after it."""
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
        torch.cuda.current_stream(device)  # torch has begun with the device
        torch._C._cuda_setDevice(device.index)  # gives a new thread a context, for the driver
        yield


# --- graph capture --------------------------------------------------------------------------------


def capturing(device: torch.device) -> bool:
    """True while the current stream of ``device`` is captured into a graph."""
    if device == _HOST or torch.accelerator.current_device_index() == device.index:
        return capture_question(device)()
    with torch.get_device_module(device).device(device):
        return capture_question(device)()


@cache
def capture_question(device: torch.device) -> Callable[[], bool]:
    """What answers `capturing` for a device while it is the current one."""
    if device.type == "cuda":
        # What torch.cuda's function of that name calls, at a third of its cost.
        return torch._C._cuda_isCurrentStreamCapturing
    module = None if device == _HOST else torch.get_device_module(device)
    return getattr(module, "is_current_stream_capturing", bool)  # bool() is False


def refuse_capture(
    what: str = "Preparing a copy",
    why: str = "its kernel has to be compiled and loaded first; make the same call once before the "
    "capture",
) -> Unsupported:
    """The error for what cannot be captured; by default for preparing what is not there yet."""
    return Unsupported(f"{what} inside graph capture", why)


# --- the process ----------------------------------------------------------------------------------


class Process:
    """The process in which something was made; ``forked`` is True in a child of it. To look is
    cheaper than to ask the system for the process at each launch."""

    forked = False


_process = Process()


def this_process() -> Process:
    """The process that runs now. What does not survive fork keeps it, and looks at ``forked``."""
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
    """The error for a launch in a process that was forked from the one that prepared it."""
    return Unsupported(
        "Launching in a forked process", f"{driver} does not survive fork; start it by spawn"
    )
