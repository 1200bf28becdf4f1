# SPDX-License-Identifier: Apache-2.0
"""Check an extra configuration of HiCache's storage before a server starts with it. No engine is
imported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from portakv.integrations.checks import (
    Findings,
    check_places,
    check_release,
    unknown_keys,
    wrong_values,
)
from portakv.integrations.sglang.pools import EXTRA, HOOKS, terms_of

MODULE = "portakv.integrations.sglang_hicache"
CLASS = "PortaKVStorage"
#: The keys that SGLang and PortaKV read.
KEYS = (
    "backend_name",
    "module_path",
    "class_name",
    "interface_v1",
    "hicache_storage_pass_prefix_keys",
    "prefetch_threshold",
    "prefetch_timeout_base",
    "prefetch_timeout_per_ki_token",
    "tp_lcm_size",
    EXTRA,
)


def hicache_findings_of(config: Mapping[str, Any]) -> Findings:
    """Return what is wrong with an extra configuration of HiCache's ``dynamic`` storage.

    Args:
        config: as ``--hicache-storage-backend-extra-config`` has it.
    """
    findings = Findings()
    findings.errors += _wrong_keys(config)
    if not config.get("interface_v1"):
        findings.warnings.append(
            "interface_v1 is not 1: SGLang copies each page before PortaKV stores it, and after "
            "PortaKV has loaded it. Set it to 1."
        )
    if not config.get("hicache_storage_pass_prefix_keys"):
        findings.warnings.append(
            "hicache_storage_pass_prefix_keys is not true: the beginning of a long prompt may be "
            "evicted before its end. Set it to true."
        )
    with findings.catching():
        terms = terms_of(config)
        check_places(terms, findings, EXTRA)
        findings.notes.append(
            "Ranks and servers of this host with the folder share a store."
            if terms.shared
            else "Each rank has a separate folder, and one server has the folder, unless shared is "
            "true. A model with MLA needs shared or a bucket for several ranks."
        )
    check_release(findings, "sglang", "SGLang", HOOKS, who="the storage backend")
    return findings


def _wrong_keys(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for each key that is wrong."""
    yield from unknown_keys(config, KEYS, "SGLang's", misspelt=True)
    yield from wrong_values(config, {"module_path": [MODULE], "class_name": [CLASS]})
    if not config.get("backend_name"):
        yield "Expected backend_name, a name for SGLang's log, got none. Add it."
    if config.get("tp_lcm_size"):
        yield (
            f"Expected no tp_lcm_size, got {config['tp_lcm_size']!r}: ranks have whole pages. "
            f"Leave it out."
        )
