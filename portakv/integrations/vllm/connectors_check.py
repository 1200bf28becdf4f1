# SPDX-License-Identifier: Apache-2.0
"""Check a ``--kv-transfer-config`` of any connector: PortaKV's, vLLM's own, and several together.

No engine is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from portakv.integrations.checks import Findings, means_ours
from portakv.integrations.vllm.check import CONNECTOR, errors_of_keys, findings_of
from portakv.integrations.vllm.tier_check import CONNECTOR as OFFLOADING
from portakv.integrations.vllm.tier_check import tier_findings_of
from portakv.serving.sizing import Sizes

#: vLLM's connector that has others, and its key for them.
MULTI = "MultiConnector"
INNER = "connectors"


def connector_findings_of(
    config: Mapping[str, Any], sizes: Sizes | None = None, block_size: int | None = None
) -> Findings:
    """Return what is wrong with the configuration of a connector.

    A connector of vLLM's own or of another package is not checked. Of a `MULTI` each connector is.

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
    if _is_ours(name, config.get("kv_connector_module_path")):
        return findings_of(config, sizes, block_size)
    findings = Findings(errors=errors_of_keys(config))
    findings.unchecked.append(f"The connector {name!r}, in which PortaKV has no part.")
    return findings


def _is_ours(name: object, module: object) -> bool:
    """Return whether a connector is PortaKV's, or a misspelt one, or has no name."""
    if not isinstance(name, str) or (isinstance(module, str) and module.startswith("portakv")):
        return True
    return means_ours(name, [CONNECTOR])


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
        for kind in fields(Findings):
            sentences = getattr(found, kind.name)
            getattr(findings, kind.name).extend(f"{INNER}[{number}]: {x}" for x in sentences)
    ours = [each for each in inner if each.get("kv_connector") == CONNECTOR]
    if len(ours) > 1:
        findings.errors.append(
            f"Expected one {CONNECTOR} in {MULTI}, got {len(ours)}: they have the engine's name in "
            f"common. Leave the others out."
        )
    return findings
