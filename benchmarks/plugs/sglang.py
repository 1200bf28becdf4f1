# SPDX-License-Identifier: Apache-2.0
"""The functions of ``sgl_kernel.kvcacheio`` as SGLang's host pools call them, and PortaKV's of the
same names: each order of a host pool, all layers and one, both directions.

A load of all layers from a pool that has no function for it is one call for each layer, as SGLang
loads them. Kernels are measured with more thread blocks than SGLang's default of two, too. Without
``sgl_kernel`` SGLang itself has no other way on a device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib import import_module
from itertools import product
from typing import Any

import torch

from portakv.integrations.sglang import kvcacheio
from portakv_benchmarks.host.cases import DIRECTIONS
from portakv_benchmarks.plugs import suite
from portakv_benchmarks.plugs.suite import (
    OURS,
    OWN,
    Call,
    Case,
    IntegrationBench,
    PlannedCase,
    Side,
)
from portakv_benchmarks.shared.harness import Step, in_a_line
from portakv_benchmarks.shared.shapes import in_words

_PAGE = 16
_HEADS = 8
_DIM = 128
_ITEM = _HEADS * _DIM * 2  # bytes of a token in one layer
_FEW = 16  # rows of the smallest transfer
_QUOTAS = (8, 32)  # thread blocks alongside SGLang's default; 0: that
#: Of keys, and likewise of values: one tensor of the host; on the device one for each layer.
ORDERS = {
    "lf": "kv | layer (block token) head dim",
    "pf": "kv | (block token) layer head dim",
    "ph": "kv | block head token layer dim",
    "pfd": "kv | block layer token head dim",
}
_DEVICE = "layer | (block token) head dim"


def sglang_steps(bench: IntegrationBench) -> Iterator[Step]:
    """Yield a step for each order, direction, number of layers and limit of thread blocks."""
    yield from suite.steps(bench, "sglang", _planned_cases(bench, own_kernels(bench)))


def own_kernels(bench: IntegrationBench) -> object:
    """Return SGLang's own module; None if it is not here, or does not load."""
    try:
        kernels = import_module("sgl_kernel.kvcacheio")
    except Exception as error:  # a library that does not load ends in errors of all kinds
        bench.left_out.append(f"sglang: its own kernels: {in_a_line(error)}")
        return None
    bench.installed["sglang"] = str(getattr(import_module("sgl_kernel"), "__version__", "unknown"))
    return kernels


def _planned_cases(bench: IntegrationBench, own: object) -> Iterator[PlannedCase]:
    layers = bench.sizes.layers
    tokens = bench.sizes.pool // (2 * layers * _ITEM * _PAGE) * _PAGE
    made = partial(_case, bench, own)

    def all_layers(method: str, orders: str, alongside: str = "") -> Iterator[PlannedCase]:
        for order, op in product(orders.split(), DIRECTIONS):
            make = partial(made, method, order, op, layers, tokens)
            yield PlannedCase(f"{method}, all layers, {order}, {op}", make, order == alongside)

    def one_layer(rows: int) -> Iterator[PlannedCase]:
        for order in ("lf", "pf", "ph"):
            name = f"kernel, one layer, {order}, {rows} rows, h2d"
            yield PlannedCase(name, partial(made, "kernel", order, "h2d", 1, rows))

    yield from all_layers("kernel", "lf pf ph", alongside="lf")
    yield from one_layer(_FEW)
    yield from all_layers("direct", "lf pfd")
    yield from one_layer(tokens)
    for quota, op in product(_QUOTAS, DIRECTIONS):
        make = partial(made, "kernel", "lf", op, layers, tokens, quota)
        yield PlannedCase(f"kernel, all layers, lf, {quota} thread blocks, {op}", make)


def _case(
    bench: IntegrationBench,
    own: object,
    method: str,
    order: str,
    op: str,
    layers: int,
    tokens: int,
    quota: int = 0,
) -> Case:
    sized = replace(suite.LIKE, layers=bench.sizes.layers, heads=_HEADS, dim=_DIM, pool=2)
    shape = replace(sized, block_size=_PAGE, tokens=tokens)
    salts = suite.turned(op, 1, None)
    only = slice(0, None, shape.layers) if layers == 1 else slice(None)  # the first layer's
    make = partial(Side.make, bench, only=only)
    device = make(_DEVICE, shape, 4, tensors=2 * shape.layers, salt=salts[0])
    host = make(ORDERS[order], shape, 5, tensors=2, on_host=True, salt=salts[1])
    arguments = method, order, op, layers, device, host, quota
    modules = {OWN: own, OURS: kvcacheio}
    makes = {name: partial(_carrying_out, ops, *arguments) for name, ops in modules.items() if ops}
    fields = {
        "kernel": method,
        "order": order,
        "layers": layers,
        "rows": tokens,
        "row_bytes": _ITEM,
    }
    name = f"{method}, {'all layers' if layers > 1 else 'one layer'}, {order}"
    if quota:
        name += f", {quota} thread blocks"
    fields |= {"shape": f"{name}, {in_words(device.payload)}", "block_quota": quota}
    fields |= {"calls": len(calls_of(kvcacheio, *arguments))}
    return suite.case(bench, "sglang", fields, op, device, host, makes)


def _carrying_out(*arguments: Any) -> Call:
    calls = calls_of(*arguments)

    def carry_out() -> None:
        for call in calls:
            call()

    return carry_out


def calls_of(
    ops: Any,
    method: str,
    order: str,
    op: str,
    layers: int,
    device: Side,
    host: Side,
    quota: int = 0,
) -> list[Call]:
    """Return the calls of a transfer, with everything that can be made beforehand."""
    many = device.shape.layers
    on = device.tensors[0].device
    k = device.tensors[:many]
    v = device.tensors[many:]
    there_k, there_v = host.tensors
    # Kernels read ids where they run.
    local, remote = (x.rows.to(on) if method == "kernel" else x.rows for x in (device, host))
    pitch = many * _ITEM
    if method == "direct" and order == "lf":
        ends = ([*k, *v], local), ([*there_k, *there_v], remote)
        (src, at), (dst, to) = suite.turned(op, *ends)
        return [partial(ops.transfer_kv_direct, src, dst, at, to, _PAGE)]
    if method == "direct":
        pools = [there_k, there_v]
        if op == "d2h":
            move = ops.transfer_kv_all_layer_direct_lf_pf
            return [partial(move, [*k, *v], pools, local, remote, _PAGE)]
        move = ops.transfer_kv_per_layer_direct_pf_lf
        return [partial(move, pools, [k[n], v[n]], remote, local, n, _PAGE) for n in range(layers)]
    heads = (_PAGE, _HEADS) if order == "ph" else ()
    if layers > 1 and (order == "lf" or op == "d2h"):
        tables = [suite.addresses(x, torch.uint64).to(on) for x in (k, v, there_k, there_v)]
        if order == "lf":
            (src, at), (dst, to) = suite.turned(op, (tables[:2], local), (tables[2:], remote))
            fixed = src[0], dst[0], src[1], dst[1], at, to
            limit = {"block_quota": quota} if quota else {}
            return [partial(ops.transfer_kv_all_layer, *fixed, _ITEM, many, **limit)]
        move = getattr(ops, f"transfer_kv_all_layer_lf_{order}")
        fixed = tables[0], there_k, tables[1], there_v, local, remote
        return [partial(move, *fixed, _ITEM, pitch, many, *heads)]
    if order == "lf":
        each = zip(there_k[:layers], k, there_v, v, strict=False)
        return [partial(ops.transfer_kv_per_layer, *x, remote, local, _ITEM) for x in each]
    move = getattr(ops, f"transfer_kv_per_layer_{order}_lf")
    calls: list[Call] = []
    for n in range(layers):
        pair = there_k, k[n], there_v, v[n]
        calls.append(partial(move, *pair, remote, local, n, _ITEM, pitch, *heads))
    return calls
