# SPDX-License-Identifier: Apache-2.0
"""`triton`: one Triton kernel over a pointer table, on every target that Triton has.

Triton is imported when the backend is probed for a device that it could run on. With
``TRITON_INTERPRET=1`` in the environment the same kernel runs on the host, for tests.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, TypeAlias

import torch

from portakv.backends._triton_rows import NestKernel
from portakv.backends.base import (
    PEERS,
    Backend,
    Capabilities,
    Decision,
    Launch,
    MoveLaunch,
    places_on,
)
from portakv.plan.plan import CopyPlan, Move
from portakv.runtime.bounded import making
from portakv.runtime.devices import capturing, refuse_capture, refuse_fork, this_process
from portakv.runtime.kernel_cache import LOADED

INTERPRET = "TRITON_INTERPRET"


class CompiledKernel(Protocol):
    """The attributes that a launch reads from Triton's compiled kernel.

    Reading ``run`` loads the kernel into the current device.
    """

    @property
    def run(self) -> Callable[..., object]: ...
    @property
    def function(self) -> object: ...
    @property
    def packed_metadata(self) -> object: ...
    @property
    def asm(self) -> Any: ...
    @property
    def metadata(self) -> Any: ...


#: The kernel of a nest: its ``run``, ``function`` and ``packed_metadata``, and as many None as it
#: has constants.
_Part: TypeAlias = tuple[NestKernel, Callable[..., object], object, object, tuple[None, ...]]


class Triton(Backend):
    """The Triton kernel on the device that Triton's active driver serves."""

    name = "triton"

    @classmethod
    def probe(cls, device: torch.device) -> Decision:
        why = _missing(device)
        if why is not None:
            return Decision(cls.name, False, why)
        import triton

        method = "interprets its kernel here"
        if device.type != "cpu":
            target = _target()
            method = f"compiles its kernel for {target.backend} {target.arch}"
        return Decision(cls.name, True, f"Triton {triton.__version__} {method}")

    def capabilities(self) -> Capabilities:
        host = self.device.type == "cpu"
        places = places_on(self.device) | (frozenset() if host else PEERS)
        # The interpreter replaces functions of triton while it runs: one thread at a time.
        return Capabilities(
            places, skips_negative=True, guards=True, capturable=not host, threads=not host
        )

    def prepare(self, plan: CopyPlan) -> Launch:
        nests = [NestKernel(nest, plan) for nest in plan.nests]
        if self.device.type == "cpu":
            return _InterpretedLaunch(nests)
        with making():  # nests of one shape share a kernel
            make = LOADED.get_or_make
            kernels = [make((self, nest.key), partial(self._loaded, nest)) for nest in nests]
        return _TritonLaunch(plan.unit, nests, kernels, self.device)

    def _loaded(self, nest: NestKernel) -> CompiledKernel:
        if capturing(self.device):
            raise refuse_capture()
        with torch.get_device_module(self.device).device(self.device):
            kernel = compile_kernel(nest, _target())
            kernel.run  # noqa: B018 - loads it into the current device
        return kernel


def compile_kernel(nest: NestKernel, target: object) -> CompiledKernel:
    """Return Triton's compiled kernel of a nest for a target, which need not be present."""
    from triton import compile as compile_source
    from triton.compiler import ASTSource

    from portakv.backends._triton_kernel import copy_rows

    constants = _constants(nest)
    signature = {**nest.signature(), "ELEMENT": "constexpr"}
    source = ASTSource(copy_rows, signature, constexprs=constants)
    kernel: CompiledKernel = compile_source(
        source, target=target, options={"num_warps": nest.tile.warps}
    )
    return kernel


def _constants(nest: NestKernel) -> dict[str, object]:
    import triton.language as tl

    elements = {8: tl.int8, 16: tl.int16, 32: tl.int32, 64: tl.int64}
    return {**nest.constants, "ELEMENT": elements[nest.element_bits]}


class _InterpretedLaunch(MoveLaunch):
    """Run the kernel through Triton's interpreter, in this thread."""

    def __init__(self, nests: list[NestKernel]) -> None:
        self._nests = nests

    def carry(self, move: Move, status: torch.Tensor | None) -> None:
        from portakv.backends._triton_kernel import copy_rows

        for nest in self._nests:
            constants = _constants(nest)
            for programs, arguments in nest.launches(move, status):
                copy_rows[(programs, nest.planes)](*arguments, **constants)


class _TritonLaunch(MoveLaunch):
    def __init__(
        self,
        unit: int,
        nests: list[NestKernel],
        kernels: list[CompiledKernel],
        device: torch.device,
    ) -> None:
        driver = _driver()
        self._current_device = driver.get_current_device
        self._current_stream = driver.get_current_stream
        self._device = device
        self._process = this_process()
        # Constants have places in a launcher's arguments; the values there are not read.
        self._parts: list[_Part] = [
            (nest, k.run, k.function, k.packed_metadata, (None,) * (len(nest.constants) + 1))
            for nest, k in zip(nests, kernels, strict=True)
        ]
        self._unit = unit

    def enqueue(self, move: Move, stream: torch.Stream | None, status: torch.Tensor | None) -> None:
        if self._process.forked:
            raise refuse_fork("the device's context")
        if stream is None and self._current_device() == self._device.index:
            self._run(move, status)
            return
        module = torch.get_device_module(self._device)
        with module.device(self._device), module.stream(stream):
            self._run(move, status)

    def _run(self, move: Move, status: torch.Tensor | None) -> None:
        stream = self._current_stream(self._device.index)
        for nest, run, function, metadata, constants in self._parts:
            for programs, arguments in nest.launches(move, status):
                run(
                    programs,
                    nest.planes,
                    1,
                    stream,
                    function,
                    metadata,
                    None,
                    None,
                    None,
                    *arguments,
                    *constants,
                )


def _driver() -> Any:
    from triton.runtime import driver

    return driver.active


def _target() -> Any:
    return _driver().get_current_target()


def _missing(device: torch.device) -> str | None:
    """Return why the backend cannot run on a device, or None."""
    on_host = device.type == "cpu"
    interprets = os.environ.get(INTERPRET, "").lower() in ("1", "true", "on", "yes")
    if on_host and not interprets:
        return f"it needs a GPU; on the host only its interpreter runs: set {INTERPRET}=1 for that"
    if not on_host and interprets:
        return f"{INTERPRET} is set, so that Triton runs on the host only; unset it"
    try:
        from portakv.backends._triton_kernel import copy_rows
    except ModuleNotFoundError as error:
        return f"the package {error.name!r} is missing; pip install triton"
    except Exception as error:  # an unsuitable Triton fails in many ways
        return f"Triton cannot be imported: {_first_line(error)}"
    if on_host:
        if hasattr(copy_rows, "rewrite"):
            return None
        return f"{INTERPRET} was set after its kernel was imported; set it before Python starts"
    try:
        torch_device = getattr(_driver(), "get_active_torch_device", None)
        # Cambricon's driver lacks it; its target has the name of torch's device type.
        served = _target().backend if torch_device is None else torch_device().type
    except Exception as error:  # a vendor's driver, or its compiler, may raise anything
        why = f"Triton finds no driver for {device.type} devices here"
        return why if "0 active drivers" in str(error) else f"{why} ({_first_line(error)})"
    if served != device.type:
        return f"Triton's active driver serves {served} devices, not {device.type}"
    return None


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
