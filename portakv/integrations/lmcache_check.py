# SPDX-License-Identifier: Apache-2.0
"""Check an ``--l2-adapter`` before LMCache's MP server starts with it. LMCache is not imported."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from portakv.errors import InvalidTerms
from portakv.integrations.findings import (
    Findings,
    check_places,
    check_release,
    other_values,
    unknown_keys,
)
from portakv.serving.local import StoreTerms

MODULE = "portakv.integrations.lmcache_l2"
CLASS = "PortaKVL2Adapter"
#: The keys of LMCache's plugin adapter, and those that all of its adapters have.
KEYS = ("type", "module_path", "class_name", "config_class_name", "adapter_params")
COMMON_KEYS = ("affinity_tag", "shared", "eviction", "persist_enabled", "serde")
#: The terms of the adapter, of those of a store.
TERMS = ("folder", "capacity", "host", "staging", "deadline")
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
HOOKS = tuple(f"{BASE}:L2AdapterInterface.{name}" for name in ABSTRACT)
PLUGIN = ("lmcache.v1.distributed.l2_adapters.plugin_l2_adapter:PluginL2AdapterConfig",)


def terms_of(params: Mapping[str, Any]) -> StoreTerms:
    """Return the terms of a store from the ``adapter_params`` of LMCache.

    Raises `InvalidTerms` for a name that is not a term, and without a folder.
    """
    for name in params:
        if name not in TERMS:
            near = difflib.get_close_matches(str(name), TERMS, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise InvalidTerms(
                f"Expected some of {', '.join(TERMS)}, got {name!r}.{hint} Correct it, or leave it "
                f"out."
            )
    if not params.get("folder"):
        raise InvalidTerms("Expected a folder, got none. Name a folder of a local disk.")
    return StoreTerms.of({"host": 0, "deadline": DEADLINE, **params})


def findings_of(config: Mapping[str, Any]) -> Findings:
    """Return what is wrong with the configuration of an L2 adapter.

    Args:
        config: as LMCache's ``--l2-adapter`` has it.
    """
    findings = Findings()
    findings.errors += _wrong_keys(config)
    params = config.get("adapter_params", {})
    if not isinstance(params, Mapping):
        findings.errors.append(
            f"Expected an object for adapter_params, got {params!r}. Correct it."
        )
    else:
        try:
            check_places(terms_of(params), findings, "adapter_params")
        except InvalidTerms as error:
            findings.errors.append(f"adapter_params: {error}")
    findings.warnings += _without_use(config)
    _check_release(findings)
    return findings


def _wrong_keys(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for each key of LMCache's that is wrong."""
    yield from unknown_keys(config, (*KEYS, *COMMON_KEYS), "LMCache's plugin adapter")
    yield from other_values(config, {"type": "plugin", "module_path": MODULE, "class_name": CLASS})


def _without_use(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for each key that does not do what a user wants."""
    if config.get("persist_enabled") is False:
        yield "persist_enabled is false, and the folder keeps its objects all the same. Remove it."
    if config.get("shared"):
        yield (
            "shared is true, and the folder belongs to one server at a time. Give each server a "
            "separate folder."
        )
    if config.get("eviction"):
        yield (
            "eviction is set: LMCache deletes objects, and knows only those that this server has "
            "stored or found. Without it the store evicts the least recently used objects itself."
        )


def _check_release(findings: Findings) -> None:
    """Compare the installed release of LMCache with the hooks that the adapter uses."""
    needs = (*HOOKS, *PLUGIN)
    check_release(findings, "lmcache", "LMCache", needs, who="the adapter")
