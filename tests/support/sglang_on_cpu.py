# SPDX-License-Identifier: Apache-2.0
"""Lets SGLang be imported with a torch without CUDA. The index has torchvision for CUDA; its
library does not load there, and its Python part then requires operators that do not exist."""

from __future__ import annotations

import torch

_OPERATORS = (
    "nms",
    "qnms",
    "roi_align",
    "qroi_align",
    "roi_pool",
    "ps_roi_align",
    "ps_roi_pool",
    "deform_conv2d",
)
if torch.version.cuda is None:
    _library = torch.library.Library("torchvision", "DEF")
    for name in _OPERATORS:
        _library.define(f"{name}(Tensor boxes) -> Tensor")
        _library.define(f"_{name}_backward(Tensor boxes) -> Tensor")
