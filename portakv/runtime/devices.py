# SPDX-License-Identifier: Apache-2.0
"""The devices of this machine: known by name, with the index that torch means, or why not."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from portakv.errors import DeviceMismatch
from portakv.runtime._vendor_package import Unusable, imported

# What to install where no backend says it better.
_SOMEHOW = "the package of that name by the vendor of the device"


@dataclass(frozen=True, slots=True)
class Named:
    """A device whose type torch does not know: a name, where a `torch.device` cannot be made."""

    type: str
    index: int | None = None

    def __str__(self) -> str:
        return self.type if self.index is None else f"{self.type}:{self.index}"


class DeviceAbsent(Exception):
    """Why torch cannot use a device here, as the end of a sentence.

    Attributes:
        device: as far as it can be named, for who is asked about it all the same.
        package: of the vendor's, that could not be imported; or empty.
        install: what is to be installed, as far as that is known without a backend; or empty.
    """

    def __init__(
        self, device: torch.device | Named, why: str, package: str = "", install: str = ""
    ) -> None:
        super().__init__(why)
        self.device, self.package, self.install = device, package, install

    def told(self, reasons: Iterable[str]) -> str:
        """Why, with what to install: in the words of the backend that is made for the device, which
        knows the release, where one of the backends' ``reasons`` is about that package."""
        todo = self.install
        for reason in reasons:
            _, install, words = reason.partition("; install ")
            if install and self.package and self.package in reason:
                todo = f"install {words}"
        return "; ".join(part for part in (str(self), todo) if part)


def known(device: torch.device | str) -> torch.device:
    """The device of that name.

    A type that is not torch's own comes with a package of its vendor's, which extends torch and is
    called ``torch_`` and the type. It is imported now, if torch has not loaded it by itself.

    Raises:
        DeviceAbsent: torch does not know the type; also where the package fails, in its own words.
    """
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        kind, _, index = str(device).partition(":")
        named = Named(kind, int(index) if index.isdecimal() else None)
        package = f"torch_{kind}"
        if not isinstance(device, str) or str(named) != device or not kind.isidentifier():
            raise DeviceAbsent(
                named, f"it is no device of torch's ({_first_line(error)})"
            ) from error
    why, install = f"torch knows no {kind} devices, and {package}", ""
    try:
        imported(package, _SOMEHOW)
        return torch.device(device)
    except Unusable as error:
        told, _, rest = str(error).partition(f"; install {_SOMEHOW}")
        why, install = f"torch knows no {kind} devices, and {told}", f"install {_SOMEHOW}{rest}"
    except RuntimeError:
        why = f"{why} was imported, but does not bring them"
    except SystemExit as error:  # a broken package must not take others down
        why = f"{why} ends the process when it is imported (SystemExit: {error})"
    raise DeviceAbsent(named, why, package, install)


def indexed(device: torch.device | str) -> torch.device:
    """The device with its index, so that ``cuda`` and ``cuda:0`` are one.

    Raises:
        DeviceAbsent: as `known` does; torch finds no current device of its type.
    """
    place = known(device)
    if place.type == "cpu":
        return torch.device("cpu")
    if place.index is not None:
        return place
    try:
        module = torch.get_device_module(place)
        # torch.mps has one device, or none, and no such function.
        place = torch.device(place.type, getattr(module, "current_device", lambda: 0)())
        count = getattr(module, "device_count", lambda: 1)()
    except (RuntimeError, AssertionError, AttributeError, OSError) as error:
        raise DeviceAbsent(place, f"torch cannot use it here ({_first_line(error)})") from error
    if not count:
        raise DeviceAbsent(place, "torch cannot use it here (it finds no device of that type)")
    return place


def devices_present() -> list[torch.device]:
    """One device of each type that this machine has: the CPU, then the accelerator, if any."""
    found = [torch.device("cpu")]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        if kind is not None:
            found.append(torch.device(kind.type, torch.accelerator.current_device_index()))
    return found


def usual_device() -> torch.device:
    """The accelerator where there is one, else the CPU."""
    return devices_present()[-1]


def usable_device(text: str) -> torch.device:
    """The device of that name, after asking torch for memory on it.

    Raises:
        DeviceMismatch: torch does not know the device, or cannot use it here.
    """
    try:
        device = known(text)
        torch.empty(0, device=device)
    except Exception as error:  # torch says it in a different type for each device
        why = _first_line(error)
        present = ", ".join(map(str, devices_present()))
        raise DeviceMismatch(
            f"Device {text!r} was asked, but torch cannot use it here ({why}); this machine has "
            f"{present}. What each backend lacks: portakv backends --device {text}"
        ) from error
    return device


def device_count(device: torch.device) -> int:
    """How many devices of that type there are."""
    return 1 if device.type == "cpu" else torch.accelerator.device_count()


def device_name(device: torch.device) -> str:
    """The model's name where torch tells it, else the machine's architecture or nothing."""
    if device.type == "cpu":
        return platform.machine()
    ask = getattr(torch.get_device_module(device), "get_device_name", None)
    return str(ask(device)) if ask else ""


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
