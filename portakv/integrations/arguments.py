# SPDX-License-Identifier: Apache-2.0
"""The arguments of functions that stand for an engine's own: types as their signatures say."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from numbers import Integral
from typing import Any, ParamSpec, TypeVar

import torch

from portakv import Index, KVView, SlotError
from portakv.integrations import IntegrationError

_Asked = ParamSpec("_Asked")
_Answer = TypeVar("_Answer")


class ArgumentError(IntegrationError, TypeError):
    """An engine's op was called with an argument of another type than it says."""


def typed(function: Callable[_Asked, _Answer]) -> Callable[_Asked, _Answer]:
    """``function``, which raises `ArgumentError` for arguments of other types than it says; types
    that are not in `_FITS` are not looked at."""
    says = {name: each.annotation for name, each in inspect.signature(function).parameters.items()}
    fits = [(name, _fit(kind)) for name, kind in says.items()]
    named_fits = dict(fits)

    @wraps(function)
    def checked(*args: _Asked.args, **named: _Asked.kwargs) -> _Answer:
        for (name, right), value in zip(fits, args, strict=False):
            if not right(value):
                raise _of_another_type(function.__name__, name, value, says[name])
        for name, value in named.items():
            if name in says and not named_fits[name](value):
                raise _of_another_type(function.__name__, name, value, says[name])
        return function(*args, **named)

    return checked


def _fit(says: str) -> Callable[[Any], bool]:
    """Whether a value is of one of the types that an annotation says."""
    known = [_FITS.get(each, lambda _: True) for each in says.split(" | ")]
    return known[0] if len(known) == 1 else lambda value: any(fit(value) for fit in known)


def _of_another_type(function: str, name: str, value: object, says: str) -> ArgumentError:
    found = told(value) if isinstance(value, torch.Tensor) else f"{value!r:.80}"
    if isinstance(value, Sequence) and any(isinstance(x, torch.Tensor) for x in value):
        found = f"a list of {' and '.join(sorted({type(x).__name__ for x in value}))}"
    return ArgumentError(
        f"{function} was given {name} = {found}; expected {says}, and of tensors strided ones that "
        f"have memory. Pass such an argument."
    )


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_meta


def _is_number(value: object) -> bool:
    return isinstance(value, (int, Integral))


#: Whether a value is of a type.
_FITS: dict[str, Callable[[Any], bool]] = {
    "torch.Tensor": _is_tensor,
    "int": _is_number,
    "None": lambda value: value is None,
    "list[torch.Tensor]": lambda value: isinstance(value, Sequence) and all(map(_is_tensor, value)),
    "list[int]": lambda value: isinstance(value, Sequence) and all(map(_is_number, value)),
}


def check_ids(index: Index, count: int, view: KVView, written: bool) -> None:
    """Judge ids on the host before anything is moved. A negative one skips its position in PortaKV;
    engines that have no such ids mean none by it.

    Raises:
        SlotError: a negative id, one past the view's end, and of a side that is ``written`` one
            that occurs twice.
    """
    side = "destination" if written else "source"
    if index.check(count, view.slots, side, distinct=written):
        raise SlotError(
            f"Id {index.host_ids().min()} of {index.step} token(s) was given in the {side}; "
            f"expected 0 or more. Nothing was moved. Correct the ids."
        )


def told(tensor: torch.Tensor) -> str:
    return (
        f"a {tensor.dtype} tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} on "
        f"{tensor.device}"
    )
