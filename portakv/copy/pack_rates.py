# SPDX-License-Identifier: Apache-2.0
"""Measure copies of packed and of raw rows between a device and the host, once in a process.

The table of `portakv calibrate` has the costs of raw runs on an idle device. A packed copy costs
the host more than its kernels cost the device, so that the time by the wall decides.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import NamedTuple

import torch

from portakv.copy.pack_stage import stage_of, tensors_of
from portakv.copy.rows import copy_blocks
from portakv.host import pinned
from portakv.layout.encodings import Pack, PackedPlane
from portakv.runtime.bounded import Bounded
from portakv.runtime.devices import inside
from portakv.runtime.streams import ignoring_captures, own_stream
from portakv.view.form import Form
from portakv.view.view import KVView

#: Raw bytes of a copy that is measured: what a task of a block store copies.
MEASURED = 16 << 20
#: Copies that are timed, unless they take longer than `SECONDS` together.
ROUNDS = 5
SECONDS = 0.1
_SEED_VALUES = 1 << 16


class Rates(NamedTuple):
    """10^9 bytes of raw rows a second, the mean of both directions.

    Attributes:
        link: of raw copies between the device and the host.
        packing: of copies that pack or unpack on the device and cross the same link.
    """

    link: float
    packing: float


class _Shape(NamedTuple):
    """The blocks that are measured: those of a view, with as many layers and heads."""

    planes: tuple[PackedPlane, ...]
    block_size: int
    layers: int
    heads: int


_rates: Bounded[tuple[torch.device, _Shape, int], Rates] = Bounded("rates of packing", 64)
_lock = threading.Lock()


def rates_of(view: KVView, pack: Pack, nbytes: int = MEASURED) -> Rates:
    """Return the rates for blocks like those of a view on a device, measured at the first call.

    The first call makes up to 24 copies of ``nbytes``, and compiles kernels if need be. It uses a
    private stream, ``nbytes`` of the device twice, and as much pinned memory.

    Raises:
        PortaKVError: the device cannot make such a copy, or has no memory for it.
    """
    form = view.form
    size = form.block_size
    planes = tuple(pack.plane(size * width // 2) for width in form.widths)
    key = view.device, _Shape(planes, size, form.layers, form.heads), nbytes
    with _lock:
        rates = _rates.get(key)
        if rates is None:
            rates = _rates[key] = measure(form, size, pack, view.device, nbytes)
    return rates


def forget() -> None:
    """Drop all rates. The next call measures again."""
    with _lock:
        _rates.clear()


def measure(form: Form, size: int, pack: Pack, device: torch.device, nbytes: int) -> Rates:
    """Measure copies of blocks of a form's extents in both directions."""
    blocks = max(1, nbytes // (size * form.token_bytes))
    stream = own_stream(device)
    quiet = ignoring_captures(device)  # of other threads
    with torch.inference_mode(False), torch.no_grad(), quiet, inside(stream):
        rows = stage_of(form, form, size, blocks, device)
        _fill(rows)
        raw = _on_host(rows)
        packed = _packed_on_host(rows, size, pack)
        payload = blocks * size * form.token_bytes
        ids = torch.arange(blocks, dtype=torch.int64, device="cpu")

        def seconds(host: KVView) -> float:
            """Return the seconds of both directions."""
            out = _wall(lambda: copy_blocks(rows, host, ids, ids).synchronize())
            back = _wall(lambda: copy_blocks(host, rows, ids, ids).synchronize())
            return out + back

        return Rates(2 * payload / seconds(raw) / 1e9, 2 * payload / seconds(packed) / 1e9)


def _wall(call: Callable[[], object]) -> float:
    """Return the median of the seconds of a call by the wall, after one that does not count."""
    call()
    times = list[float]()
    while len(times) < ROUNDS and sum(times) < SECONDS:
        began = perf_counter()
        call()
        times.append(perf_counter() - began)
    return median(times)


def _fill(rows: KVView) -> None:
    """Fill rows with normal values, which fit into packed slots. Leaves torch's own random numbers
    as they are."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    seed = torch.randn(_SEED_VALUES, generator=generator, dtype=torch.float32, device="cpu")
    values = seed.to(torch.bfloat16)
    for tensor in tensors_of(rows):
        flat = tensor.view(-1)
        repeated = values.to(flat.device).repeat(-(-flat.numel() // _SEED_VALUES))
        flat.copy_(repeated[: flat.numel()])


def _on_host(rows: KVView) -> KVView:
    """Return pinned memory in the form of dense rows."""
    made = [
        pinned.allocate(2 * tensor.numel(), fallback=True).tensor.view(torch.bfloat16)
        for tensor in tensors_of(rows)
    ]
    shaped = [one.view(like.shape) for one, like in zip(made, tensors_of(rows), strict=True)]
    dims = [width // 2 for width in rows.widths]
    memory = shaped if len(shaped) > 1 else shaped[0]
    declared = {"kv": rows.kv, "block_size": rows.block_size, "dim": dims}
    return KVView(memory, rows.layout.text, **declared)  # type: ignore[arg-type]


def _packed_on_host(rows: KVView, size: int, pack: Pack) -> KVView:
    """Return pinned memory for the packed blocks of dense rows."""
    made = []
    shapes = [tensor.shape[:-2] for tensor in tensors_of(rows)]
    widths = [width // 2 for width in rows.widths]
    for shape, width in zip(shapes, widths, strict=False):
        slot = pack.plane(size * width).slot_bytes
        memory = pinned.allocate(shape.numel() * slot, fallback=True).tensor
        made.append(memory.view(*shape, slot))
    return KVView(
        made if len(made) > 1 else made[0],
        rows.layout.text.replace("token dim", "page"),
        block_size=size,
        kv=rows.kv,
        dim=tuple(widths),
        encoding=pack,
    )
