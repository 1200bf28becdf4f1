# SPDX-License-Identifier: Apache-2.0
"""What two tensors must be for a plain copy: alike, and disjoint to the byte."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from portakv.errors import LayoutError

# Steps of the search for a common byte. Strides of real tensors need a few; only ones that were
# made to be hard come near it.
_STEPS: Any = 1_000_000


def check_alike(dst: Any, src: Any) -> None:
    """Raise `LayoutError` unless both are dense strided tensors of one dtype and shape."""
    for name, given in (("destination", dst), ("source", src)):
        if not isinstance(given, torch.Tensor):
            raise LayoutError(
                f"A copy was asked whose {name} is a {type(given).__name__}; expected a tensor. "
                f"Make one of it first, for example by torch.from_numpy."
            )
        if given.layout != torch.strided:
            raise LayoutError(
                f"A copy was asked whose {name} has the layout {given.layout}; expected "
                f"torch.strided. Copy the tensors that it is made of."
            )
    if dst.dtype != src.dtype:
        raise LayoutError(
            f"A copy from {src.dtype} to {dst.dtype} was asked; expected one dtype, since a copy "
            f"neither converts nor reinterprets. Convert by .to(), or view both as one dtype."
        )
    if dst.shape != src.shape:
        raise LayoutError(
            f"A copy from shape {list(src.shape)} to {list(dst.shape)} was asked; expected one "
            f"shape, since nothing is broadcast. Slice, view or expand until they agree."
        )


def check_disjoint(dst: torch.Tensor, src: torch.Tensor) -> None:
    """Raise `LayoutError` where a byte is written twice, or both read and written.

    Exact for any strides: tensors that interleave without a common byte pass.
    """
    if twice(dst):
        raise LayoutError(
            f"A copy was asked into a tensor of shape {list(dst.shape)} and strides "
            f"{list(dst.stride())}, which has elements at one address; expected each element to "
            f"have its own. Copy into the tensor that it was expanded from."
        )
    if dst.device == src.device and _meet(_spread(dst), _spread(src)):
        raise LayoutError(
            f"A copy was asked between tensors that share bytes: {_place(src)} to {_place(dst)}; "
            f"expected disjoint memory. Copy through a buffer."
        )


def twice(tensor: torch.Tensor) -> bool:
    """True where two elements of a tensor have a byte in common."""
    reach = 1
    dims = [pair for pair in zip(tensor.stride(), tensor.shape, strict=True) if pair[1] > 1]
    for stride, extent in sorted(dims):
        if stride < reach:
            break
        reach = stride * (extent - 1) + reach
    else:
        return False  # each loop steps over all that lies inside it
    if any(stride == 0 for stride, _ in dims):
        return True
    # Two elements first differ in some dimension: there the one is at 0, the other further on, and
    # the dimensions behind it are free.
    whole = _spread(tensor)
    for at in range(whole.ndim):
        inner = whole[(0,) * at]
        if _meet(inner[:1], inner[1:]):
            return True
    return False


class _Memory:
    """Addresses as numpy understands them; nothing is ever read there."""

    def __init__(self, tensor: torch.Tensor) -> None:
        size = tensor.element_size()
        self.__array_interface__ = {
            "version": 3,
            "data": (tensor.data_ptr(), False),
            "shape": tuple(tensor.shape),
            "strides": tuple(size * stride for stride in tensor.stride()),
            "typestr": f"|V{size}",
        }


def _spread(tensor: torch.Tensor) -> npt.NDArray[Any]:
    return np.asarray(_Memory(tensor))


def _meet(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> bool:
    """True where two arrays have a byte in common, or it cannot be told in reasonable time."""
    try:
        return bool(np.shares_memory(one, other, max_work=_STEPS))
    except RuntimeError:  # numpy's TooHardError, which moved between its releases
        return True


def _place(tensor: torch.Tensor) -> str:
    return f"address {tensor.data_ptr():#x}, strides {list(tensor.stride())}"
