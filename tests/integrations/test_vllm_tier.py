# SPDX-License-Identifier: Apache-2.0
"""The hooks of PortaKV's tier of vLLM, with a stand-in of vLLM."""

from __future__ import annotations

import os
from pathlib import Path

from support import ready
from support.vllm_tiering_stub import write_vllm_with_tiers
from support.waits import LIMIT

TESTS = Path(__file__).resolve().parents[1]


def test_a_walk_through_the_hooks_of_a_tier(tmp_path: Path) -> None:
    write_vllm_with_tiers(tmp_path)
    paths = [str(tmp_path), str(TESTS), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = ready.run(
        str(TESTS / "integrations" / "vllm_tier_hooks.py"),
        str(tmp_path),
        env=environment,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "walked\n"
