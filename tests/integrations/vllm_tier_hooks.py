# SPDX-License-Identifier: Apache-2.0
"""A walk through the hooks of PortaKV's tier, with a stand-in of vLLM; run by test_vllm_tier.py.

python vllm_tier_hooks.py FOLDER
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from support.vllm_tiering_stub import spec_of
from support.waits import LIMIT, until

from portakv.errors import InvalidTerms
from portakv.integrations.vllm import tier as vllm_tier
from portakv.integrations.vllm.tier import PortaKVTier, PortaKVTieringSpec

base: Any = vars(vllm_tier)  # with what it imports of vLLM
LookupResult = base["LookupResult"]
Medium = base["Medium"]
CHUNKS = 8
NBYTES = 4096
REQUEST = SimpleNamespace(req_id="r")


def key(name: int) -> bytes:
    return name.to_bytes(32, "big") + (name % 2).to_bytes(4, "big")


def job(number: int, names: list[int], chunks: list[int], request: str = "r") -> Any:
    return SimpleNamespace(
        job_id=number,
        keys=[key(name) for name in names],
        chunk_ids=np.array(chunks, np.int32),
        req_context=SimpleNamespace(req_id=request),
    )


def ended(tier: PortaKVTier) -> Any:
    """Return the result of the only job."""
    results = list[Any]()

    def any_ended() -> bool:
        results.extend(tier.get_finished_jobs())
        return bool(results)

    assert tier.has_pending_work()
    assert until(any_ended, LIMIT)
    assert not tier.has_pending_work()
    (result,) = results
    return result


def shared(folder: Path) -> None:
    """Two engines have one folder; engines of other chunks are refused at the start."""
    size = {"capacity": 1 << 20, "staging": 1 << 20}
    terms: dict[str, Any] = {"folder": str(folder / "shared"), "shared": True, **size}
    memory = np.random.default_rng(0).integers(0, 256, (CHUNKS, NBYTES), np.uint8)
    expected = memory.copy()
    tier = PortaKVTier(spec_of(True), memory.data, "own", enable_kv_events=True, **terms)
    other = PortaKVTier(spec_of(False), memory.data, "own", **terms)
    tier.submit_store(job(1, [1, 2, 3], [0, 1, 2]))
    assert ended(tier).success
    assert until(lambda: other.lookup(key(3), REQUEST) is LookupResult.HIT, LIMIT)
    other.submit_load(job(2, [3, 9, 1], [5, 6, 7]))
    assert ended(other).successful_keys == [key(3), key(1)]
    assert (memory[[5, 7]] == expected[[2, 0]]).all()
    assert until(lambda: (other.get_stats() or tier.get_stats()) is not None, LIMIT)
    assert tier.store.usage().used > 3 * NBYTES
    try:
        PortaKVTier(spec_of(True), memory.data, "own", identity="others", **terms)
    except InvalidTerms:
        tier.shutdown()
        assert until(lambda: other.lookup(key(2), REQUEST) is LookupResult.HIT, LIMIT)
        other.shutdown()
        return
    raise AssertionError("chunks of another identity are stored in the same folder")


def weights(folder: Path) -> None:
    """Chunks of other weights, or of another configuration, in the same folder are not found."""
    model = folder / "model"
    model.mkdir()
    files = {"model.safetensors": bytes(100), "config.json": b"{}"}
    for name, content in files.items():
        (model / name).write_bytes(content)
    terms: dict[str, Any] = {"folder": str(folder / "of"), "capacity": 1 << 20, "staging": 1 << 20}
    memory = np.zeros((CHUNKS, NBYTES), np.uint8)

    def found(name: str) -> bool:
        """Return whether an engine of a model finds the chunk."""
        tier = PortaKVTier(spec_of(model=name), memory.data, "own", **terms)
        answer = tier.lookup(key(1), REQUEST)
        tier.shutdown()
        return bool(answer is LookupResult.HIT)

    tier = PortaKVTier(spec_of(model=str(model)), memory.data, "own", **terms)
    tier.submit_store(job(1, [1], [0]))
    assert ended(tier).success
    tier.shutdown()
    assert found(str(model))
    assert found(os.path.relpath(model))
    for name, content in files.items():
        (model / name).write_bytes(content + b" ")
        assert not found(str(model)), f"{name} was replaced"
        (model / name).write_bytes(content)
    assert found(str(model))


def ranks(folder: Path) -> None:
    """A chunk has the bytes of a number of ranks, but in vLLM's canonical layout."""
    memory = np.zeros((CHUNKS, NBYTES), np.uint8)
    for canonical in (False, True):
        at = str(folder / f"ranks {canonical}")
        terms: dict[str, Any] = {"folder": at, "capacity": 1 << 20, "staging": 1 << 20}
        tier = PortaKVTier(spec_of(canonical=canonical), memory.data, "own", **terms)
        tier.submit_store(job(1, [1], [0]))
        assert ended(tier).success
        tier.shutdown()
        tier = PortaKVTier(spec_of(ranks=2, canonical=canonical), memory.data, "own", **terms)
        assert (tier.lookup(key(1), REQUEST) is LookupResult.HIT) is canonical
        tier.shutdown()


def walk(folder: Path) -> None:
    """Store, look up, load, damage, report, and begin anew."""
    memory = np.random.default_rng(0).integers(0, 256, (CHUNKS, NBYTES), np.uint8)
    expected = memory.copy()
    terms: dict[str, Any] = {"folder": str(folder / "kv"), "capacity": 1 << 20, "staging": 1 << 20}
    tier = PortaKVTier(spec_of(True), memory.data, "own", enable_kv_events=True, **terms)
    assert tier.lookup(key(1), REQUEST) is LookupResult.MISS
    tier.submit_store(job(1, [1, 2, 3], [0, 1, 2]))
    result = ended(tier)
    assert (result.job_id, result.success) == (1, True)
    assert result.transfer_bytes == 3 * NBYTES
    assert result.transfer_time > 0
    assert tier.lookup(key(1), REQUEST) is LookupResult.HIT
    (event,) = tier.take_events()
    assert (event.keys, event.medium) == ([key(1), key(2), key(3)], Medium.STORAGE)
    assert not event.removed

    tier.submit_load(job(2, [3, 9, 1], [5, 6, 7]))
    result = ended(tier)
    assert not result.success
    assert result.successful_keys == [key(3), key(1)]
    assert (memory[[5, 7]] == expected[[2, 0]]).all()
    assert (memory[6] == expected[6]).all()

    tier.submit_store(job(3, [4], [3]))
    tier.drain_jobs()
    assert [each.job_id for each in tier.get_finished_jobs()] == [3]
    tier.touch([key(1)], None)
    tier.on_request_finished(SimpleNamespace(req_id="r"))
    tier.on_schedule_end(None)
    stats: Any = tier.get_stats()
    assert stats.counters["vllm:portakv_tier_chunks", "own", "stored"] == 4
    assert stats.counters["vllm:portakv_tier_chunks", "own", "load_failed"] == 1
    assert stats.gauges["vllm:portakv_tier_stored_bytes", "own"] > 4 * NBYTES
    assert tier.get_stats() is None
    assert {*tier.build_metric_definitions({})} == {
        "vllm:portakv_tier_chunks",
        "vllm:portakv_tier_stored_bytes",
    }
    tier.shutdown()
    tier.shutdown()

    tier.submit_load(job(5, [1], [5]))
    tier.submit_store(job(6, [7, 8], [6, 7]))
    tier.drain_jobs()
    results = [*tier.get_finished_jobs()]
    assert [each.job_id for each in results] == [5, 6]
    assert not any(each.success or each.successful_keys for each in results)
    assert not tier.has_pending_work()

    cases: list[tuple[Any, dict[str, Any], Any]] = [
        (spec_of(), {}, LookupResult.HIT),
        (spec_of(layout="HND"), {}, LookupResult.MISS),
        (spec_of(), {"identity": "other"}, LookupResult.MISS),
    ]
    for spec, more, there in cases:
        tier = PortaKVTier(spec, memory.data, "own", **terms, **more)
        assert tier.lookup(key(4), REQUEST) is there
        tier.shutdown()


def refusals() -> None:
    """Wrong terms are named before a folder is made."""
    memory = np.zeros((CHUNKS, NBYTES), np.uint8)
    for wrong in ({"shared": True}, {"folders": "x"}, {"capacity": 0}, {}):
        try:
            PortaKVTier(spec_of(), memory.data, "own", **wrong)
        except InvalidTerms:
            continue
        raise AssertionError(wrong)


def spec() -> None:
    """The spec asks for memory that the scheduler can open."""
    parallel = SimpleNamespace(rank=1, world_size=2, is_parallelism_agnostic=True)
    config = SimpleNamespace(
        extra_config={"portakv": {"max_thread_blocks": 2}},
        canonical_layout=True,
        parallel=parallel,
    )
    made = PortaKVTieringSpec(config)
    assert made.terms == {"max_thread_blocks": 2}
    assert made.share() == (1, 2, True)


if __name__ == "__main__":
    walk(Path(sys.argv[1]))
    shared(Path(sys.argv[1]))
    weights(Path(sys.argv[1]))
    ranks(Path(sys.argv[1]))
    refusals()
    spec()
    print("walked")
