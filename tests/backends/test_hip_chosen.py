# SPDX-License-Identifier: Apache-2.0
"""Which backend a torch for ROCm gets for ``cuda``, and what the others say. EMULATED.

In a process of its own, with ``torch.version.hip`` set and the fake driver in HIP's place. No
tensor can lie on such a device here: the self-check copies through the same driver on the host.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from support.hip_cases import needs_compiler

PROGRAM = """
import json
from types import SimpleNamespace
import torch
torch.version.hip, torch.version.cuda = "6.3.42134", None
torch.cuda.current_device = lambda: 0
torch.cuda.device_count = lambda: 1
torch.cuda.get_device_properties = lambda _: SimpleNamespace(name="BW1000", gcnArchName="gfx936")
from portakv import AdaptiveConnector, BackendUnavailable
from portakv.registry import registry
from portakv.registry.self_check import self_check
from portakv.runtime import hip as _hip_driver
from portakv_conformance.vendor.hip_emulated import HipEmulated
from portakv_conformance.vendor.hip_fake import compiler, fake_driver


def on_the_host(backend):
    return self_check(HipEmulated(torch.device("cpu")))


def answers():
    registry.REGISTRY = registry.Registry()  # which has asked nobody yet
    found = {}
    try:
        AdaptiveConnector("cuda")
        found["chosen"] = registry.choose("cuda").name
    except BackendUnavailable as error:
        found["error"] = str(error)
    try:
        AdaptiveConnector("cuda", backend="cuda")
    except BackendUnavailable as error:
        found["forced"] = "\\n".join([str(error), *map(str, error.trace)])
    decisions = registry.trace(torch.device("cuda", 0))
    return found | {"trace": {d.name: [d.accepted, d.reason] for d in decisions}}


registry.self_check = on_the_host
_hip_driver._places = lambda stem, beside=None: iter(())
found = {"without": answers()}
if compiler() is not None:
    _hip_driver.driver = fake_driver
    found["with"] = answers()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What is said with HIP's driver, and without."""
    environment = {**os.environ, "PORTAKV_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}
    for name in ("PORTAKV_BACKEND", "TRITON_INTERPRET"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture
def found(both: dict[str, Any]) -> dict[str, Any]:
    """With the driver."""
    answers: dict[str, Any] = both["with"]
    return answers


@needs_compiler
def test_the_connector_takes_hip(found: dict[str, Any]) -> None:
    assert found["chosen"] == "hip"
    accepted, why = found["trace"]["hip"]
    assert accepted
    assert why.endswith(
        "compiles its kernel for gfx936 (BW1000, a Hygon DCU); self-check passed, every byte right"
    )


@needs_compiler
def test_cuda_says_which_torch_it_is(found: dict[str, Any]) -> None:
    rejected = [False, "this torch is built for ROCm, not for CUDA"]
    assert found["trace"]["cuda"] == rejected
    assert "this torch is built for ROCm, not for CUDA" in found["forced"]
    assert "hip: accepted" in found["forced"]


@needs_compiler
def test_everybody_says_something(found: dict[str, Any]) -> None:
    for name, (_, why) in found["trace"].items():
        assert why, name
        assert "Traceback" not in why
        assert "it failed to load" not in why, f"{name}: {why}"


def test_without_the_driver_it_says_what_to_install(both: dict[str, Any]) -> None:
    accepted, why = both["without"]["trace"]["hip"]
    assert not accepted
    assert why.startswith("the HIP runtime cannot be loaded (")
    assert "install ROCm for an AMD device, or load the environment of the DTK" in why
