# SPDX-License-Identifier: Apache-2.0
"""Check a configuration of vLLM's tiers before an engine starts with it. No engine is imported."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from math import inf
from typing import Any, NamedTuple

from portakv.arguments import text
from portakv.errors import InvalidTerms
from portakv.integrations import TIER_RELEASES
from portakv.integrations.checks import (
    Findings,
    check_memory,
    check_release,
    check_space,
    means_ours,
)
from portakv.integrations.vllm.check import errors_of_keys
from portakv.integrations.vllm.moves import worker_terms
from portakv.serving.local import StoreTerms, check_names, term_names
from portakv.serving.pages import check_shared

# ------------------------------------------------------------------------------------------------
# The terms of PortaKV's secondary tier in a configuration of vLLM. No engine is imported.

#: Terms of `StoreTerms` that a tier of chunks does not have, and what to do.
OTHERS = {
    "block_size": "Leave it out.",
    "by_layer": "Leave it out.",
    "encoding": "Leave it out.",
}
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
    for name, advice in OTHERS.items():
        if name in terms:
            raise InvalidTerms(
                f"Expected the terms of a tier of whole chunks, got {name!r}. {advice}"
            )
    check_names(terms, [*term_names(OTHERS), IDENTITY])
    left = {"host": 0, **terms}
    identity = text(IDENTITY, left.pop(IDENTITY, ""), least=0, most=1 << 10)
    store = StoreTerms.of(left)
    if store.shared:
        check_shared(store)
    return TierTerms(store, identity)


CONNECTOR = "OffloadingConnector"
MODULE = "portakv.integrations.vllm_tier"
TIER = "PortaKVTier"
SPEC = "PortaKVTieringSpec"
#: vLLM's own, whose worker moves blocks of CUDA, ROCm and XPU devices.
OTHER_SPEC = "TieringOffloadingSpec"
#: PortaKV's worker below vLLM's tier of host memory, without tiers.
WORKER_SPEC = "PortaKVOffloadingSpec"
#: The specifications that are checked, and their modules; None: vLLM has it.
SPECS: dict[Any, str | None] = {
    SPEC: MODULE,
    WORKER_SPEC: "portakv.integrations.vllm",
    OTHER_SPEC: None,
}
#: The keys of a tier that are vLLM's, or of `PortaKVTier` next to its terms.
KEYS = ("type", "module_path", "locality", "backpressure", "enable_kv_events")
#: What the tier needs of vLLM.
NEEDS = (
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
        config: as vLLM's ``--kv-transfer-config`` has it, with the connector `CONNECTOR`.
    """
    findings = Findings(errors=errors_of_keys(config))
    if config.get("kv_role") != "kv_both":
        findings.errors.append(
            f"Expected kv_role 'kv_both', got {config.get('kv_role')!r}. Correct it."
        )
    if config.get("kv_load_failure_policy", "fail") == "fail":
        findings.warnings.append(
            "kv_load_failure_policy is not 'recompute': a load that fails ends its request with an "
            "error. Set it to 'recompute'."
        )
    extra = config.get("kv_connector_extra_config", {})
    if not isinstance(extra, Mapping):
        return findings
    name = extra.get("spec_name")
    if _is_foreign(name, extra.get("spec_module_path")):
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
    check_release(findings, "vllm", "vLLM", NEEDS, who="the tier", install=install)
    return findings


def _is_foreign(name: object, module: object) -> bool:
    """Return whether a specification is neither PortaKV's nor vLLM's tiers, and no misspelt one."""
    if name in SPECS or (isinstance(module, str) and module.startswith("portakv")):
        return False
    return not means_ours(name, SPECS)


def _wrong_spec(extra: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for each key of vLLM's host tier that is wrong."""
    name = extra.get("spec_name")
    if name not in SPECS:
        expected = " or ".join(map(repr, SPECS))
        yield f"Expected spec_name {expected}, got {name!r}. Correct it."
    module = SPECS.get(name)
    if module is not None and extra.get("spec_module_path") != module:
        got = extra.get("spec_module_path")
        yield f"Expected spec_module_path {module!r}, got {got!r}. Correct it."
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
        if tier.get("module_path") != MODULE:
            findings.errors.append(
                f"Expected module_path {MODULE!r} in a tier, got {tier.get('module_path')!r}. "
                f"Correct it."
            )
        if tier.get("locality") not in (None, "LOCAL", "REMOTE"):
            findings.errors.append(
                f"Expected locality 'LOCAL' or 'REMOTE' in a tier, got {tier['locality']!r}. "
                f"Correct it."
            )
        with findings.catching("secondary_tiers"):
            terms = tier_terms({name: tier[name] for name in tier if name not in KEYS}).store
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
