# SPDX-License-Identifier: Apache-2.0
"""Inside the schema job: torch_npu's own schemas against the pinned ones, and calls it must refuse.

Runs as ``python -m portakv_conformance.vendor.ascend_checks`` if torch_npu can be imported, and
prints one JSON document.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import torch

from portakv import CopyPlan, Index, KVView, Unsupported, copy_rows
from portakv.backends.ascend import Ascend
from portakv.backends.ascend_kernel import VARIABLE
from portakv_conformance.record import JsonObject
from portakv_conformance.vendor import ascend_ops, ascendc_emulated, ascendc_npu
from portakv_conformance.vendor.ascend_device import enter

_NZ = 29
_DISPATCH = "PrivateUse1"


def main() -> None:
    """Print what was found: ``torch``, ``torch_npu``, ``schemas``, ``refusals``, ``kernel``."""
    torch_npu: Any = importlib.import_module("torch_npu")
    schemas = compare_schemas()  # before anything is put in the place of the vendor's kernels
    enter("npu")
    refusals = [_refused(name, call, kind) for name, call, kind in _forbidden(torch_npu)]
    reported = {
        "torch": torch.__version__,
        "torch_npu": torch_npu.__version__,
        "torch_npu_git": torch_npu.version.git_version,
        "schemas": schemas,
        "refusals": refusals,
        "kernel": launch_kernel(torch_npu),
    }
    print(json.dumps(reported))


def compare_schemas() -> list[JsonObject]:
    """Return, for each pinned op, the pinned schema, the installed one, and whether the vendor has
    a kernel."""
    everything: Any = torch._C._jit_get_all_schemas()
    known = {str(schema).partition("(")[0]: str(schema) for schema in everything}
    result = []
    for whose in ("vendor", "torch"):
        for name, pinned in ascend_ops.pinned_schemas(whose).items():
            other = known.get(name, "").partition("(")
            has = name in known and torch._C._dispatch_has_kernel_for_dispatch_key(name, _DISPATCH)
            there = "".join(other[1:])
            row = {"op": name, "pinned": pinned, "found": there, "kernel": has}
            result.append({**row, "same": there == pinned and has})
    return result


def launch_kernel(torch_npu: ModuleType) -> JsonObject:
    """Launch the emulated AscendC kernel by the backend, on a stream and memory of torch_npu."""
    device = torch.device("npu", 1)
    rows = torch.arange(32 * 32).to(torch.float16).view(4, 8, 2, 16)
    cache = rows.to(device)
    chunk = torch.zeros(3, 2, 16, dtype=torch.float16).to(device)
    view = KVView(cache, "block token head dim")
    dense = KVView(chunk, "token head dim")
    path = ascendc_emulated.library_file()
    handles = ascendc_npu.run_at_once(path)
    os.environ[VARIABLE] = path
    backend = Ascend(device)
    plan = CopyPlan(view.form, dense.form, 1, 0)
    index = Index(torch.tensor([9, 3, 30]).to(device))
    stream = torch_npu.npu.Stream(device)
    backend.prepare(plan)(view, dense, index, Index(), 3, stream, None)
    moved = chunk.cpu().equal(rows.view(32, 2, 16)[[9, 3, 30]])
    ordered = handles == [stream.npu_stream]
    reported = {"said": backend.check(plan).reason, "moved": moved, "on_its_stream": ordered}
    return {"right": moved and ordered, **reported}


_Call = Callable[[], object]


def _refused(name: str, call: _Call, kind: type[Exception]) -> JsonObject:
    """Return the message of a call that must raise."""
    try:
        call()
    except Exception as error:
        reported = (str(error).splitlines() or [""])[0]
        return {"call": name, "right": type(error) is kind, "said": reported}
    return {"call": name, "right": False, "said": "nothing: it went through"}


def _forbidden(torch_npu: ModuleType) -> list[tuple[str, _Call, type[Exception]]]:
    """Calls that the dispatcher, the stub, the documents or the backend must refuse."""
    rows = torch.zeros(3, 2, 16, dtype=torch.float16).to("npu")
    cache = torch.zeros(4, 8, 2, 16, dtype=torch.float16).to("npu")
    slots = torch.tensor([5, 2, 31]).to("npu")
    scatter = torch_npu.npu_scatter_pa_kv_cache
    gather = torch_npu.npu_gather_pa_kv_cache
    ids = torch.zeros(1, 1, dtype=torch.int32).to("npu")
    two = (rows, rows, cache, cache.clone())
    refused = ascend_ops.Refused

    def norm(*tensors: torch.Tensor, slots: torch.Tensor = slots) -> _Call:
        return lambda: scatter(*tensors, slots, cache_mode="Norm")

    shape = (4, 8, 2, 16)
    half = torch.float16
    nz = torch_npu.empty_with_format(shape, dtype=half, device="npu", acl_format=_NZ)
    return [
        ("scatter, a keyword not known", lambda: scatter(*two, slots, mode="Norm"), RuntimeError),
        ("scatter, slots forgotten", lambda: scatter(*two), RuntimeError),
        ("scatter, slots as a list", lambda: scatter(*two, [5, 2, 31]), RuntimeError),
        ("gather, slots for a block table", lambda: gather(cache, cache, slots), RuntimeError),
        ("scatter, the default cache_mode, which is NZ", lambda: scatter(*two, slots), refused),
        ("scatter, a negative slot", norm(*two, slots=slots + -3), refused),
        ("scatter, a slot past the end", norm(*two, slots=slots + 1), refused),
        ("scatter, float slots", norm(*two, slots=torch.zeros(3).to("npu")), refused),
        ("scatter, rows with holes", norm(rows[:, :, ::2], *two[1:]), refused),
        ("scatter, another dtype", norm(rows.view(torch.bfloat16), *two[1:]), refused),
        ("scatter, an empty tensor", norm(rows[:0], rows[:0], *two[2:], slots=slots[:0]), refused),
        ("gather, int64 blocks", lambda: gather(*two[2:], ids.long(), ids[0], *two[:2]), refused),
        ("tanh, which nothing emulates", rows.tanh, refused),
        (
            "tanh, in a thread that is not watched",
            lambda: ThreadPoolExecutor(1).submit(rows.tanh).result(),
            RuntimeError,
        ),
        ("a copy of an NZ tensor given as ND", lambda: _copy_of(nz), Unsupported),
    ]


def _copy_of(cache: torch.Tensor) -> None:
    before = torch.zeros(2, 1, 4, 32, dtype=torch.float16).to("npu")
    view = KVView([(cache, cache.clone())], "layer kv | block token head dim")
    chunk = KVView(before, "kv layer token (head dim)", heads=2)
    copy_rows(view, chunk, [3, 9, 1, 30], backend="ascend")


if __name__ == "__main__":
    main()
