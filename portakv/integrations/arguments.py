# SPDX-License-Identifier: Apache-2.0
"""Check the arguments of functions that replace an engine's own, by their annotations."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from itertools import chain
from numbers import Integral
from typing import ParamSpec, TypeVar

import torch

from portakv import Index, KVView, SlotError
from portakv.integrations import IntegrationError

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


class ArgumentError(IntegrationError, TypeError):
    """An engine's op was called with an argument of another type than its annotation."""


def typed(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """Return ``function`` with a check of its arguments' types, which raises `ArgumentError`.

    Arguments whose annotation is not in `_CHECKS` are not checked.
    """
    parameters = inspect.signature(function).parameters
    annotations: dict[str, str] = {name: each.annotation for name, each in parameters.items()}
    checks = {name: _check_of(annotation) for name, annotation in annotations.items()}

    @wraps(function)
    def checked(*args: _Parameters.args, **named: _Parameters.kwargs) -> _Result:
        for name, value in chain(zip(checks, args, strict=False), named.items()):
            if name in checks and not checks[name](value):
                raise _wrong_type(function.__name__, name, value, annotations[name])
        return function(*args, **named)

    return checked


def _check_of(annotation: str) -> Callable[[object], bool]:
    """Return a function that checks whether a value is of one of the types of an annotation."""
    checks = [_CHECKS.get(each, _is_anything) for each in annotation.split(" | ")]
    if len(checks) == 1:
        return checks[0]
    return lambda value: any(check(value) for check in checks)


def _wrong_type(function: str, name: str, value: object, annotation: str) -> ArgumentError:
    actual = described(value) if isinstance(value, torch.Tensor) else f"{value!r:.80}"
    if isinstance(value, Sequence) and any(isinstance(x, torch.Tensor) for x in value):
        actual = f"a list of {' and '.join(sorted({type(x).__name__ for x in value}))}"
    return ArgumentError(
        f"{function} got {name} = {actual}, expected {annotation}. Tensors must be strided and "
        f"have memory. Pass such an argument."
    )


def _is_anything(value: object) -> bool:
    return True


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_meta


def _is_number(value: object) -> bool:
    return isinstance(value, (int, Integral))


#: The check for each annotation.
_CHECKS: dict[str, Callable[[object], bool]] = {
    "torch.Tensor": _is_tensor,
    "int": _is_number,
    "None": lambda value: value is None,
    "list[torch.Tensor]": lambda value: isinstance(value, Sequence) and all(map(_is_tensor, value)),
    "list[int]": lambda value: isinstance(value, Sequence) and all(map(_is_number, value)),
}


def check_ids(index: Index, count: int, view: KVView, written: bool) -> None:
    """Check ids on the host before anything is moved.

    In PortaKV a negative id skips its position. Engines do not use negative ids for that, so they
    are refused here.

    Args:
        index: the ids of one side.
        count: positions of the copy.
        view: the memory that the ids name.
        written: the copy writes this side, so that no id may occur twice.

    Raises:
        SlotError: an id is negative or past the view's end, or occurs twice in a written side.
    """
    side = "destination" if written else "source"
    has_negative = index.check(count, view.slots, side, distinct=written)
    if has_negative:
        raise SlotError(
            f"Expected ids of 0 or more in the {side}, got {index.host_ids().min()} (ids of "
            f"{index.step} token(s)). Nothing was moved. Correct the ids."
        )


def described(tensor: torch.Tensor) -> str:
    """Return the dtype, shape, strides and device of a tensor, for an error."""
    return (
        f"a {tensor.dtype} tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} on "
        f"{tensor.device}"
    )
