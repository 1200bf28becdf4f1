# SPDX-License-Identifier: Apache-2.0
"""What `import portakv` costs and what it brings along, seen from a fresh interpreter."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.command_line import python

PROBE = """
import json, sys, time
import numpy, torch
before = set(sys.modules)
start = time.process_time()
import {modules}
seconds = time.process_time() - start
roots = set(name.partition(".")[0] for name in set(sys.modules) - before)
print(json.dumps(dict(
    seconds=seconds,
    roots=sorted(roots - set(sys.stdlib_module_names) - set(("numpy", "torch"))),
    cuda=torch.cuda.is_initialized(),
)))
"""


@pytest.fixture(scope="module")
def imports() -> list[dict[str, Any]]:
    """What three new interpreters printed after importing portakv behind torch."""
    return [json.loads(python("-c", PROBE.format(modules="portakv"))) for _ in range(3)]


def test_import_brings_nothing_but_portakv(imports: list[dict[str, Any]]) -> None:
    """No vendor package, no extra and no test tool: only torch, numpy and the standard library."""
    assert [found["roots"] for found in imports] == [["portakv"]] * 3


def test_plugs_bring_no_engine() -> None:
    """Those of vLLM and transformers derive from the engine's classes, and are loaded by it."""
    plugs = ("kvcacheio", "lmcache", "lmcache_ops", "sglang", "vllm_ops")
    modules = ", ".join(f"portakv.integrations.{plug}" for plug in plugs)
    found = json.loads(python("-c", PROBE.format(modules=modules)))
    assert (found["roots"], found["cuda"]) == (["portakv"], False)


def test_import_does_not_start_cuda(imports: list[dict[str, Any]]) -> None:
    assert not any(found["cuda"] for found in imports)


def test_import_takes_less_than_300_ms_beyond_torch(imports: list[dict[str, Any]]) -> None:
    """The one time that a unit test judges: of the processor, since a busy machine lengthens the
    wall's; its caches are colder then all the same, so the best of the three counts."""
    assert min(found["seconds"] for found in imports) < 0.3
