# SPDX-License-Identifier: Apache-2.0
"""What PortaKV reads of vLLM's configuration, caches and requests to hand requests over.

An engine that prefills offers the rows of a prompt, and one that decodes pulls them. Requests carry
``kv_transfer_params`` between them, with the keys by which vLLM's proxies and its front end know
the two halves of a request.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from portakv.arguments import flag
from portakv.errors import InvalidTerms
from portakv.integrations import IntegrationError
from portakv.serving.handover_terms import (
    KEY,
    HandoverTerms,
    Identity,
    RemoteRows,
    parameters_of,
    rows_in,
)

#: Of each role whether its engine offers rows, and whether it pulls them.
ROLES = {"kv_producer": (True, False), "kv_consumer": (False, True), "kv_both": (True, True)}
#: The term of `HandoverTerms` in ``kv_connector_extra_config``.
TERM = "hand_over"
#: The term there that turns spans on.
SPANS = "spans"
#: How a request ends whose prompt was computed.
COMPLETE = ("FINISHED_LENGTH_CAPPED", "FINISHED_STOPPED")
#: What stands for all of a prompt's images, which blocks of several sizes have in common.
WHOLE = 1 << 40
#: Where torch puts host memory that processes share.
SHARED_MEMORY = "/dev/shm"


class Handing(NamedTuple):
    """How an engine hands requests over.

    Attributes:
        terms: of the hand-over.
        offers: it computes prompts for other engines.
        pulls: it goes on with prompts that others have computed.
    """

    terms: HandoverTerms
    offers: bool
    pulls: bool


class Roles(NamedTuple):
    """What an engine does, by its role and terms.

    Attributes:
        handing: how it hands requests over; None: it does not.
        stores: it has a store.
        store: the terms of the store.
        spans: it makes spans of loads, offers and pulls.
    """

    handing: Handing | None
    stores: bool
    store: Mapping[str, Any]
    spans: bool = False


def roles_of(role: object, extra: Mapping[str, Any]) -> Roles:
    """Return what an engine does.

    Args:
        role: ``kv_role`` of vLLM's configuration.
        extra: ``kv_connector_extra_config``.

    Raises:
        IntegrationError: another role.
        InvalidTerms: wrong terms of the hand-over, or ``spans`` that is neither true nor false.
    """
    if role not in ROLES:
        raise IntegrationError(
            f"Expected kv_role {' or '.join(map(repr, ROLES))} for PortaKVConnector, got {role!r}. "
            f"Correct it."
        )
    store = {name: value for name, value in extra.items() if name not in (TERM, SPANS)}
    handing = None
    if role != "kv_both" or TERM in extra:
        try:
            terms = HandoverTerms.of(extra.get(TERM, {}))
        except InvalidTerms as error:
            raise InvalidTerms(f"kv_connector_extra_config: {error}") from None
        handing = Handing(terms, *ROLES[str(role)])
    try:
        spans = flag(SPANS, extra.get(SPANS, False))
    except InvalidTerms as error:
        raise InvalidTerms(f"kv_connector_extra_config: {error}") from None
    return Roles(handing, role == "kv_both" or bool(store), store, spans)


def share_caches(kv_caches: Iterable[torch.Tensor]) -> None:
    """Move caches of the host to memory that other engines can map. All views of them follow.

    Raises `IntegrationError` if there is not enough shared memory.
    """
    storages = {
        cache.untyped_storage().data_ptr(): cache.untyped_storage()
        for cache in kv_caches
        if cache.device.type == "cpu" and not cache.is_shared()
    }
    nbytes = sum(storage.nbytes() for storage in storages.values())
    free = _free_bytes()
    if nbytes > free:
        raise IntegrationError(
            f"Expected {nbytes} bytes free in {SHARED_MEMORY} for the caches of an engine that "
            f"offers rows, got {free}. Mount a larger one (docker: --shm-size), or give the engine "
            f"a smaller cache."
        )
    for storage in storages.values():
        storage.share_memory_()


def _free_bytes() -> int:
    """Return how many bytes more processes can share."""
    try:
        state = os.statvfs(SHARED_MEMORY)
    except OSError:
        return 0
    return state.f_bavail * state.f_frsize


def worker_numbers(parallel: Any) -> tuple[int, int]:
    """Return the number of a worker in its engine, and among the workers of all copies of it."""
    copy = getattr(parallel, "data_parallel_index", getattr(parallel, "data_parallel_rank", 0))
    number = int(getattr(parallel, "rank", 0))
    return number, int(copy or 0) * int(parallel.world_size) + number


def identity_of(request: Any, model: str, salt: bytes, extra: Iterable[bytes]) -> Identity:
    """Return what the rows of a request's prompt depend on."""
    return Identity.of(model, request.prompt_token_ids, salt, extra)


def remote_rows_of(request: Any, identify: Callable[[Any], Identity]) -> RemoteRows | None:
    """Return the rows of a request that another engine has; None: it has none of them.

    The log has a line if the request carries other ones. ``identify`` is called only if the
    request carries any: it reads the whole prompt.
    """
    params = getattr(request, "kv_transfer_params", None) or {}
    if not params.get("do_remote_prefill"):
        return None
    return rows_in(params, identify(request), len(request.prompt_token_ids))


def is_wanted(request: Any) -> bool:
    """Return whether another engine is to go on with a request that has ended here."""
    params = getattr(request, "kv_transfer_params", None) or {}
    if not params.get("do_remote_decode") or request.prompt_token_ids is None:
        return False
    computed = request.num_computed_tokens >= len(request.prompt_token_ids)
    return request.status.name in COMPLETE and computed


def parameters_for(
    request: Any, rows: RemoteRows, identity: Identity, engine: str, workers: int
) -> dict[str, Any]:
    """Return the ``kv_transfer_params`` of a request that another engine goes on with.

    Args:
        engine: the name of this engine.
        workers: how many it has.
    """
    return {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_engine_id": engine,
        "remote_request_id": request.request_id,
        "remote_num_tokens": rows.tokens,
        "tp_size": workers,
        KEY: parameters_of(rows, identity),
    }


def check_groups(groups: Sequence[Any]) -> None:
    """Refuse layers whose rows are not handed over.

    Raises `IntegrationError`.
    """
    if len(groups) > 1 or any(group.window is not None for group in groups):
        raise IntegrationError(
            f"Expected one group of layers that keep all tokens to hand requests over, got "
            f"{len(groups)} groups or a sliding window. Leave {TERM} out and set kv_role to "
            f"'kv_both', or choose another connector for this model."
        )
