# SPDX-License-Identifier: Apache-2.0
"""`cuda`: the hand-written row kernel, compiled by NVRTC, launched by the driver API."""

from __future__ import annotations

from dataclasses import replace

import torch

from portakv.backends.base import Capabilities, Decision, PackLaunch
from portakv.backends.pack_kernel import PackKernel, refusal
from portakv.backends.pack_launch import KernelPackLaunch
from portakv.backends.rows_launch import RowsBackend
from portakv.layout.packing import PACK
from portakv.plan.packing import PackPlan
from portakv.runtime import cuda as _cuda
from portakv.runtime import nvrtc as _nvrtc


class Cuda(RowsBackend):
    """The CUDA kernel of ``native/cuda`` on NVIDIA devices."""

    name = "cuda"

    def __init__(self, device: torch.device) -> None:
        super().__init__(device, _cuda.CudaDriver(device))

    @classmethod
    def probe(cls, device: torch.device) -> Decision:
        if device.type != "cuda":
            return Decision(cls.name, False, f"it runs on cuda devices, not on {device.type}")
        why = _cuda.not_served(device) or _nvrtc.missing() or _cuda.driver_too_old()
        why = why or _cuda.device_too_old(device)
        if why is not None:
            return Decision(cls.name, False, why)
        return Decision(cls.name, True, f"NVRTC {_nvrtc.nvrtc_version()} compiles its kernel")

    def capabilities(self) -> Capabilities:
        return replace(super().capabilities(), encodings=frozenset({PACK}))

    def check_pack(self, plan: PackPlan) -> Decision:
        decision = super().check_pack(plan)
        whys = (refusal(nest) for nest in plan.nests)
        why = next((why for why in whys if why is not None), None)
        if plan.src.place == "peer":
            why = "it packs rows of its own device only"
        if decision.accepted and why is not None:
            return Decision(self.name, False, why)
        return decision

    def prepare_pack(self, plan: PackPlan) -> PackLaunch:
        kernels = [PackKernel(nest, plan) for nest in plan.nests]
        functions = [entries[1] for entries in self._kernels.functions(kernels)]
        return KernelPackLaunch(kernels, functions, self._driver)
