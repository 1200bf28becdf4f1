# SPDX-License-Identifier: Apache-2.0
"""Dense memory of a device for blocks that cross a link, packed or raw."""

from __future__ import annotations

from typing import Any

import torch

from portakv.layout.packing import Pack
from portakv.view.form import Form
from portakv.view.view import KVView


def stage_of(form: Form, raw: Form, unit: int, blocks: int, device: torch.device) -> KVView:
    """Return memory for blocks of ``unit`` tokens in the encoding of a form.

    ``raw``: the form of the raw side, which is ``form`` itself if that is not packed.
    """
    dims = [width // 2 for width in raw.widths]
    declared: dict[str, Any] = {"kv": form.kv, "block_size": unit, "dim": dims}
    shapes: list[tuple[int, ...]] = [(unit, dim) for dim in dims]
    inner = "token dim"
    dtype = torch.bfloat16
    if form.encoding:
        declared["encoding"] = _parameters(form)
        shapes = [(width,) for width in form.widths]
        inner = "page"
        dtype = torch.uint8
    if len(set(dims)) == 1:
        size = (blocks, form.layers, form.kv, form.heads, *shapes[0])
        tensor = torch.empty(size, dtype=dtype, device=device)
        return KVView(tensor, f"block layer kv head {inner}", **declared)
    tensors = [
        torch.empty(
            (blocks, form.layers, form.heads, *shape), dtype=dtype, device=device
        )
        for shape in shapes
    ]
    return KVView(tensors, f"kv | block layer head {inner}", **declared)


def _parameters(form: Form) -> Pack:
    """Return the parameters that a packed form was made with."""
    first = form.encoding[0]
    made = first.parameters
    same = all(made.plane(plane.values) == plane for plane in form.encoding)
    return made if same else Pack(first.code_bits)  # slots of the usual size for each width
