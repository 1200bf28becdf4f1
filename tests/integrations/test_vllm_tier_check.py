# SPDX-License-Identifier: Apache-2.0
"""The check of a configuration of vLLM's tiers, without vLLM."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from support.command_line import run

from portakv.errors import InvalidTerms
from portakv.integrations import checks
from portakv.integrations.vllm.check import tier_findings_of, tier_terms


def right(at: Path, extra: dict[str, Any] | None = None, **tier: Any) -> dict[str, Any]:
    """Return a configuration with which an engine starts, with some changes."""
    made = {
        "type": "PortaKVTier",
        "module_path": "portakv.integrations.vllm_tier",
        "folder": str(at / "kv"),
        "capacity": 1 << 20,
        "staging": 1 << 20,
        **tier,
    }
    return {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "spec_name": "PortaKVTieringSpec",
            "spec_module_path": "portakv.integrations.vllm_tier",
            "cpu_bytes_to_use": 1 << 30,
            "secondary_tiers": [made],
            **(extra or {}),
        },
    }


def test_a_right_configuration_has_no_errors(tmp_path: Path) -> None:
    (tmp_path / "kv").mkdir(0o700)
    found = tier_findings_of(right(tmp_path))
    assert found.errors == []
    assert [each for each in found.warnings if "vllm is not installed" not in each] == []
    assert "one engine at a time" in found.notes[0]
    found = tier_findings_of(right(tmp_path, shared=True))
    assert found.errors == []
    assert "share it" in found.notes[0]


@pytest.mark.parametrize(
    ("extra", "tier", "says"),
    [
        ({"spec_name": "PortaKVTiering"}, {}, "Expected spec_name to be 'PortaKVTieringSpec'"),
        ({"spec_module_path": "portakv"}, {}, "Expected spec_module_path"),
        ({"cpu_bytes_to_use": 0}, {}, "Expected cpu_bytes_to_use"),
        ({"secondary_tiers": {}}, {}, "Expected secondary_tiers as a list"),
        (
            {"spec_name": "TieringOffloadingSpec", "secondary_tiers": []},
            {},
            "Expected a tier of the type 'PortaKVTier'",
        ),
        ({}, {"module_path": "portakv"}, "Expected module_path"),
        ({}, {"locality": "near"}, "Expected locality in a tier to be null or 'LOCAL' or 'REMOTE'"),
        ({}, {"capacity": "much"}, "capacity"),
        ({}, {"by_layer": True}, "got 'by_layer'"),
        ({}, {"shared": 1}, "shared"),
        ({}, {"shared": True, "bucket": "memory://"}, "Expected terms with shared and a folder"),
        ({}, {"shared": True, "folder": None, "host": 1 << 20}, "Expected terms with shared"),
        ({}, {"encoding": "pack"}, "got 'encoding'"),
        ({}, {"folders": "/x"}, "got 'folders'"),
        ({}, {"folder": None}, "Expected a host tier, a folder"),
    ],
)
def test_what_is_wrong_is_named(
    extra: dict[str, Any], tier: dict[str, Any], says: str, tmp_path: Path
) -> None:
    errors = tier_findings_of(right(tmp_path, extra, **tier)).errors
    assert len(errors) == 1
    assert says in errors[0]


def test_tiers_of_one_folder_and_other_roles_are_named(tmp_path: Path) -> None:
    config = right(tmp_path)
    tiers = config["kv_connector_extra_config"]["secondary_tiers"]
    tiers.append({**tiers[0]})
    config["kv_role"] = "kv_producer"
    config["kv_rol"] = 1
    del config["kv_load_failure_policy"]
    found = tier_findings_of(config)
    assert [each.split(",")[0] for each in found.errors] == [
        "Expected a key of vLLM's KVTransferConfig",
        "Expected kv_role to be 'kv_both'",
        "Expected a separate folder for each tier",
    ]
    assert "recompute" in found.warnings[0]


MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_tiers_and_vllms_memory_are_added_up(tmp_path: Path) -> None:
    share = 2 * MEMORY // 3
    alone = right(tmp_path, {"cpu_bytes_to_use": share})
    assert tier_findings_of(alone).errors == []
    together = right(tmp_path, {"cpu_bytes_to_use": share}, host=share)
    (error,) = tier_findings_of(together).errors
    assert "by cpu_bytes_to_use and the host and staging of tiers, and this machine has" in error


def test_a_container_has_less_memory_than_its_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(checks, "LIMITS", (tmp_path / "missing", limit))
    limit.write_text("max\n")
    assert tier_findings_of(right(tmp_path)).errors == []
    limit.write_text(f"{1 << 29}\n")
    (error,) = tier_findings_of(right(tmp_path)).errors
    assert "this machine has 512 MiB" in error


@pytest.mark.parametrize("nbytes", [float("inf"), float("nan"), True, 0])
def test_a_size_that_is_none_is_an_error(nbytes: float, tmp_path: Path) -> None:
    (error,) = tier_findings_of(right(tmp_path, {"cpu_bytes_to_use": nbytes})).errors
    assert "Expected cpu_bytes_to_use as the bytes" in error


def test_the_doctor_checks_tiers(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(right(tmp_path, capacity=-1)))
    done = run("doctor", "--kv-transfer-config", str(file))
    assert done.code == 1
    assert "secondary_tiers: " in done.out
    file.write_text(json.dumps(right(tmp_path)))
    assert run("doctor", "--kv-transfer-config", str(file)).code == 0


def test_terms_of_a_tier() -> None:
    terms = tier_terms({"folder": "/nvme/kv", "identity": "fp8 scales of 2026"})
    assert terms.store.host == 0
    assert terms.identity == "fp8 scales of 2026"
    with pytest.raises(InvalidTerms, match="identity"):
        tier_terms({"folder": "/nvme/kv", "identity": 1})
    with pytest.raises(
        InvalidTerms, match=r"identity, got 'idenity'. Did you mean identity\?"
    ) as e:
        tier_terms({"folder": "/nvme/kv", "idenity": "x"})
    assert "by_layer" not in str(e.value)  # which a tier refuses
