# SPDX-License-Identifier: Apache-2.0
"""Check an ``--l2-adapter`` before LMCache's MP server starts with it. LMCache is not imported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from portakv.arguments import invalid, items, whole
from portakv.errors import InvalidTerms
from portakv.integrations.checks import (
    Findings,
    check_places,
    check_release,
    unknown_keys,
    wrong_values,
)
from portakv.serving.local import StoreTerms, check_names
from portakv.serving.pages import PageSize, sizes_in

MODULE = "portakv.integrations.lmcache_l2"
CLASS = "PortaKVL2Adapter"
#: The keys of LMCache's plugin adapter, and those that all of its adapters have.
KEYS = ("type", "module_path", "class_name", "config_class_name", "adapter_params")
COMMON_KEYS = ("affinity_tag", "shared", "eviction", "persist_enabled", "serde")
#: The sizes of objects, which servers that share a folder name.
OBJECTS = "object_bytes"
#: The terms of the adapter: those of a store, and the sizes of objects.
TERMS = ("folder", "capacity", "host", "staging", "deadline", "shared", OBJECTS)
#: Seconds for a load, which is of all objects of a prompt.
DEADLINE = 30.0
#: The name under which pages lie in the folder; a key contains the name of the model.
MODEL = "lmcache"
#: The abstract methods of LMCache's adapters.
ABSTRACT = (
    "close",
    "get_load_event_fd",
    "get_lookup_and_lock_event_fd",
    "get_store_event_fd",
    "pop_completed_store_tasks",
    "query_load_result",
    "query_lookup_and_lock_result",
    "submit_load_task",
    "submit_lookup_and_lock_task",
    "submit_store_task",
    "submit_unlock",
)
BASE = "lmcache.v1.distributed.l2_adapters.base"
HOOKS = (
    *(f"{BASE}:L2AdapterInterface.{name}" for name in ABSTRACT),
    "lmcache.v1.distributed.l2_adapters.plugin_l2_adapter:PluginL2AdapterConfig",
)


def terms_of(params: Mapping[str, Any]) -> StoreTerms:
    """Return the terms of a store from the ``adapter_params`` of LMCache.

    Raises `InvalidTerms` for a name that is not a term, and without a folder.
    """
    check_names(params, TERMS)
    if not params.get("folder"):
        raise InvalidTerms("Expected a folder, got none. Name a folder of a local disk.")
    own = {name: value for name, value in params.items() if name != OBJECTS}
    terms = StoreTerms.of({"host": 0, "deadline": DEADLINE, **own})
    if terms.shared != (OBJECTS in params):
        raise InvalidTerms(
            f"Expected shared and {OBJECTS} together, got one of them. Servers that share a folder "
            f"name the bytes of their objects: pass both, or leave both out."
        )
    if terms.shared:
        object_sizes(params)
    return terms


def sizes_of(params: Mapping[str, Any], terms: StoreTerms) -> list[PageSize]:
    """Return the sizes with which the store of an adapter begins.

    Without ``shared`` they are those in the folder, and others may follow.
    """
    return object_sizes(params) if terms.shared else sizes_in(terms, MODEL)


def object_sizes(params: Mapping[str, Any]) -> list[PageSize]:
    """Return the sizes of the objects of a shared folder, in order: all servers name the same.

    Raises `InvalidTerms` for values that are not sizes.
    """
    given = params.get(OBJECTS)
    some = [given] if isinstance(given, int) else items(OBJECTS, given, "bytes of objects")
    sizes = sorted({whole(OBJECTS, each, 1) for each in some})
    if not sizes or len(sizes) > 64:
        raise invalid(OBJECTS, "one to 64 sizes of objects in bytes", given)
    return [PageSize(nbytes) for nbytes in sizes]


def findings_of(config: Mapping[str, Any]) -> Findings:
    """Return what is wrong with the configuration of an L2 adapter.

    Args:
        config: as LMCache's ``--l2-adapter`` has it.
    """
    findings = Findings()
    findings.errors += unknown_keys(config, (*KEYS, *COMMON_KEYS), "LMCache's plugin adapter")
    expected = {"type": ["plugin"], "module_path": [MODULE], "class_name": [CLASS]}
    findings.errors += wrong_values(config, expected)
    findings.errors += wrong_values(config, {"adapter_params": [dict]}, optional=True)
    params = config.get("adapter_params", {})
    if isinstance(params, Mapping):
        with findings.catching("adapter_params"):
            terms = terms_of(params)
            check_places(terms, findings, "adapter_params")
            if terms.shared:
                findings.notes.append(
                    f"Servers of this host with the folder share it, if each has the same "
                    f"{OBJECTS}. Objects of other sizes are not stored."
                )
    findings.warnings += _without_use(config)
    check_release(findings, "lmcache", "LMCache", HOOKS, who="the adapter")
    return findings


def _without_use(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for each key that does not do what a user wants."""
    if config.get("persist_enabled") is False:
        yield "persist_enabled is false, and the folder keeps its objects all the same. Remove it."
    params = config.get("adapter_params")
    if config.get("shared") and not (isinstance(params, Mapping) and params.get("shared")):
        yield (
            "shared is true, which LMCache shows in its figures, and the folder belongs to one "
            "server at a time. Set shared in adapter_params to share it."
        )
    if config.get("eviction"):
        yield (
            "eviction is set: LMCache deletes objects, and knows only those that this server has "
            "stored or found. Without it the store evicts the least recently used objects itself."
        )
