# SPDX-License-Identifier: Apache-2.0
"""`CopyOptions`: who executes a copy, on which stream, and on which terms."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, fields
from math import inf
from typing import Any, Literal, Protocol, TypeAlias, get_args

import torch

from portakv.arguments import as_whole, flag, instance, invalid, one_of, rate
from portakv.errors import InvalidTerms, SlotError
from portakv.interconnect.strategy import Overlap as Overlap
from portakv.interconnect.strategy import Terms
from portakv.runtime.transfer import LateErrors
from portakv.view.index import Ids as Ids
from portakv.view.view import Tensors as Tensors

#: How ids on a device are checked.
Check: TypeAlias = Literal["usual", "strict"]
CHECKS: tuple[str, ...] = get_args(Check)


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyOptions:
    """The options of a copy. Make them once and pass them to many copies.

    A call takes either options or single keywords, and refuses both. It cannot see a keyword that
    has its usual value, such as ``detached=False`` next to options that detach: the options apply.

    Attributes:
        backend: the name of the backend or strategy that must execute it, which the copy looks up.
            None: the registry chooses.
        stream: where to order the work; it first waits for the current stream. The copy checks it.
            Kernels run at its priority; copy engines have no priorities. None: the current stream.
        by_layer: copy one layer after another, each with a separate end: `BlockTransfer.layers`.
        overlap: what else the device does meanwhile: ``compute``, it runs a model; ``idle``,
            nothing, and no copies in the other direction either.
        max_thread_blocks: the most thread blocks of a kernel that reads or writes host memory, or
            reads another device's memory.
        max_gbps: the most 10^9 bytes a second.
        cancellable: `BlockTransfer.cancel` can stop it between two slices.
        detached: no stream waits for its end, not even ``stream``; only the handle reports it.
        reinterpret: allow rows of one number type to go to rows of another; their bits are moved.
        check: ``usual`` checks ids on the host. ``strict`` also waits for ids on a device: ids past
            the end and destinations that occur twice are refused before anything is moved.
        late: before this copy, raise an error of an earlier copy that passed the same object and
            failed after its call. For callers that keep no handles.

    Raises:
        InvalidTerms: an option with a value that it cannot have.
    """

    backend: str | None = None
    stream: torch.Stream | None = None
    by_layer: bool = False
    overlap: Overlap = "compute"
    max_thread_blocks: int | None = None
    max_gbps: float | None = None
    cancellable: bool = False
    detached: bool = False
    reinterpret: bool = False
    check: Check = "usual"
    late: LateErrors | None = None
    #: A coroutine issues the copy in slices.
    sliced: bool = field(init=False, repr=False, compare=False)
    #: Ids on a device are checked before anything is moved.
    strict: bool = field(init=False, repr=False, compare=False)
    #: The call issues the whole copy as it is, on the current stream, which waits for its end.
    whole: bool = field(init=False, repr=False, compare=False)
    #: The terms for a strategy; None: the usual ones, which every backend keeps.
    terms: Terms | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        flag("by_layer", self.by_layer)
        flag("cancellable", self.cancellable)
        flag("reinterpret", self.reinterpret)
        one_of("check", self.check, CHECKS)
        if self.backend is not None and not isinstance(self.backend, str):
            raise invalid("backend", "a name or None", self.backend, "Pass a name, or None.")
        if self.late is not None and not isinstance(self.late, LateErrors):
            raise invalid("late", "a LateErrors or None", self.late, "Pass LateErrors().")
        sliced = self.cancellable or self.max_gbps is not None
        detached = flag("detached", self.detached) and not sliced  # no stream orders slices
        if self.max_gbps is not None:
            rate("max_gbps", self.max_gbps)  # terms of a worker's slices also have inf
        computes = isinstance(self.overlap, str) and self.overlap == "compute"
        terms = None
        if not computes or self.max_thread_blocks is not None or sliced or detached:
            terms = Terms(self.overlap, self.max_thread_blocks, self.max_gbps, detached)
        strict = self.check == "strict"
        apart = self.by_layer or self.reinterpret or strict or self.late is not None
        whole = not (apart or sliced or detached) and self.stream is None
        put = object.__setattr__  # the options are frozen
        put(self, "sliced", sliced)
        put(self, "strict", strict)
        put(self, "terms", terms)
        put(self, "whole", whole)

    def check_only(self, what: str, names: Collection[str]) -> None:
        """Raise `InvalidTerms` if another option than these is set; ``what`` has no use for it."""
        for name in NAMES:
            if name not in names and not _same(getattr(self, name), getattr(USUAL, name)):
                raise InvalidTerms(
                    f"Expected options for {what} among {', '.join(names)}, got {name}. Leave "
                    f"{name} out."
                )


#: The options, in the order of their keywords.
NAMES = tuple(each.name for each in fields(CopyOptions) if each.init)
_KNOWN = frozenset(NAMES)
#: The options of a copy that passes none.
USUAL = CopyOptions()
#: Those of all keywords, in their order.
USUAL_VALUES = tuple(getattr(USUAL, name) for name in NAMES)


def _same(value: object, usual: object) -> bool:
    """Return True if a keyword has its usual value; a text may be another object than its equal."""
    return value is usual or (isinstance(value, str) and value == usual)


def refuse_options(extents: Iterable[str]) -> None:
    """Raise `InvalidTerms` if the name of an extent is that of an option."""
    for name in extents:
        if name in NAMES:
            raise InvalidTerms(
                f"Expected {name} in options, got it as a keyword. Pass "
                f"options=CopyOptions({name}=...)."
            )


def options_from(options: CopyOptions | None, keywords: dict[str, Any]) -> CopyOptions:
    """Return the options of a call that takes ``options`` or some keywords.

    Raises:
        InvalidTerms: both, a keyword that is not an option, or a value that an option cannot have.
    """
    for name in keywords.keys() - _KNOWN:
        raise InvalidTerms(
            f"Expected terms among {', '.join(sorted(NAMES))}, got {name}. Leave {name} out."
        )
    passed = {name: x for name, x in keywords.items() if not _same(x, getattr(USUAL, name))}
    if options is None:
        return CopyOptions(**passed) if passed else USUAL
    if passed:
        names = ", ".join(passed)
        raise InvalidTerms(
            f"Expected options or single options, got options and {names}. Put {names} into "
            f"CopyOptions."
        )
    return instance("options", options, CopyOptions, "Pass CopyOptions(...).")


# ------------------------------------------------------------------------------------------------
# The arguments that several calls take: ids, memory objects and whole numbers.


class HasTensor(Protocol):
    """A memory object of an engine, with its tensors in ``.tensor``."""

    @property
    def tensor(self) -> Any:
        """`Tensors`; anything else is refused when it is used."""


#: A chunk.
MemoryObject: TypeAlias = "Tensors | HasTensor"


def whole(name: str, value: object, expected: str, least: float = -inf) -> int:
    """Return an argument that is a whole number; raise `SlotError` if it is not one."""
    number = as_whole(value)
    if number is not None and number >= least:
        return number
    raise SlotError(f"Expected {name} to be {expected}, got {value!r}. Pass one.")
