# SPDX-License-Identifier: Apache-2.0
"""The ops of ``torch_mlu_ops`` that move rows of paged caches, as the installed release has them.

The package has no public source. Where its signatures come from:

- `reshape_paged_cache`, the first five parameters: what Cambricon/vllm-mlu@8fa99fd passes
  (vllm_mlu/_mlu_ops.py), so the vendor's own use.
- its ``direction``, `multi_layer_kv_transfer`, ``KVFormat`` and ``TransferDirection``: a third
  party's copy of an installed wheel (miznchimaki/domesticated_torch_mlu_ops@9fbf7df, _ops.py),
  which the vendor has not confirmed.

So a signature is read before its op is used, and numbers are taken from the package's enumerations.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from portakv.runtime.devices import VENDOR_PACKAGES, Unusable, imported, version_of

PACKAGE = "torch_mlu_ops"
#: The parameters of `reshape_paged_cache` in older releases, and in those that gather too.
SCATTER = ("k", "v", "k_cache", "v_cache", "slot_mapping")
BOTH_WAYS = (*SCATTER, "direction")
#: The parameters of `multi_layer_kv_transfer`.
TRANSFER = (
    "key_value", "kv_cache_ptrs", "slot_mapping", "paged_memory_device", "page_buffer_size",
    "direction", "kv_format", "block_size", "head_size", "skip_prefix_n_tokens",
)  # fmt: skip


@dataclass(frozen=True)
class Ops:
    """The package's ops.

    Attributes:
        reshape: `reshape_paged_cache`; ``gathers``: it has a direction.
        transfer: `multi_layer_kv_transfer`; None where there is none with known parameters.
        formats, directions: members of ``KVFormat`` and ``TransferDirection`` by name.
        emulated: the package says that it is a stand-in.
        told: all this as a sentence.
    """

    reshape: Callable[..., Any]
    gathers: bool
    transfer: Callable[..., Any] | None
    formats: dict[str, Any]
    directions: dict[str, Any]
    emulated: bool
    told: str


def load_ops() -> Ops:
    """The ops of the installed package, which is imported.

    Raises:
        Unusable: there is no package, it does not load, or `reshape_paged_cache` is another.
    """
    package = imported(PACKAGE, VENDOR_PACKAGES["mlu"][1])
    name = f"{PACKAGE} {version_of(package)}"
    reshape = getattr(package, "reshape_paged_cache", None)
    found = parameters(reshape) if callable(reshape) else ()
    if not callable(reshape) or found not in (SCATTER, BOTH_WAYS):
        has = written("reshape_paged_cache", found) if callable(reshape) else "no such op"
        raise Unusable(
            f"reshape_paged_cache is wanted of {name}, which has {has}; expected "
            f"{written('reshape_paged_cache', BOTH_WAYS)}, or the same without direction: install "
            f"a release that has it"
        )
    gathers = found == BOTH_WAYS
    ways = "to and from the cache" if gathers else "to the cache only, since it has no direction"
    transfer, more = _transfer(package)
    emulated = bool(getattr(package, "EMULATED", False))
    label = " (emulated)" if emulated else ""
    return Ops(
        reshape, gathers, transfer, _members(package, "KVFormat"),
        _members(package, "TransferDirection"), emulated,
        f"{name}{label} has reshape_paged_cache ({ways}) and {more}",
    )  # fmt: skip


def _transfer(package: Any) -> tuple[Callable[..., Any] | None, str]:
    found = getattr(package, "multi_layer_kv_transfer", None)
    if not callable(found):
        return None, "no multi_layer_kv_transfer"
    if parameters(found) != TRANSFER:
        another = written("multi_layer_kv_transfer", parameters(found))
        return None, f"a {another} that is not the known one and is not used"
    return found, "multi_layer_kv_transfer"


def _members(package: Any, enumeration: str) -> dict[str, Any]:
    return dict(getattr(getattr(package, enumeration, None), "__members__", {}))


def parameters(found: Callable[..., Any]) -> tuple[str, ...]:
    """The names of a function's parameters; empty if it does not tell them."""
    try:
        return tuple(inspect.signature(found).parameters)
    except (TypeError, ValueError):
        return ()


def written(name: str, names: Sequence[str]) -> str:
    """A signature for a reader: ``name(a, b)``."""
    return f"{name}({', '.join(names) or '...'})"
