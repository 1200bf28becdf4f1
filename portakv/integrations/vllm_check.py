# SPDX-License-Identifier: Apache-2.0
"""Check a ``--kv-transfer-config`` before an engine starts with it. No engine is imported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from portakv.errors import BackendUnavailable, InvalidTerms
from portakv.integrations.findings import (
    Findings,
    check_places,
    check_release,
    gib,
    other_values,
    unknown_keys,
)
from portakv.integrations.interfaces import lacks
from portakv.integrations.vllm_handover import ROLES, Handing, roles_of
from portakv.migrate.transports import check_transport
from portakv.serving.local import TOKENS, StoreTerms
from portakv.serving.sizing import Sizes

CONNECTOR = "PortaKVConnector"
MODULE = "portakv.integrations.vllm_connector"
#: The keys of vLLM's configuration, and its name.
OWNER = "vLLM's KVTransferConfig"
KEYS = (
    "kv_connector",
    "engine_id",
    "kv_buffer_device",
    "kv_buffer_size",
    "kv_role",
    "kv_rank",
    "kv_parallel_size",
    "kv_ip",
    "kv_port",
    "kv_connector_extra_config",
    "kv_connector_module_path",
    "enable_permute_local_kv",
    "kv_load_failure_policy",
)
BASE = "vllm.distributed.kv_transfer.kv_connector.v1.base"
#: Hooks that a release of vLLM may lack, and what the connector then does without.
OPTIONAL_HOOKS = {
    f"{BASE}:KVConnectorBase_V1.get_transfer_results": "models with a sliding window",
    f"{BASE}:KVConnectorBase_V1.bind_gpu_block_pool": "models with a sliding window",
    f"{BASE}:KVConnectorBase_V1.build_prom_metrics": "figures for Prometheus",
    f"{BASE}:KVConnectorBase_V1.take_events": "KV events",
    f"{BASE}:KVConnectorBase_V1.has_pending_block_frees": "waiting for blocks before a preemption",
    f"{BASE}:KVConnectorBase_V1.requires_piecewise_for_cudagraph": "by_layer with CUDA graphs",
    f"{BASE}:KVConnectorBase_V1.has_connector_metadata": 'by_layer "graph"',
}
#: Hooks without which the connector does not work.
HOOKS = (
    f"{BASE}:SupportsHMA",
    f"{BASE}:KVConnectorWorkerMetadata",
    f"{BASE}:KVConnectorBase_V1.on_new_request",
    f"{BASE}:KVConnectorBase_V1.build_connector_worker_meta",
    f"{BASE}:KVConnectorBase_V1.handle_preemptions",
    f"{BASE}:KVConnectorBase_V1.get_block_ids_with_load_errors",
)


def findings_of(config: Mapping[str, Any], sizes: Sizes | None = None) -> Findings:
    """Return what is wrong with the configuration of an engine's KV transfers.

    Args:
        config: as vLLM's ``--kv-transfer-config`` has it.
        sizes: of the model that the engine serves, if it is known.
    """
    findings = Findings()
    findings.errors += _wrong_keys(config)
    if not findings.errors and config.get("kv_load_failure_policy", "fail") != "recompute":
        findings.warnings.append(
            "kv_load_failure_policy is not 'recompute': a stored block that is damaged, or was "
            "evicted meanwhile, and a pull that fails end their request with an error. Set it to "
            "'recompute'."
        )
    role = config.get("kv_role")
    _check_terms(role, config.get("kv_connector_extra_config") or {}, sizes, findings)
    _check_release(findings)
    return findings


def _wrong_keys(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for each key of vLLM's that is wrong."""
    yield from unknown_keys(config, KEYS, OWNER)
    yield from other_values(config, {"kv_connector": CONNECTOR, "kv_connector_module_path": MODULE})
    role = config.get("kv_role")
    if role not in ROLES:
        yield f"Expected kv_role {' or '.join(map(repr, ROLES))}, got {role!r}. Correct it."


def _check_terms(role: object, extra: Any, sizes: Sizes | None, findings: Findings) -> None:
    """Check PortaKV's own terms."""
    if not isinstance(extra, Mapping):
        findings.errors.append(
            f"Expected an object for kv_connector_extra_config, got {extra!r}. Correct it."
        )
        return
    try:
        roles = roles_of(role if role in ROLES else "kv_both", extra)
    except InvalidTerms as error:
        findings.errors.append(str(error))
        return
    if roles.handing is not None:
        _check_handing(roles.handing, sizes, findings)
    else:
        findings.notes.append("No requests are handed over: there is no hand_over.")
    if not roles.stores:
        findings.notes.append("The engine has no store: no term names a folder, host or bucket.")
        return
    try:
        terms = StoreTerms.of(roles.store)
    except InvalidTerms as error:
        findings.errors.append(f"kv_connector_extra_config: {error}")
        return
    check_places(terms, findings, "kv_connector_extra_config")
    if terms.shared and not terms.folders:
        findings.warnings.append(
            "shared is true, and there is no folder by which other engines would find the store. "
            "Name a folder."
        )
    findings.notes.append(_who_stores(terms))
    if terms.encoding is not None:
        findings.notes.append(_packed_blocks(terms))
    if sizes is not None:
        _check_sizes(terms, sizes, findings)


def _check_handing(handing: Handing, sizes: Sizes | None, findings: Findings) -> None:
    """Read the secret of engines that hand requests over, look for their transport, and say who
    reaches them."""
    terms = handing.terms
    try:
        terms.secret()
        check_transport(terms.transport, torch.device("cpu"))
    except (InvalidTerms, BackendUnavailable) as error:
        findings.errors.append(f"kv_connector_extra_config: hand_over: {error}")
    if sizes is not None and sizes.windows:
        findings.errors.append(
            "Expected a model whose layers all keep all tokens for hand_over, got one with windows "
            "or other kinds of layers. Leave hand_over out."
        )
    does = {
        (True, False): "offers the rows of prompts that it computes",
        (False, True): "pulls the rows of prompts that other engines have computed",
        (True, True): "offers the rows of prompts, and pulls those of other engines",
    }[handing.offers, handing.pulls]
    reach = f"at {terms.address}" if terms.address else "of this host and this user"
    findings.notes.append(f"The engine {does}; engines {reach} hand requests over to each other.")
    if terms.peers and not handing.pulls:
        findings.warnings.append(
            "peers has no effect on an engine that pulls no rows: a decode engine connects to the "
            "prefill engines. Move it to the decode engine's configuration."
        )
    elif terms.peers:
        findings.notes.append(f"It connects to {', '.join(terms.peers)} when it starts.")
    if handing.offers and terms.timeout > terms.lease:
        findings.warnings.append(
            f"timeout is {terms.timeout:g} s, longer than the lease of {terms.lease:g} s: rows are "
            f"gone before a pull gives up. Make lease at least as long."
        )


def _who_stores(terms: StoreTerms) -> str:
    """Return which engines the terms serve."""
    if terms.by_layer:
        one = (
            "by_layer serves engines with one worker, without tensor parallelism, that are started "
            "with --no-async-scheduling"
        )
        if terms.waits_in_graphs:
            return f"{one}. CUDA graphs capture the waits of layers, which needs portakv[cuda]."
        return f"{one}; vLLM uses piecewise CUDA graphs."
    if terms.attaches:
        return (
            "A store server of this host serves the folder: `portakv store serve FOLDER`, whose "
            "sizes count. Nothing is stored or loaded while none does."
        )
    if terms.shared and not terms.folders:
        return "The ranks of this engine share one store. Other engines share it by a folder alone."
    if terms.shared:
        return "Engines of this host with the same folder and shared share one store."
    return (
        "An engine with one worker has its store alone, unless shared is true. Ranks of tensor "
        "parallelism, and of data parallelism over a folder, share one."
    )


def _packed_blocks(terms: StoreTerms) -> str:
    """Return which blocks are packed."""
    size = "--block-size 64 costs an engine less than 16"
    if terms.block_size is not None:
        size = f"with block_size, it has to be --block-size {terms.block_size}"
    return (
        f"Blocks of bf16 rows are stored packed, others raw. Stored blocks have the size of the "
        f"engine's blocks: {size}."
    )


def _check_sizes(terms: StoreTerms, sizes: Sizes, findings: Findings) -> None:
    """Compare terms with a model."""
    size = terms.block_size or TOKENS
    if terms.staging < size * sizes.token:
        findings.errors.append(
            f"staging is {gib(terms.staging)}, and a block of {size} tokens takes "
            f"{gib(size * sizes.token)}. Give it {gib(sizes.staging)}."
        )
    elif terms.staging < sizes.staging:
        findings.warnings.append(
            f"staging is {gib(terms.staging)}, less than {gib(sizes.staging)}: blocks of long "
            f"prompts are not saved while it is full. Give it more."
        )
    places = {"host memory": terms.host}
    if terms.folders:
        places["the disk"] = terms.capacity
    kept = ", ".join(f"{place} {sizes.tokens(size):,}" for place, size in places.items())
    if terms.bucket is not None:
        kept += ", the bucket as many as its own rules keep"
    findings.notes.append(f"A token takes {sizes.token:,} bytes; tokens that fit: {kept}.")


def _check_release(findings: Findings) -> None:
    """Compare the installed release of vLLM with the hooks that the connector uses."""
    if check_release(findings, "vllm", "vLLM", HOOKS, who="the connector"):
        findings.notes += [
            f"The installed vLLM has no {name.partition(':')[2]}: the connector serves without "
            f"{OPTIONAL_HOOKS[name]}."
            for name in lacks(OPTIONAL_HOOKS)
        ]
