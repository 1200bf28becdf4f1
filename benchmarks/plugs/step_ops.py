# SPDX-License-Identifier: Apache-2.0
"""vLLM's ops of a step, its own and PortaKV's: few rows into a paged cache, or out of one.

They are bound by their launches, so that no bar judges them; a `copy_` of the same bytes inside the
device stands alongside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch

from portakv_benchmarks.plugs import suite, vllm_ops
from portakv_benchmarks.plugs.suite import OURS, OWN, Case, IntegrationBench, PlannedCase
from portakv_benchmarks.shared.harness import Variant
from portakv_benchmarks.shared.shapes import POISON

_OPS = ("reshape_and_cache", "reshape_and_cache_flash", "concat_and_cache_mla", "cp_gather_cache")
_ROWS = (64, 4096)
_BLOCK = 16
_HEADS = 8
_DIM = 128
_LATENT = 512
_ROTARY = 64
_TOGETHER = 8  # elements of a head that a cache of keys keeps together
_REQUESTS = 4  # of a gather


def step_ops(bench: IntegrationBench, own: object) -> Iterator[PlannedCase]:
    """Yield each op with few and with many rows; ``own`` is vLLM's module, if it is here."""
    for rows, name in product(_ROWS, _OPS):
        yield PlannedCase(f"{name}, {rows} rows", partial(_case, bench, own, name, rows))


class Step(NamedTuple):
    """Arguments of an op, what it writes, and by plain indexing: into what, where, which rows."""

    arguments: tuple[Any, ...]
    written: list[torch.Tensor]
    plain: list[tuple[torch.Tensor, Any, torch.Tensor]]


def _step(name: str, rows: int, memory: Callable[..., torch.Tensor]) -> Step:
    blocks = 2 * rows // _BLOCK
    order = torch.randperm(blocks, generator=torch.Generator().manual_seed(6))[: rows // _BLOCK]
    slots = (order[:, None] * _BLOCK + torch.arange(_BLOCK)).flatten()
    paged = memory(blocks, _BLOCK, _LATENT + _ROTARY)
    device = paged.device
    scale = torch.ones(1, device=paged.device)
    table = order.to(device, torch.int32)
    slots = slots.to(device)
    at = (slots // _BLOCK, slots % _BLOCK)
    how = ("auto", scale, scale)
    if name == "cp_gather_cache":
        gathered = memory(rows, _LATENT + _ROTARY)
        ends = torch.arange(0, rows + 1, rows // _REQUESTS, dtype=torch.int32, device=device)
        arguments = paged, gathered, table.view(_REQUESTS, -1), ends, _REQUESTS
        return Step(arguments, [gathered], [(gathered, slice(None), paged[at])])
    if name == "concat_and_cache_mla":
        parts = memory(rows, _LATENT), memory(rows, _ROTARY)
        return Step((*parts, paged, slots, *how[:2]), [paged], [(paged, at, torch.cat(parts, 1))])
    key, value = (memory(rows, _HEADS, _DIM) for _ in range(2))
    keys, values = views = [memory(blocks, _BLOCK, _HEADS, _DIM) for _ in range(2)]
    if name == "reshape_and_cache":
        keys = keys.view(blocks, _HEADS, _DIM // _TOGETHER, _BLOCK, _TOGETHER)
        values = values.view(blocks, _HEADS, _DIM, _BLOCK)
        views = [keys.permute(0, 3, 1, 2, 4), values.permute(0, 3, 1, 2)]
    pairs = zip(views, (key, value), strict=True)
    plain = [(view, at, each.view(rows, *view.shape[2:])) for view, each in pairs]
    return Step((key, value, keys, values, slots, *how), [keys, values], plain)


def _case(bench: IntegrationBench, own: object, name: str, rows: int) -> Case:
    salts = iter(range(1, 99))

    def memory(*sizes: int) -> torch.Tensor:
        made = bench.memory(2 * torch.Size(sizes).numel(), False, next(salts))
        return made.view(torch.bfloat16).view(sizes)

    step = _step(name, rows, memory)

    def poison(i: int) -> None:
        for each in step.written:
            each.view(torch.uint8).fill_(POISON)

    def right(i: int) -> bool:
        written = [each.view(torch.int16).clone() for each in step.written]
        poison(i)
        for view, at, each in step.plain:
            view[at] = each
        pairs = zip(written, step.written, strict=True)
        return all(torch.equal(each, want.view(torch.int16)) for each, want in pairs)

    methods = [
        Variant(
            suite.labels(method, "step", "vllm"), partial(_call, ops, name, step), poison, right
        )
        for method, ops in {OWN: own, OURS: vllm_ops}.items()
        if ops is not None
    ]
    payload = sum(each.nbytes for *_, each in step.plain)
    fields = {"shape": f"{name}, {rows} rows", "kernel": name, "rows": rows, "aside": True}
    return Case({**fields, "row_bytes": payload // rows}, "step", payload, methods, on_host=False)


def _call(ops: object, name: str, step: Step, i: int) -> None:
    getattr(ops, name)(*step.arguments)
