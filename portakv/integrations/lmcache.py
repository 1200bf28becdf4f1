# SPDX-License-Identifier: Apache-2.0
"""PortaKV as a device of LMCache: ``LMCACHE_DEVICE_BACKEND=portakv-cuda``.

LMCache loads the classes below by the entry points of its group ``lmcache.device_plugins``, in
every process beside an installed PortaKV, so each is made from what the installed LMCache has, and
says that it is available only if the variable names it.
"""

from __future__ import annotations

import importlib
import os
from contextlib import suppress
from functools import partial
from math import prod
from typing import Any, ClassVar

from portakv import KVView
from portakv.host import pinned
from portakv.integrations import INTEGRATIONS, check_release, lmcache_host, lmcache_ops

#: The classes of this module with the type of device that each serves.
DEVICES = {f"{kind.capitalize()}Spec": kind for kind in INTEGRATIONS["lmcache"].devices}
#: What replaces LMCache's own; all else of a device stays as LMCache has it.
OPS = {
    lmcache_ops: (
        "load_and_reshape_flash",
        "multi_layer_block_kv_transfer",
        "multi_layer_kv_transfer",
        "multi_layer_kv_transfer_unilateral",
        "reshape_and_cache_back_flash",
        "single_layer_kv_transfer",
        "single_layer_kv_transfer_sgl",
    ),
    lmcache_host: (
        "DirectCopyGroupSpec",
        "DirectCopyObject",
        "batch_memcpy_supported",
        "direct_copy_format_supported",
        "execute_direct_copy_transfer",
    ),
}
#: A compiled op of LMCache's that its daemon prefers to those above; it has kernels of its own.
BYPASS = "execute_object_group_transfer"
#: Devices that LMCache drives by tensors alone: views over their addresses are unproven.
BY_TENSORS = ("npu", "mlu")
VARIABLE = "LMCACHE_DEVICE_BACKEND"


def __getattr__(name: str) -> type[Any]:
    """The `DeviceSpec` of one type of device, made when LMCache loads its entry point."""
    if name not in DEVICES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = globals()[name] = _spec(name, DEVICES[name])
    return made


def _spec(name: str, kind: str) -> type[Any]:
    """A class of specs over LMCache's own for this type of device, if it has one."""
    base = _own_spec(kind)

    class Spec(base):  # type: ignore[misc, valid-type]
        adopted: ClassVar[dict[int, pinned.Adopted]] = {}  # what is pinned now, by address

        @property
        def chosen(self) -> bool:
            return os.environ.get(VARIABLE, "").strip().lower() == self.backend_name

        @property
        def device_type(self) -> str:
            """LMCache takes the only spec of a type without asking whether it is available; so one
            that was not asked for stands for no type that torch has."""
            return kind if self.chosen else self.backend_name

        @property
        def torch_module_name(self) -> str:
            return kind

        @property
        def backend_name(self) -> str:
            return f"portakv-{kind}"

        @property
        def ops_cls(self) -> type[Any]:
            return _ops(super().ops_cls, kind)

        def is_available(self) -> bool:
            """Only if it was asked for: two available backends of one device are an error."""
            if not self.chosen:
                return False
            check_release("lmcache")
            lmcache_ops.terms()  # a bad variable is told at the start, not by the first store
            return _present(kind)

        def is_lmcache_driven_available(self) -> bool:
            return kind not in BY_TENSORS and bool(super().is_lmcache_driven_available())

        def pin_memory(self, ptr: int, size: int, flags: int = 0) -> bool:
            """LMCache registers its memory piece by piece: no copy may cross from one to another,
            so PortaKV is told of each."""
            done = bool(super().pin_memory(ptr, size, flags))
            if done:
                self.adopted[ptr] = pinned.adopt([(ptr, size)])
            return done

        def unpin_memory(self, ptr: int) -> bool:
            if (known := self.adopted.pop(ptr, None)) is not None:
                known.close()
            return bool(super().unpin_memory(ptr))

        def is_handle_transfer_available(self) -> bool:
            """The same question, as 0.5.4 asks it."""
            return kind not in BY_TENSORS

    Spec.__name__ = Spec.__qualname__ = name
    return Spec


def _own_spec(device_type: str) -> type[Any]:
    """LMCache's spec of a type of device; its base class, which drives engines by tensors alone, if
    it has none."""
    import torch

    if device_type == "cuda" and torch.version.hip:
        device_type = "rocm"
    try:
        general = importlib.import_module("lmcache.v1.platform.base.device_spec")
    except ImportError:  # no LMCache, or one that is too old
        check_release("lmcache")
        raise
    base: type[Any] = general.DeviceSpec
    for folder in ("lmcache.v1.platform.devices", "lmcache.v1.platform"):
        with suppress(ImportError):
            module = importlib.import_module(f"{folder}.{device_type}")
            found = getattr(module, f"{device_type.capitalize()}DeviceSpec", None)
            if isinstance(found, type):
                return found
    return base


def _ops(base: type[Any], device_type: str) -> type[Any]:
    """LMCache's ops of a device with PortaKV's over them."""

    class PortaKVOps(base):  # type: ignore[misc]
        def ensure_native(self) -> None:
            # Where LMCache wants a package of the vendor, PortaKV's ops do without.
            with suppress(ImportError):
                super().ensure_native()
            self.__dict__.pop(BYPASS, None)  # the daemon then calls the ops one by one
            for module, names in OPS.items():
                for name in names:
                    setattr(self, name, getattr(module, name))
            staged = partial(lmcache_host.lmcache_memcpy_async, device_type=device_type)
            self.lmcache_memcpy_async = staged

        def tensor_from_ptr(self, ptr: int, shape: Any, dtype: Any, device: Any) -> Any:
            """LMCache's own way, if it has one for this device."""
            with suppress(AttributeError, ValueError):
                return super().tensor_from_ptr(ptr, shape, dtype, device)
            one = 1, prod(shape)
            flat = KVView.at(ptr, "token dim", shape=one, dtype=dtype, device=device)
            return flat.plane(0, 0).view(tuple(shape))

    PortaKVOps.device_type = device_type
    return PortaKVOps


def _present(device_type: str) -> bool:
    import torch

    module = getattr(torch, device_type, None)
    return module is not None and (device_type == "cpu" or bool(module.is_available()))
