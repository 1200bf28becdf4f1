# SPDX-License-Identifier: Apache-2.0
"""Dense memory of a device for blocks that cross a link, packed or raw."""

from __future__ import annotations

from typing import Any

import torch

from portakv.layout.encodings import pack_parameters_of
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
        declared["encoding"] = pack_parameters_of(form.encoding)
        shapes = [(width,) for width in form.widths]
        inner = "page"
        dtype = torch.uint8
    if len(set(dims)) == 1:
        size = (blocks, form.layers, form.kv, form.heads, *shapes[0])
        tensor = torch.empty(size, dtype=dtype, device=device)
        return KVView(tensor, f"block layer kv head {inner}", **declared)
    tensors = [
        torch.empty((blocks, form.layers, form.heads, *shape), dtype=dtype, device=device)
        for shape in shapes
    ]
    return KVView(tensors, f"kv | block layer head {inner}", **declared)


def tensors_of(stage: KVView) -> list[torch.Tensor]:
    """Return the tensors of such memory: one, or one for each kv if their widths differ."""
    tensors = stage.tensors
    return [tensors] if isinstance(tensors, torch.Tensor) else [*tensors]
