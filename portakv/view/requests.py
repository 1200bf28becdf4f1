# SPDX-License-Identifier: Apache-2.0
"""The slots of several requests, from their block tables: `Index.of_requests`."""

from __future__ import annotations

from typing import NamedTuple

import torch

from portakv.arguments import as_whole, kind_of
from portakv.errors import SlotError
from portakv.view.ids import ID_DTYPES, MOST_STEP, PAST_ANY_VIEW, IdList, as_ids


class _Positions(NamedTuple):
    """The request of each position, and the token of that request."""

    request: torch.Tensor
    token: torch.Tensor
    #: False for positions in front of the first request and after the last one.
    inside: torch.Tensor


def request_slots(
    tables: torch.Tensor,
    lengths: IdList,
    step: int,
    first: IdList | None,
    front: IdList | None,
    count: int | None,
) -> torch.Tensor:
    """Return a slot for each position, -1 if it is skipped; see `Index.of_requests`."""
    _check_tables(tables)
    step, count = _whole_terms(step, count)
    as_ids(tables.reshape(-1))  # raises if torch.vmap or a similar transform hides the numbers
    requests = len(tables)
    sizes = as_ids(lengths)
    begins = torch.zeros_like(sizes) if first is None else as_ids(first)
    ahead = None if front is None else as_ids(front)
    _check_counts(tables, sizes, begins, ahead)
    _check_signs(tables, sizes, begins, ahead, count)

    if not requests:
        if count is None:
            count = 0 if ahead is None else int(ahead.sum())
        return torch.full((count,), -1, dtype=torch.int64, device=tables.device)
    begins = begins.to(tables.device, torch.int64)
    sizes = sizes.to(tables.device, torch.int64).clamp(min=0)
    if ahead is not None:
        ahead = ahead.to(tables.device, torch.int64)
    positions = _positions(sizes, begins, ahead, count)
    return _slots_at(tables, step, positions, begins + sizes)


def _check_tables(tables: torch.Tensor) -> None:
    kind = kind_of(tables)
    if isinstance(tables, torch.Tensor):
        if tables.is_nested or tables.layout is not torch.strided:
            kind = "a nested or sparse tensor"
        elif tables.dim() == 2 and tables.dtype in ID_DTYPES:
            return
        else:
            kind = f"a {tables.dtype} tensor of shape {tuple(tables.shape)}"
    raise SlotError(
        f"Expected tables of requests as block ids [requests, blocks] in an int32 or int64 tensor, "
        f"got {kind}. Convert them to such a tensor."
    )


def _whole_terms(step: int, count: int | None) -> tuple[int, int | None]:
    """Return ``step`` and ``count`` as integers; raise `SlotError` if they are not."""
    tokens = as_whole(step)
    positions = 0 if count is None else as_whole(count)
    if tokens is None or not 0 < tokens <= MOST_STEP or positions is None or positions < 0:
        raise SlotError(
            f"Expected requests with an integer step of at least 1 and an integer count of at "
            f"least 0, got step={step!r} and count={count!r}. Pass such integers."
        )
    return tokens, None if count is None else positions


def _check_counts(
    tables: torch.Tensor, sizes: torch.Tensor, begins: torch.Tensor, front: torch.Tensor | None
) -> None:
    """Raise `SlotError` unless each request has a length, a first token and a block."""
    requests, blocks = tables.shape
    fronts = 0 if front is None else len(front)
    one_each = len(sizes) == len(begins) == requests
    one_front = front is None or fronts == 1
    if not one_each or not one_front or (requests and not blocks):
        raise SlotError(
            f"Expected one length and one first token for each request, one front or None, and at "
            f"least one block, got {len(sizes)} lengths, {len(begins)} first tokens and {fronts} "
            f"front for tables of shape {tuple(tables.shape)}. Pass one of each for each request."
        )


def _check_signs(
    tables: torch.Tensor,
    sizes: torch.Tensor,
    begins: torch.Tensor,
    front: torch.Tensor | None,
    count: int | None,
) -> None:
    """Raise `SlotError` for a number below 0, unless the host would have to wait for a device."""
    waits = tables.is_cpu or count is None
    for numbers in (sizes, begins, front):
        if numbers is None or not (waits or numbers.is_cpu):
            continue
        if bool((numbers < 0).any()):
            raise SlotError(
                "Expected lengths, first and front of at least 0, got a number below 0. Pass "
                "numbers from 0 on."
            )


def _positions(
    sizes: torch.Tensor, begins: torch.Tensor, front: torch.Tensor | None, count: int | None
) -> _Positions:
    ends = sizes.cumsum(0) if front is None else sizes.cumsum(0) + front
    at = torch.arange(int(ends[-1]) if count is None else count, device=sizes.device)
    request = torch.searchsorted(ends, at, right=True)
    inside = request < len(sizes)
    request = request.clamp(max=len(sizes) - 1)
    if front is not None:
        inside &= at >= front
    token = at + (begins - ends + sizes)[request]
    return _Positions(request, token, inside)


def _slots_at(
    tables: torch.Tensor, step: int, positions: _Positions, tokens: torch.Tensor
) -> torch.Tensor:
    """Return the slots of positions; ``tokens`` is the end of each request, for the error."""
    request, token, inside = positions
    blocks = tables.shape[1]
    block = token // step
    ids = tables[request, block.clamp(0, blocks - 1)].long()
    slots = torch.where(ids < 0, -1, ids.clamp(max=PAST_ANY_VIEW // step) * step + token % step)

    # A token outside of its table gets a slot past the end: the copy rejects or skips it.
    past = inside & ((block < 0) | (block >= blocks))
    if tables.is_cpu and bool(past.any()):
        longest = int(request[past.nonzero()[0, 0]])
        raise SlotError(
            f"Expected a table of at least {int(tokens[longest])} tokens for request {longest}, "
            f"got {blocks} blocks x {step}. Pass a wider table or shorter lengths."
        )
    slots = torch.where(past, PAST_ANY_VIEW, slots)
    return torch.where(inside, slots, -1)
