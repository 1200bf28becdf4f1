# SPDX-License-Identifier: Apache-2.0
"""Check a ``--kv-transfer-config`` before an engine starts with it. No engine is imported."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from math import inf
from typing import Any, NamedTuple

import torch

from portakv.arguments import text
from portakv.errors import InvalidTerms
from portakv.integrations import TIER_RELEASES
from portakv.integrations.checks import (
    Findings,
    check_memory,
    check_places,
    check_release,
    check_space,
    gib,
    means_ours,
    unknown_keys,
    wrong_values,
)
from portakv.integrations.interfaces import lacks, names_in
from portakv.integrations.vllm.caches import (
    ROLES,
    Handing,
    Roles,
    Workers,
    check_by_layer,
    check_handed,
    check_states,
    least_tokens,
    roles_of,
    stored_block,
)
from portakv.integrations.vllm.moves import worker_terms
from portakv.integrations.vllm.notes import WITNESS, WitnessTerms, check_policy
from portakv.migrate.transports import check_transport
from portakv.runtime.devices import usual_device
from portakv.serving import Group
from portakv.serving.local import StoreTerms, check_names, image_of, term_names
from portakv.serving.pages import check_shared
from portakv.serving.sizing import STATE, Sizes

CONNECTOR = "PortaKVConnector"
MODULE = "portakv.integrations.vllm_connector"
WITNESS_MODULE = "portakv.integrations.vllm.witness"
#: What has the keys of vLLM's configuration.
OWNER = "vLLM's KVTransferConfig"
#: The types and the values of keys that vLLM reads from JSON.
VALUES: dict[str, tuple[Any, ...]] = {
    "kv_connector": (str, None),
    "engine_id": (str, None),
    "kv_connector_module_path": (str, None),
    "kv_rank": (int, None),
    "kv_buffer_device": (str,),
    "kv_ip": (str,),
    "kv_port": (int,),
    "kv_parallel_size": (int,),
    "kv_buffer_size": (int, float),
    "enable_permute_local_kv": (bool,),
    "kv_connector_extra_config": (dict,),
    "kv_load_failure_policy": ("fail", "recompute"),
}
KEYS = (*VALUES, "kv_role")
#: The class of vLLM with the keys. Releases differ in them.
FIELDS = "vllm.config.kv_transfer:KVTransferConfig"
#: The tokens of a block that vLLM may choose without ``--block-size``.
BLOCKS = (16, 32, 64, 128)
BASE = "vllm.distributed.kv_transfer.kv_connector.v1.base"
#: Hooks of vLLM's class that a release may lack, and what the connector then does without.
OPTIONAL_HOOKS = {
    "get_transfer_results": "several workers, or a shared store, for models with several groups",
    "build_prom_metrics": "figures for Prometheus",
    "take_events": "KV events",
    "has_pending_block_frees": "waiting for blocks before a preemption",
    "requires_piecewise_for_cudagraph": "by_layer with CUDA graphs",
    "has_connector_metadata": 'by_layer "graph"',
}
#: Hooks without which the connector does not work.
HOOKS = names_in(
    BASE,
    "SupportsHMA",
    "KVConnectorWorkerMetadata",
    "KVConnectorBase_V1.on_new_request",
    "KVConnectorBase_V1.bind_gpu_block_pool",
    "KVConnectorBase_V1.build_connector_worker_meta",
    "KVConnectorBase_V1.handle_preemptions",
    "KVConnectorBase_V1.get_block_ids_with_load_errors",
)


def findings_of(
    config: Mapping[str, Any], sizes: Sizes | None = None, block_size: int | None = None
) -> Findings:
    """Return what is wrong with the configuration of an engine's KV transfers.

    The functions that refuse a configuration are those that the connector calls in the engine.

    Args:
        config: as vLLM's ``--kv-transfer-config`` has it.
        sizes: of the model that the engine serves, if it is known.
        block_size: of vLLM's ``--block-size``, if the engine is started with it.
    """
    findings = Findings(errors=errors_of_keys(config))
    expected = {"kv_connector": [CONNECTOR], "kv_connector_module_path": [MODULE]}
    findings.errors += wrong_values(config, expected | {"kv_role": [*ROLES]})
    if not findings.errors and config.get("kv_load_failure_policy", "fail") != "recompute":
        findings.warnings.append(
            "kv_load_failure_policy is not 'recompute': a stored block that is damaged, or was "
            "evicted meanwhile, and a pull that fails end their request with an error. Set it to "
            "'recompute'."
        )
    _check_model(sizes, findings)
    extra = config.get("kv_connector_extra_config", {})
    if isinstance(extra, Mapping):
        with findings.catching():
            role = config.get("kv_role")
            roles = roles_of(role if role in ROLES else "kv_both", extra)
            _check_roles(roles, sizes, block_size, findings)
    if check_release(findings, "vllm", "vLLM", HOOKS, who="the connector"):
        findings.notes += [
            f"The installed vLLM has no KVConnectorBase_V1.{hook}: the connector serves without "
            f"{feature}."
            for hook, feature in OPTIONAL_HOOKS.items()
            if lacks([f"{BASE}:KVConnectorBase_V1.{hook}"])
        ]
    return findings


def errors_of_keys(config: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the keys that every connector of vLLM has, and their values."""
    wrong = [*unknown_keys(config, KEYS, OWNER), *wrong_values(config, VALUES, optional=True)]
    if not lacks([FIELDS]):  # vLLM is installed
        wrong += [
            f"Expected keys of the installed vLLM's KVTransferConfig, got {name!r}, which other "
            f"releases have. Leave it out."
            for name in config
            if name in KEYS and lacks([f"{FIELDS}.{name}"])
        ]
    return wrong


def _check_model(sizes: Sizes | None, findings: Findings) -> None:
    """Say whether the connector serves the layers of a model."""
    if sizes is None:
        findings.unchecked.append(
            "The model: which layers it has, and whether a block fits into staging and capacity. "
            "Pass --model with its folder."
        )
        return
    if sizes.refused:
        findings.errors.append(
            f"Expected a model whose layers keep rows of tokens for PortaKVConnector, got one of "
            f"another kind: {sizes.refused}. Choose the OffloadingConnector for this model."
        )
    elif sizes.layers:
        kinds = ", ".join(f"{many} with {kind}" for kind, many in sizes.layers.items())
        findings.notes.append(f"The model's layers: {kinds}. {_hits_of(sizes)}")
    if sizes.unknown:
        findings.unchecked.append(f"The sizes of the model's rows: {sizes.unknown}.")


def _hits_of(sizes: Sizes) -> str:
    """Return where a hit can end, by the kinds of layers."""
    if sizes.has_states:
        return "A hit ends where vLLM has kept a state. Start vLLM with --enable-prefix-caching."
    if sizes.windows:
        return "A hit ends at a stored block before which all rows of the windows are there."
    return "A hit ends at any stored block."


def _check_roles(
    roles: Roles, sizes: Sizes | None, block_size: int | None, findings: Findings
) -> None:
    """Check what an engine does by its role."""
    if sizes is not None and sizes.indexed:
        _check_indexed(roles.store, sizes, findings)
    if roles.handing is not None:
        _check_handing(roles.handing, sizes, findings)
    else:
        findings.notes.append(
            "This engine hands no prompt over to another engine, and takes none over. For prefill "
            "and decode in two engines, add hand_over to kv_connector_extra_config."
        )
    if not roles.stores:
        findings.notes.append(
            "This engine stores no blocks: kv_connector_extra_config has no folder, host or bucket."
        )
        return
    with findings.catching("kv_connector_extra_config"):
        # Check the terms of the store, and compare them with the engine's blocks.
        terms = StoreTerms.of(roles.store)
        check_places(terms, findings, "kv_connector_extra_config")
        if terms.shared and not terms.folders:
            findings.warnings.append(
                "shared is true, and there is no folder by which other engines would find the "
                "store. Name a folder."
            )
        findings.notes.append(_who_stores(terms))
        if terms.encoding is not None:
            size_of = "--block-size 64 costs an engine less than 16"
            if terms.block_size is not None:
                size_of = f"with block_size, it has to be --block-size {terms.block_size}"
            findings.notes.append(
                f"Blocks of bf16 rows are stored packed, others raw. Stored blocks have the size "
                f"of the engine's blocks: {size_of}."
            )
        size = _check_blocks(terms, sizes, block_size, findings)
        if sizes is not None and sizes.windows and not sizes.refused:
            with findings.catching():
                check_by_layer(terms)
        if sizes is not None and sizes.has_states:
            with findings.catching():
                check_states(terms, Workers(1, True))
        if size is not None and sizes is not None and sizes.token:
            _check_sizes(terms, sizes, size, findings)


def _check_indexed(terms: Mapping[str, Any], sizes: Sizes, findings: Findings) -> None:
    """Say what a model cannot have whose layers keep an index next to their rows.

    Ranks and shared stores need an index whose rows can be read by token.
    """
    layers = sizes.indexed
    names = ("by_layer",) if sizes.has_known_index else ("shared", "by_layer")
    refused = [name for name in names if terms.get(name)]
    if refused:
        findings.errors.append(
            f"Expected no {' or '.join(refused)} for a model of which {layers} layers keep an "
            f"index next to their rows, got {'both' if refused[1:] else 'it'}. Leave "
            f"{' and '.join(refused)} out of kv_connector_extra_config."
        )
        return
    if sizes.has_known_index:
        findings.warnings.append(
            f"{layers} of the model's layers keep an index next to their rows. Several ranks, "
            f"block_size and hand_over need keys of 8 bits there, and not an AMD GPU. Leave "
            f"--attention-config.indexer_kv_dtype out, or run one worker."
        )
        return
    findings.warnings.append(
        f"{layers} of the model's layers keep an index next to their rows. One worker stores them; "
        f"with several ranks and a store, block_size or hand_over vLLM would not start. Run one "
        f"worker, or choose the OffloadingConnector."
    )


def _check_blocks(
    terms: StoreTerms, sizes: Sizes | None, block_size: int | None, findings: Findings
) -> int | None:
    """Compare the blocks of a store with those of the engine; return the tokens of the smallest
    stored block that the engine may have, None if it has none."""
    blocks = BLOCKS if block_size is None else (block_size,)
    if sizes is not None and sizes.block:  # vLLM makes blocks as large as a state
        blocks = (max(sizes.block, block_size or 0),)
    least = least_tokens(usual_device().type, terms)
    stored = list[int]()
    refusals = list[str]()
    for block in blocks:
        try:
            stored.append(stored_block(terms, _groups(block, sizes), least))
        except InvalidTerms as error:
            refusals.append(f"kv_connector_extra_config: {error}")
    if not stored:
        advice = "" if block_size else " Pass --block-size as vLLM has it, if it has."
        findings.errors.append(f"{refusals[0]}{advice}")
        return None
    if refusals:
        findings.unchecked.append(
            f"Whether the engine's blocks fit, whose size vLLM chooses. Pass --block-size as vLLM "
            f"has it. With some sizes vLLM would not start: {refusals[0]}"
        )
    return min(stored)


def _groups(block: int, sizes: Sizes | None) -> Sequence[Group]:
    """Return groups of layers with blocks of a size, as far as the model is known."""
    groups = [Group(block)]
    if sizes is not None and sizes.window is not None:
        groups.append(Group(block, sizes.window))
    if sizes is not None and sizes.has_states:
        groups.append(Group(block, states="last"))
    return groups


def _check_handing(handing: Handing, sizes: Sizes | None, findings: Findings) -> None:
    """Read the secret of engines that hand requests over, look for their transport, and say who
    reaches them."""
    terms = handing.terms
    with findings.catching("kv_connector_extra_config: hand_over"):
        terms.secret()
        check_transport(terms.transport, torch.device("cpu"))
    if sizes is not None and {*sizes.layers} == {STATE}:
        with findings.catching():
            check_handed([Group(1, states="last")])
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
            "sizes count. Without that server nothing is stored or loaded."
        )
    if terms.shared and not terms.folders:
        return "The ranks of this engine share one store. Other engines share it by a folder alone."
    if terms.shared:
        return "Engines of this host with the same folder and shared share one store."
    return (
        "If the engine has one worker, no other engine uses its store; set shared to true to share "
        "the store. Ranks of tensor parallelism, and of data parallelism over a folder, share one."
    )


def _check_sizes(terms: StoreTerms, sizes: Sizes, size: int, findings: Findings) -> None:
    """Compare terms with the blocks of a model, of ``size`` tokens."""
    whole = image_of(size * sizes.token)
    # vLLM divides the layers of a model with windows into groups, each with separate blocks.
    least = image_of(size * sizes.layer) if sizes.windows else whole
    try:
        terms.check_room([least])
    except InvalidTerms as error:
        findings.errors.append(
            f"kv_connector_extra_config: {error} Blocks of {size} tokens of this model take "
            f"{gib(size * sizes.token)}; {gib(sizes.staging)} of staging are enough."
        )
        return
    try:
        terms.check_room([whole])
    except InvalidTerms as error:
        findings.unchecked.append(
            f"Whether a block of each of the engine's groups of layers fits; one of all layers "
            f"does not. {error}"
        )
    if terms.staging < sizes.staging and not terms.attaches:
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
    if sizes.state:
        findings.notes.append(
            f"The states after a token take {sizes.state:,} bytes, those of one block of "
            f"{size:,} tokens or more in vLLM. They are stored where vLLM keeps one: hits end at "
            f"ends of blocks, after a step of prefill or a block that was decoded."
        )


# ------------------------------------------------------------------------------------------------
# vLLM's OffloadingConnector with PortaKV's worker or tier.

#: Terms of `StoreTerms` that a tier of chunks does not have.
TIER_OTHERS = ("block_size", "by_layer", "encoding")
#: The term that names what else fixes the bytes of chunks.
IDENTITY = "identity"


class TierTerms(NamedTuple):
    """The terms of a tier.

    Attributes:
        store: where chunks are stored.
        identity: what else fixes the bytes of chunks; chunks of another identity are not found.
    """

    store: StoreTerms
    identity: str


def tier_terms(terms: Mapping[str, Any]) -> TierTerms:
    """Return the terms of a tier, as a configuration has them.

    vLLM has a tier of host memory itself: ``host`` is 0 by default.

    Raises `InvalidTerms` for a term that a tier does not have, and for wrong values.
    """
    for name in TIER_OTHERS:
        if name in terms:
            raise InvalidTerms(
                f"Expected the terms of a tier of whole chunks, got {name!r}. Leave it out."
            )
    check_names(terms, [*term_names(TIER_OTHERS), IDENTITY])
    left = {"host": 0, **terms}
    identity = text(IDENTITY, left.pop(IDENTITY, ""), least=0, most=1 << 10)
    store = StoreTerms.of(left)
    if store.shared:
        check_shared(store)
    return TierTerms(store, identity)


OFFLOADING = "OffloadingConnector"
TIER_MODULE = "portakv.integrations.vllm_tier"
TIER = "PortaKVTier"
SPEC = "PortaKVTieringSpec"
#: vLLM's own, whose worker moves blocks of CUDA, ROCm and XPU devices.
OTHER_SPEC = "TieringOffloadingSpec"
#: PortaKV's worker below vLLM's tier of host memory, without tiers.
WORKER_SPEC = "PortaKVOffloadingSpec"
#: The specifications that are checked, and their modules; None: vLLM has it.
SPECS: dict[Any, str | None] = {
    SPEC: TIER_MODULE,
    WORKER_SPEC: "portakv.integrations.vllm",
    OTHER_SPEC: None,
}
#: The keys of a tier that are vLLM's, or of `PortaKVTier` next to its terms.
TIER_KEYS = ("type", "module_path", "locality", "backpressure", "enable_kv_events")
#: What the tier needs of vLLM.
TIER_NEEDS = (
    "vllm.v1.kv_offload.tiering.factory:SecondaryTierFactory.get_tier_class",
    "vllm.v1.kv_offload.tiering.base:TransferJob",
    "vllm.v1.kv_offload.tiering.base:SecondaryTierManager.drain_jobs",
    "vllm.v1.kv_offload.tiering.spec:TieringOffloadingSpec.get_manager",
    "vllm.v1.kv_offload.base:Medium",
    "vllm.v1.kv_offload.file_mapper:FileMapper.from_offloading_spec",
)
#: What the worker needs of vLLM.
WORKER_NEEDS = (
    "vllm.v1.kv_offload.base:OffloadingWorker",
    "vllm.v1.kv_offload.cpu.spec:CPUOffloadingSpec",
)


def tier_findings_of(config: Mapping[str, Any]) -> Findings:
    """Return what is wrong with the configuration of an engine's offloading or tiers.

    A specification of vLLM's own, or of another package, is not checked.

    Args:
        config: as vLLM's ``--kv-transfer-config`` has it, with the connector `OFFLOADING`.
    """
    findings = Findings(errors=errors_of_keys(config))
    findings.errors += wrong_values(config, {"kv_role": ["kv_both"]})
    if config.get("kv_load_failure_policy", "fail") == "fail":
        findings.warnings.append(
            "kv_load_failure_policy is not 'recompute': a load that fails ends its request with an "
            "error. Set it to 'recompute'."
        )
    extra = config.get("kv_connector_extra_config", {})
    if not isinstance(extra, Mapping):
        return findings
    name = extra.get("spec_name")
    if not means_ours(name, SPECS, extra.get("spec_module_path")):
        findings.unchecked.append(
            f"The specification {name or 'CPUOffloadingSpec'!r}, in which PortaKV has no part."
        )
        return findings
    wrong = [*_wrong_spec(extra)]
    findings.errors += wrong
    if name == WORKER_SPEC:
        with findings.catching("kv_connector_extra_config"):
            worker_terms(extra)
        if not wrong:
            check_memory(extra["cpu_bytes_to_use"], findings, "cpu_bytes_to_use")
        check_release(findings, "vllm", "vLLM", WORKER_NEEDS, who="the worker")
        return findings
    tiers = extra.get("secondary_tiers", [])
    if not isinstance(tiers, Sequence) or not all(isinstance(each, Mapping) for each in tiers):
        findings.errors.append(
            f"Expected secondary_tiers as a list of objects, got {tiers!r}. Correct it."
        )
        return findings
    own = [each for each in tiers if each.get("type") == TIER]
    if not own and extra.get("spec_name") != SPEC:
        findings.errors.append(
            f"Expected a tier of the type {TIER!r} in secondary_tiers, got none. Add one."
        )
    taken = _check_tiers(own, findings)
    if not wrong:
        taken += extra["cpu_bytes_to_use"]
    check_memory(taken, findings, "cpu_bytes_to_use and the host and staging of tiers")
    install = TIER_RELEASES.range
    check_release(findings, "vllm", "vLLM", TIER_NEEDS, who="the tier", install=install)
    return findings


def _wrong_spec(extra: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for each key of vLLM's host tier that is wrong."""
    module = SPECS.get(extra.get("spec_name"))
    expected = {"spec_name": [*SPECS]} | ({"spec_module_path": [module]} if module else {})
    yield from wrong_values(extra, expected)
    nbytes = extra.get("cpu_bytes_to_use")
    if not isinstance(nbytes, int | float) or isinstance(nbytes, bool) or not 0 < nbytes < inf:
        yield (
            f"Expected cpu_bytes_to_use as the bytes of vLLM's host memory, got {nbytes!r}. Give "
            f"it some."
        )


def _check_tiers(tiers: Sequence[Mapping[str, Any]], findings: Findings) -> float:
    """Check the terms of PortaKV's tiers; return the bytes of memory that they take together."""
    folders = Counter[str]()
    taken = 0.0
    for tier in tiers:
        known = {"module_path": (TIER_MODULE,), "locality": (None, "LOCAL", "REMOTE")}
        findings.errors += wrong_values(tier, known, where=" in a tier")
        with findings.catching("secondary_tiers"):
            terms = tier_terms({name: tier[name] for name in tier if name not in TIER_KEYS}).store
            taken += terms.host + terms.staging
            check_space(terms, findings, "secondary_tiers")
            folders.update(terms.folders)
            if terms.shared:
                findings.notes.append(
                    "Engines of this host with the folder share it, if each has shared and chunks "
                    "of the same model and size."
                )
            elif terms.folders:
                findings.notes.append(
                    "The folder serves one engine at a time, without data parallelism. Set shared "
                    "to true in each engine to share it."
                )
    findings.errors += [
        f"Expected a separate folder for each tier, got {folder!r} twice. Change one."
        for folder, count in folders.items()
        if count > 1
    ]
    return taken


# ------------------------------------------------------------------------------------------------
# Any connector: PortaKV's, vLLM's own, and several together.

#: vLLM's connector that has others, and its key for them.
MULTI = "MultiConnector"
INNER = "connectors"


def connector_findings_of(
    config: Mapping[str, Any], sizes: Sizes | None = None, block_size: int | None = None
) -> Findings:
    """Return what is wrong with the configuration of a connector.

    A connector of vLLM's own or of another package is not checked. Each connector of a `MULTI` is,
    and the one that a witness wraps.

    Args:
        config: as vLLM's ``--kv-transfer-config`` has it.
        sizes: of the model that the engine serves, if it is known.
        block_size: of vLLM's ``--block-size``, if the engine is started with it.
    """
    name = config.get("kv_connector")
    if name == OFFLOADING:
        return tier_findings_of(config)
    if name == MULTI:
        return _of_several(config, sizes, block_size)
    module = config.get("kv_connector_module_path")
    if name == WITNESS or module == WITNESS_MODULE:
        return _of_witness(config, sizes, block_size)
    if not isinstance(name, str) or means_ours(name, [CONNECTOR], module):
        return findings_of(config, sizes, block_size)
    findings = Findings(errors=errors_of_keys(config))
    findings.unchecked.append(f"The connector {name!r}, in which PortaKV has no part.")
    return findings


def _of_witness(config: Mapping[str, Any], sizes: Sizes | None, block_size: int | None) -> Findings:
    """Return what is wrong with a witness, and with the connector that it wraps."""
    findings = Findings(errors=errors_of_keys(config))
    expected = {"kv_connector": [WITNESS], "kv_connector_module_path": [WITNESS_MODULE]}
    findings.errors += wrong_values(config, expected)
    check_release(findings, "vllm", "vLLM", HOOKS, who="the witness")
    extra = config.get("kv_connector_extra_config", {})
    if not isinstance(extra, Mapping):
        return findings
    with findings.catching("kv_connector_extra_config"):
        terms = WitnessTerms.of(extra)
        inner = {
            **config,
            "kv_connector": terms.connector,
            "kv_connector_module_path": terms.connector_module_path,
            "kv_connector_extra_config": terms.connector_extra_config,
        }
        found = connector_findings_of(inner, sizes, block_size)
        for kind, sentences in vars(found).items():
            more = [x for x in sentences if x not in vars(findings)[kind]]
            vars(findings)[kind] += [f"{terms.connector}: {x}" for x in more]
        check_policy(terms, str(config.get("kv_load_failure_policy", "fail")))
        if terms.check == "off":
            findings.warnings.append(
                "check is 'off': the witness passes hooks on and compares nothing. Set check to "
                "'sample' or 'all'."
            )
            return findings
        part = "all blocks" if terms.check == "all" else f"a part of {terms.rate:g} of the blocks"
        findings.notes.append(
            f"The witness compares {part} that {terms.connector} loads; with a fault: "
            f"{terms.action}."
        )
        check_memory(int(terms.nbytes), findings, "nbytes")
    return findings


def _of_several(config: Mapping[str, Any], sizes: Sizes | None, block_size: int | None) -> Findings:
    """Return what is wrong with a connector that has others."""
    findings = Findings(errors=errors_of_keys(config))
    extra = config.get("kv_connector_extra_config", {})
    inner = extra.get(INNER) if isinstance(extra, Mapping) else None
    if not isinstance(inner, list) or not all(isinstance(each, Mapping) for each in inner):
        findings.errors.append(
            f"Expected {INNER} in kv_connector_extra_config as a list of configurations for "
            f"{MULTI}, got {inner!r:.80}. Correct it."
        )
        return findings
    for number, each in enumerate(inner):
        found = connector_findings_of(each, sizes, block_size)
        for kind, sentences in vars(found).items():
            vars(findings)[kind] += [f"{INNER}[{number}]: {x}" for x in sentences]
    ours = [each for each in inner if each.get("kv_connector") == CONNECTOR]
    if len(ours) > 1:
        findings.errors.append(
            f"Expected one {CONNECTOR} in {MULTI}, got {len(ours)}: they have the engine's name in "
            f"common. Leave the others out."
        )
    return findings
