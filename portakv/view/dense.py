# SPDX-License-Identifier: Apache-2.0
"""Dense memory for blocks, raw or encoded, in one order that any side is copied to and from."""

from __future__ import annotations

from collections.abc import Callable

import torch

from portakv.layout.encodings import Encoding, parameters_of, plane_of
from portakv.view.form import Form
from portakv.view.view import KVView


def dense_blocks(
    form: Form,
    unit: int,
    blocks: int,
    device: torch.device,
    encoding: Encoding | None = None,
    allocate: Callable[[int], torch.Tensor] | None = None,
) -> KVView:
    """Return uninitialised memory for the rows of a form in blocks of ``unit`` tokens.

    The view has a contiguous tensor for each kv: ``[blocks, layers, heads, tokens, dim]``, or
    uint8 ``[blocks, layers, heads, slot_bytes]`` if the blocks are encoded.

    Args:
        form: of raw rows, or of blocks in an encoding.
        encoding: of the blocks in place of raw rows; None: as the form has them.
        allocate: returns uint8 memory of so many bytes; None: memory of ``device``.
    """
    dtypes = [getattr(torch, name or "uint8") for name in form.dtypes]
    if form.encoding:
        encoding = parameters_of(form.encoding)
        dims = [plane.values // unit for plane in form.encoding]
    else:
        sizes = [dtype.itemsize for dtype in dtypes]
        dims = [width // size for width, size in zip(form.widths, sizes, strict=True)]
    inner = "token dim"
    shapes: list[tuple[int, ...]] = [(unit, dim) for dim in dims]
    if encoding is not None:
        inner = "page"
        shapes = [(plane_of(encoding, unit, dim).slot_bytes,) for dim in dims]
        dtypes = [torch.uint8] * form.kv

    tensors = []
    for shape, dtype in zip(shapes, dtypes, strict=True):
        size = torch.Size((blocks, form.layers, form.heads, *shape))
        if allocate is None:
            tensors.append(torch.empty(size, dtype=dtype, device=device))
        else:
            tensors.append(allocate(size.numel() * dtype.itemsize).view(dtype).view(size))
    return KVView(
        tensors,
        f"kv | block layer head {inner}",
        kv=form.kv,
        block_size=unit,
        dim=dims,
        encoding=encoding,
    )
