# SPDX-License-Identifier: Apache-2.0
"""`hip`: the kernels of ``native/cuda``, compiled by hipRTC, launched through HIP's modules.

For AMD devices and Hygon's DCUs, which torch also calls ``cuda``; ``torch.version.hip``
distinguishes them. The row kernel does not depend on the width of a warp, and for the kernels that
pack a wave of 64 lanes is two warps. They were compiled for gfx906, gfx908 and gfx90a and run on a
CPU (docs/hardware.md); they have not yet run on such a device.
"""

from __future__ import annotations

import ctypes

import torch

from portakv.backends.base import Decision
from portakv.backends.pack_kernel import PackingRowsBackend
from portakv.backends.rows_kernel import Tuning
from portakv.runtime import hip as _hip_driver
from portakv.runtime.hip import Card, Driver, DriverMissing


class Hip(PackingRowsBackend):
    """The kernels of ``native/cuda`` on devices of AMD and Hygon."""

    name = "hip"
    threads = 256  # four waves of 64
    # Vectors of a thread and the distance of prefetches were measured on NVIDIA devices only: here
    # each thread moves one vector, and these architectures have no prefetch into L2.
    tunings = (Tuning(0, 1, 0),)

    def __init__(self, device: torch.device) -> None:
        super().__init__(device, self.find_card(device, self.open_driver()))

    @staticmethod
    def open_driver() -> Driver:
        """Return the libraries of HIP; raise `DriverMissing` if they cannot be loaded."""
        return _hip_driver.driver()

    @staticmethod
    def find_card(device: torch.device, driver: Driver) -> Card:
        """Return the device with the functions that launches call."""
        return Card(device, driver)

    @classmethod
    def probe(cls, device: torch.device) -> Decision:
        if device.type != "cuda":
            return Decision(cls.name, False, f"it runs on cuda devices, not on {device.type}")
        if torch.version.hip is None:
            why = (
                "this torch is not built for ROCm; for a device of AMD install torch's build for "
                "ROCm, for a DCU the torch of Hygon's DTK"
            )
            return Decision(cls.name, False, why)
        return cls._probe_driver(device)

    @classmethod
    def _probe_driver(cls, device: torch.device) -> Decision:
        try:
            driver = cls.open_driver()
            why = _no_device(driver, device)
            if why is not None:
                return Decision(cls.name, False, why)
            version = _hip_driver.hiprtc_version(driver)
            card = cls.find_card(device, driver)
        except (DriverMissing, RuntimeError) as error:
            return Decision(cls.name, False, str(error))
        return Decision(cls.name, True, f"hipRTC {version} compiles its kernel for {card}")


def _no_device(driver: Driver, device: torch.device) -> str | None:
    """Return why HIP has no such device, or None."""
    count = ctypes.c_int()
    error = driver.runtime.hipGetDeviceCount(ctypes.byref(count))
    if error:
        return (
            f"HIP finds no device: hipGetDeviceCount returned {driver.error(error)}; check that "
            f"/dev/kfd can be opened and that HIP_VISIBLE_DEVICES leaves a device"
        )
    if (device.index or 0) >= count.value:
        return f"HIP finds {count.value} devices, so that there is no {device}"
    return None
