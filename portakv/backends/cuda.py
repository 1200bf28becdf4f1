# SPDX-License-Identifier: Apache-2.0
"""`cuda`: the hand-written kernels, compiled by NVRTC, launched by the driver API."""

from __future__ import annotations

import torch

from portakv.backends.base import Decision
from portakv.backends.pack_kernel import PackingRowsBackend
from portakv.runtime import cuda as _cuda


class Cuda(PackingRowsBackend):
    """The kernels of ``native/cuda`` on NVIDIA devices."""

    name = "cuda"

    def __init__(self, device: torch.device) -> None:
        super().__init__(device, _cuda.CudaDriver(device))

    @classmethod
    def probe(cls, device: torch.device) -> Decision:
        if device.type != "cuda":
            return Decision(cls.name, False, f"it runs on cuda devices, not on {device.type}")
        why = _cuda.not_served(device) or _cuda.no_nvrtc() or _cuda.driver_too_old()
        why = why or _cuda.device_too_old(device)
        if why is not None:
            return Decision(cls.name, False, why)
        return Decision(cls.name, True, f"NVRTC {_cuda.nvrtc_version()} compiles its kernel")
