# SPDX-License-Identifier: Apache-2.0
"""torch_npu over a stub of CANN: the vendor's dispatcher, allocator and copies, and no NPU.

`enter` makes the device ``npu`` known to torch through the vendor's own package, and puts torch's
CPU kernels for exactly the ops named here, on the memory that the vendor's allocator gave. Any
other op raises: here, if its thread is watched, else in the stub. The vendor's code never computes;
it decides whether a call is well formed.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib
import json
import os
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from portakv_conformance.draw.arrangement import Keywords
from portakv_conformance.vendor import ascend_ops

#: What emulates below the vendor's package: it is hashed with this file, since it is named here.
BENEATH = "portakv_conformance.vendor.cann_stub"
#: Names a folder in which each process leaves, as JSON, how often it called each op.
CALLS = "PORTAKV_ASCEND_CALLS"
#: How often each op was called in this process.
calls: Counter[str] = Counter()

_DISPATCH = "PrivateUse1"
Op = Callable[..., Any]
_VENDOR: dict[str, Op] = {
    "npu::npu_scatter_pa_kv_cache": ascend_ops.scatter_pa_kv_cache,
    "npu::npu_gather_pa_kv_cache": ascend_ops.gather_pa_kv_cache,
    "npu::npu_scatter_nd_update_": ascend_ops.scatter_nd_update_,
    "aten::index_select": ascend_ops.index_select,
    "aten::index_select.out": ascend_ops.index_select_out,
    "aten::index_copy_": ascend_ops.index_copy_,
}
# What the library and the suite need around them, by torch's own kernels: arithmetic on ids and on
# rows that are encoded, comparisons, fills. `clone` and `copy_` are the vendor's if they move plain
# bytes.
_PLAIN = (
    "aten::add.Tensor",
    "aten::add_.Tensor",
    "aten::sub.Tensor",
    "aten::mul.Tensor",
    "aten::div.Tensor",
    "aten::floor_divide",
    "aten::remainder.Scalar",
    "aten::neg",
    "aten::abs",
    "aten::signbit",
    "aten::round",
    "aten::amax",
    "aten::clamp",
    "aten::clamp_",
    "aten::eq.Scalar",
    "aten::ge.Scalar",
    "aten::gt.Scalar",
    "aten::where.self",
    "aten::masked_fill_.Scalar",
    "aten::__and__.Tensor",
    "aten::__lshift__.Scalar",
    "aten::__rshift__.Scalar",
    "aten::bitwise_and.Scalar",
    "aten::bitwise_and.Tensor",
    "aten::bitwise_not",
    "aten::bitwise_or.Tensor",
    "aten::nonzero",
    "aten::index.Tensor",
    "aten::index_put_",
    "aten::lt.Scalar",
    "aten::equal",
    "aten::arange",
    "aten::arange.start",
    "aten::cat",
    "aten::stack",
    "aten::scalar_tensor",
    "aten::fill_.Scalar",
    "aten::fill_.Tensor",
    "aten::zero_",
    "aten::clone",
)
# Metadata and memory, by the vendor's own code; what these are composed of is watched as well.
_OWN = frozenset(
    {
        "aten::_local_scalar_dense",
        "aten::_to_copy",
        "aten::alias",
        "aten::as_strided",
        "aten::detach",
        "aten::expand",
        "aten::full_like",
        "aten::lift_fresh",
        "aten::new_empty",
        "aten::record_stream",
        "aten::select.int",
        "aten::set_.source_Storage",
        "aten::set_.source_Storage_storage_offset",
        "aten::slice.Tensor",
        "aten::split_with_sizes",
        "aten::unbind.int",
        "aten::unsqueeze",
        "aten::view",
        "aten::view.dtype",
        "aten::zeros_like",
        "npu::get_npu_format",
    }
)
_KNOWN = frozenset({*_VENDOR, *_PLAIN, *_OWN, "aten::copy_"})
_retained: list[object] = []


def enter(name: str) -> None:
    """Load torch_npu as the device ``name``, which is ``npu``, and put the ops in place.

    Raises:
        ImportError: torch_npu, or the stub that it wants in place of CANN, is not there.
        ValueError: another name.
    """
    if name != "npu":
        raise ValueError(f"Expected the name 'npu' for torch_npu over a stub, got {name!r}.")
    if _retained:
        return
    torch_npu = importlib.import_module("torch_npu")
    torch_npu.__dict__["EMULATED"] = True
    module = torch.get_device_module(name)
    module.EMULATED_AS = f"torch_npu {torch_npu.__version__} over a stub of CANN, on the host"
    copy = torch.library.get_kernel("aten::copy_", _DISPATCH)
    ops = {**_VENDOR, **{name: _torch_op(name) for name in _PLAIN}}
    kernels: Keywords = {name: partial(_run, name, op) for name, op in ops.items()}
    for op, kernel in {**kernels, "aten::copy_": partial(_copy, copy)}.items():
        space, _, rest = op.partition("::")
        library = torch.library.Library(space, "IMPL")
        library.impl(rest, kernel, _DISPATCH)
        _retained.append(library)  # its kernels go with it
    guard: Any = _Guard  # torch does not say its types
    guard = guard()
    guard.__enter__()
    _retained.append(guard)
    folder = os.environ.get(CALLS)
    if folder:
        reported = Path(folder, f"{os.getpid()}.json")
        atexit.register(lambda: reported.write_text(json.dumps(calls), encoding="utf-8"))


def _torch_op(name: str) -> Op:
    base, _, overload = name.removeprefix("aten::").partition(".")
    return cast(Op, getattr(getattr(torch.ops.aten, base), overload or "default"))


class _Guard(TorchDispatchMode):
    """Lets nothing but the named ops see a tensor of the device; watches one thread."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Keywords | None = None
    ) -> Any:
        name = func.name()
        named = kwargs or {}
        if name not in _KNOWN and any(map(_on_npu, pytree.tree_leaves((args, kwargs)))):
            # In inference mode composed ops arrive whole: what they are composed of is watched.
            with self:
                composed = func.decompose(*args, **named)
            if composed is NotImplemented:
                raise ascend_ops.Refused(f"{name} is not emulated, and torch_npu has no NPU here.")
            return composed
        return func(*args, **named)


def _on_npu(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "npu"


def _run(name: str, function: Op, *args: Any, **kwargs: Any) -> Any:
    """Call a function with the host's views of tensors of the device; bring its results there."""
    calls[name] += 1
    lent: dict[int, torch.Tensor] = {}
    where: list[torch.device] = []

    def lend(value: Any) -> Any:
        if _on_npu(value):
            where.append(value.device)
            view = on_host(value)
            lent[id(view)] = value
            return view
        if isinstance(value, torch.device) and value.type == "npu":
            where.append(value)
            return torch.device("cpu")
        return value

    def give(value: object) -> object:
        if not isinstance(value, torch.Tensor):
            return value
        return lent[id(value)] if id(value) in lent else value.to(where[0])

    if name.startswith("npu::"):
        leaves = pytree.tree_leaves((args, kwargs))
        ascend_ops.check_current(name, (x for x in leaves if isinstance(x, torch.Tensor)))
    lent_args, lent_kwargs = pytree.tree_map(lend, (args, kwargs))
    with torch.no_grad():
        return pytree.tree_map(give, function(*lent_args, **lent_kwargs))


def _copy(vendor: Any, target: torch.Tensor, source: torch.Tensor, late: bool = False) -> Any:
    """`copy_` by the vendor's kernel if it moves plain bytes; CANN would compute the rest."""
    alike = target.dtype == source.dtype and target.shape == source.shape
    if alike and target.is_contiguous() and source.is_contiguous():
        calls["aten::copy_, the vendor's"] += 1
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)
        vendor.call_boxed(keys, target, source, late)
        return target
    return _run("aten::copy_", torch.Tensor.copy_, target, source)


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """Return the host's view of a tensor in the stub's device memory, which is the host's."""
    storage = tensor.untyped_storage()
    view = torch.empty(0, dtype=tensor.dtype)
    if not storage.nbytes():
        return view.view(tensor.shape)
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    flat = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    return view.set_(flat, tensor.storage_offset(), tensor.shape, tensor.stride())
