# SPDX-License-Identifier: Apache-2.0
"""Register PortaKV as a device of LMCache: ``LMCACHE_DEVICE_BACKEND=portakv-cuda``.

LMCache loads the classes below by the entry points of its group ``lmcache.device_plugins``, in
every process with an installed PortaKV. Each class is therefore made from the classes of the
installed LMCache. It reports that it is available only if the variable names it.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from math import prod
from typing import Any, ClassVar, TypeAlias

import torch

from portakv import KVView
from portakv.host import pinned
from portakv.integrations import INTEGRATIONS, check_release, log_through
from portakv.integrations.lmcache import ops

#: A class of LMCache, which is untyped here.
_Class: TypeAlias = type[Any]

#: The classes of this module, with the type of device that each supports.
DEVICES = {f"{kind.capitalize()}Spec": kind for kind in INTEGRATIONS["lmcache"].devices}
#: The functions that replace LMCache's. The rest of a device stays LMCache's own.
OPS = (
    "DirectCopyGroupSpec",
    "DirectCopyObject",
    "batch_memcpy_supported",
    "direct_copy_format_supported",
    "execute_direct_copy_transfer",
    "load_and_reshape_flash",
    "multi_layer_block_kv_transfer",
    "multi_layer_kv_transfer",
    "multi_layer_kv_transfer_unilateral",
    "reshape_and_cache_back_flash",
    "single_layer_kv_transfer",
    "single_layer_kv_transfer_sgl",
)
#: A compiled op with separate kernels, which LMCache's daemon prefers to the ops above.
BYPASS = "execute_object_group_transfer"
#: Devices that LMCache drives by tensors alone, because views over their addresses are untested.
BY_TENSORS = ("npu", "mlu")
VARIABLE = "LMCACHE_DEVICE_BACKEND"


def __getattr__(name: str) -> _Class:
    """Return the `DeviceSpec` of one type of device, made when LMCache loads its entry point."""
    if name not in DEVICES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = globals()[name] = _spec(name, DEVICES[name])
    return made


def _spec(name: str, kind: str) -> _Class:
    """Return a class of specs, derived from LMCache's own for this type of device if it has one."""
    base = _own_spec(kind)

    class Spec(base):  # type: ignore[misc, valid-type]
        adopted: ClassVar[dict[int, pinned.Adopted]] = {}  # pinned pieces, by address

        @property
        def chosen(self) -> bool:
            return os.environ.get(VARIABLE, "").strip().lower() == self.backend_name

        @property
        def device_type(self) -> str:
            # LMCache takes the only spec of a type without checking that it is available, so a
            # backend that was not chosen reports a type that torch does not know.
            return kind if self.chosen else self.backend_name

        @property
        def torch_module_name(self) -> str:
            return kind

        @property
        def backend_name(self) -> str:
            return f"portakv-{kind}"

        @property
        def ops_cls(self) -> _Class:
            return _ops(super().ops_cls, kind)

        def is_available(self) -> bool:
            # LMCache raises an error if a device has two available backends.
            if not self.chosen:
                return False
            check_release("lmcache")
            ops.terms()  # raises for a bad variable now, not in the first store
            return _present(kind)

        def is_lmcache_driven_available(self) -> bool:
            return kind not in BY_TENSORS and bool(super().is_lmcache_driven_available())

        def pin_memory(self, ptr: int, size: int, flags: int = 0) -> bool:
            """Pin a piece of LMCache's memory; no copy may cross to the next piece."""
            done = bool(super().pin_memory(ptr, size, flags))
            if done:
                self.adopted[ptr] = pinned.adopt([(ptr, size)])
            return done

        def unpin_memory(self, ptr: int) -> bool:
            if (known := self.adopted.pop(ptr, None)) is not None:
                known.close()
            return bool(super().unpin_memory(ptr))

        def is_handle_transfer_available(self) -> bool:
            """Answer for LMCache 0.5.4 what newer releases ask `is_lmcache_driven_available`."""
            return kind not in BY_TENSORS

    Spec.__name__ = Spec.__qualname__ = name
    return Spec


def _own_spec(device_type: str) -> _Class:
    """Return LMCache's spec of a type of device.

    If LMCache has none, return its base class, which drives engines by tensors alone.
    """
    if device_type == "cuda" and torch.version.hip:
        device_type = "rocm"
    try:
        general = importlib.import_module("lmcache.v1.platform.base.device_spec")
    except ImportError:  # LMCache is missing or too old
        check_release("lmcache")
        raise
    base: _Class = general.DeviceSpec
    for folder in ("lmcache.v1.platform.devices", "lmcache.v1.platform"):
        with suppress(ImportError):  # this release has the device elsewhere
            module = importlib.import_module(f"{folder}.{device_type}")
            own = getattr(module, f"{device_type.capitalize()}DeviceSpec", None)
            if isinstance(own, type):
                return own
    return base


def _ops(base: _Class, device_type: str) -> _Class:
    """Return a class of ops, derived from LMCache's ops of a device, with PortaKV's ops."""

    class PortaKVOps(base):  # type: ignore[misc]
        def ensure_native(self) -> None:
            # LMCache may need a vendor's package here, which PortaKV's ops do not use.
            with suppress(ImportError):
                super().ensure_native()
            log_through(importlib.import_module("lmcache.logging").init_logger(__name__))
            self.__dict__.pop(BYPASS, None)  # the daemon then calls the ops one by one
            for name in OPS:
                setattr(self, name, getattr(ops, name))
            copy = partial(ops.lmcache_memcpy_async, device_type=device_type)
            self.lmcache_memcpy_async = copy

        def tensor_from_ptr(
            self, ptr: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str
        ) -> torch.Tensor:
            """Return a tensor at an address, by LMCache's own method if it supports this device."""
            # A base without the method lacks the attribute; one that refuses the device raises
            # ValueError.
            with suppress(AttributeError, ValueError):
                own: torch.Tensor = super().tensor_from_ptr(ptr, shape, dtype, device)
                return own
            flat = KVView.at(ptr, "token dim", shape=(1, prod(shape)), dtype=dtype, device=device)
            return flat.plane(0, 0).view(tuple(shape))

    PortaKVOps.device_type = device_type
    return PortaKVOps


def _present(device_type: str) -> bool:
    module = getattr(torch, device_type, None)
    return module is not None and (device_type == "cpu" or bool(module.is_available()))
