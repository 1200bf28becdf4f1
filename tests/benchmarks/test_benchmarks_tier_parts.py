# SPDX-License-Identifier: Apache-2.0
"""The methods to load chunks whose processor time is compared: each brings all bytes."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from portakv_benchmarks import check, guide
from portakv_benchmarks.plugs.tier_parts import HEADER, IMAGE, READ, Parts
from portakv_benchmarks.shared.recorded import read

CHUNKS = 2


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[Parts]:
    try:
        made = Parts(tmp_path / "chunks", CHUNKS)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        pytest.skip("this file system has no O_DIRECT")
    yield made
    made.close()


def test_each_method_brings_all_bytes(parts: Parts, tmp_path: Path) -> None:
    """A single pass brings none, or what staging has."""
    images = np.fromfile(tmp_path / "chunks", np.uint8).reshape(CHUNKS, IMAGE)
    for name, method in parts.methods().items():
        parts.memory[:] = 0
        method()
        if name == "a checksum alone":
            assert not parts.memory.any()
        else:
            assert np.array_equal(parts.memory, images[:, HEADER:]), name
    assert READ in parts.methods()


def test_the_recorded_result_is_judged() -> None:
    """The checksum alone takes more than a half of what the engine's own tier takes."""
    result = read(guide.RESULTS / "parts" / "cpu-2core-vllm-tier-speed.json")
    verdicts = [x for x in check.judge(result, check.load_targets()) if "vLLM's tier" in x.bar.name]
    assert [verdict.word for verdict in verdicts] == ["met", "accepted", "met"]
    alone = [row["of_fs"] for row in result["rows"] if row.get("method") == "a checksum alone"]
    assert alone[0] > 0.5
