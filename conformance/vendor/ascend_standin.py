# SPDX-License-Identifier: Apache-2.0
"""A stand-in for torch_npu on the simulated device that carries the name ``npu``.

It declares the ops that ``portakv.backends.ascend`` calls under the vendor's own schemas, so that
a wrong keyword is refused as the vendor's dispatcher would refuse it, and does in torch what they
are documented to do. It shows call shapes and order of work. It is not the vendor's code, and says
nothing about an NPU.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from functools import cache, partial
from types import ModuleType
from typing import Any

import torch

from portakv.backends.ascend_kernel import VARIABLE
from portakv_conformance.vendor import ascend_ops, ascendc_npu

#: What it always says of itself.
EMULATED = True
_DISPATCH = "PrivateUse1"
_ND = 2
_OPS: dict[str, Callable[..., Any]] = {
    "npu_scatter_pa_kv_cache": ascend_ops.scatter_pa_kv_cache,
    "npu_gather_pa_kv_cache": ascend_ops.gather_pa_kv_cache,
    "npu_scatter_nd_update_": ascend_ops.scatter_nd_update_,
}


def install() -> None:
    """Put the stand-in into ``sys.modules`` as ``torch_npu``; again, or next to the vendor's own
    package, nothing: that is left alone."""
    if "torch_npu" in sys.modules or importlib.util.find_spec("torch_npu") is not None:
        return
    _declare()
    sys.modules["torch_npu"] = _module()
    ascendc_npu.install(os.environ.get(VARIABLE))


@cache
def _declare() -> torch.library.Library:
    """Return the library with the ops, which last as long as it."""
    library = torch.library.Library("npu", "DEF")
    for name, schema in ascend_ops.pinned_schemas("vendor").items():
        library.define(name.partition("::")[2] + schema)
    for name, op in _OPS.items():
        library.impl(name, partial(_launch, name, op), _DISPATCH)
    library.impl("get_npu_format", lambda tensor: _ND, _DISPATCH)
    return library


def _launch(name: str, op: Callable[..., Any], *args: object, **options: object) -> object:
    tensors = [each for each in (*args, *options.values()) if isinstance(each, torch.Tensor)]
    ascend_ops.check_current(name, tensors)
    return op(*args, **options)


def _module() -> ModuleType:
    module = ModuleType("torch_npu", "A stand-in: the simulated device, and no NPU.")
    npu = torch.get_device_module("npu")
    module.__dict__.update(EMULATED=True, __version__=torch.__version__, npu=npu)
    return module
