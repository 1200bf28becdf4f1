# SPDX-License-Identifier: Apache-2.0
"""PortaKV as the storage backend of the real SGLang's HiCache, whose own controller drives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

if find_spec("sglang") is None:
    pytest.skip("SGLang is not installed; see .ci/plugs", allow_module_level=True)

from support import sglang_on_cpu  # noqa: F401, I001  before SGLang
from support import hicache
from support.hicache import Engine, build, extra_of, page_bytes, round_trip, tokens_of
from support.page_faults import DAMAGE, FAILURES, FaultyDisk
from support.sglang_pools import PAGE
from sglang.srt.mem_cache.hicache_storage import PoolHitPolicy, PoolName, PoolTransfer

from portakv.integrations import IntegrationError
from portakv.storage.tiers import disk as disk_store
from support.waits import LIMIT, until

ROOM: dict[str, Any] = {"host": 0, "staging": 4 << 20, "capacity": 16 << 20, "deadline": 20.0}
COUNT = 6
PROMPT = [*range(100, 100 + COUNT * PAGE)]
IDS = ["-".join(each) for each in hicache.POOLS]


@pytest.fixture
def terms(tmp_path: Path) -> dict[str, Any]:
    made = tmp_path / "kv"
    made.mkdir(mode=0o700)
    return {**ROOM, "folder": str(made)}


# --- Every pool and both interfaces ---------------------------------------------------------------


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "copies"])
@pytest.mark.parametrize(("kind", "layout"), hicache.POOLS, ids=IDS)
def test_pages_come_back_after_a_restart(
    kind: str, layout: str, in_place: bool, terms: dict[str, Any]
) -> None:
    """Into other pages of the host pool; nothing else of it changes."""
    if kind == "unequal" and not in_place:
        pytest.skip("SGLang does not copy pages of unequal widths")
    pools = build(kind, layout)
    with Engine(pools, extra_of(terms, in_place)) as engine:
        fetched = round_trip(engine, PROMPT, COUNT)
        assert fetched()
    right = page_bytes(pools.host, tokens_of(range(COUNT + 3, 2 * COUNT + 3)))
    with Engine(pools, extra_of(terms, in_place)) as engine:
        hicache.fill(pools.host, 3)
        before = page_bytes(pools.host, tokens_of(range(pools.host.size // PAGE)))
        assert engine.fetch(PROMPT, range(COUNT)) == COUNT
        after = page_bytes(pools.host, tokens_of(range(pools.host.size // PAGE)))
        assert after[:COUNT] == right
        assert after[COUNT:] == before[COUNT:]


def test_other_tokens_are_not_found(terms: dict[str, Any]) -> None:
    pools = build("mha", "page_first")
    with Engine(pools, extra_of(terms)) as engine:
        assert round_trip(engine, PROMPT, COUNT)()
        other = [*PROMPT[: 2 * PAGE], 7, *PROMPT[2 * PAGE + 1 :]]
        assert engine.fetch(other, range(COUNT)) == 2, "what both prompts begin with"
        assert engine.fetch(PROMPT[PAGE:], range(COUNT)) == 0


@pytest.mark.parametrize(
    ("kind", "layout", "dtype", "more"),
    [
        ("mha", "page_first", torch.bfloat16, {"model": "org/other"}),
        ("mha", "page_first_direct", torch.bfloat16, {}),
        ("mha", "page_first", torch.float16, {}),
        ("mla", "page_first", torch.bfloat16, {}),
        ("mha", "page_first", torch.bfloat16, {"pp_rank": 1, "pp_size": 2}),
        ("mha", "page_first", torch.bfloat16, {"tp_rank": 1, "tp_size": 2}),
    ],
    ids=["model", "layout", "dtype", "pool", "stage", "rank"],
)
def test_pages_with_other_bytes_are_not_found(
    kind: str, layout: str, dtype: torch.dtype, more: dict[str, Any], tmp_path: Path
) -> None:
    """In a bucket, which all processes see."""
    (tmp_path / "bucket").mkdir(mode=0o700)
    terms = {"host": 0, "staging": 4 << 20, "bucket": f"file://{tmp_path}/bucket"}
    with Engine(build("mha", "page_first"), extra_of(terms)) as engine:
        assert round_trip(engine, PROMPT, COUNT)()
    with Engine(build(kind, layout, dtype), extra_of(terms), **more) as engine:
        assert engine.fetch(PROMPT, range(COUNT)) == 0
    with Engine(build("mha", "page_first"), extra_of(terms)) as engine:  # control
        assert engine.fetch(PROMPT, range(COUNT)) == COUNT


@pytest.mark.parametrize("how", ["bucket", "shared"])
def test_ranks_of_mla_have_the_same_pages(how: str, terms: dict[str, Any], tmp_path: Path) -> None:
    """Rank 0 writes, and rank 1 reads; SGLang does not let rank 1 write."""
    if how == "bucket":
        (tmp_path / "bucket").mkdir(mode=0o700)
        terms = {"host": 0, "staging": 4 << 20, "bucket": f"file://{tmp_path}/bucket"}
    else:
        terms = {**terms, "shared": True}
    pools = build("mla", "page_first")
    right = page_bytes(pools.host, tokens_of(range(COUNT)))
    with Engine(pools, extra_of(terms), tp_rank=1, tp_size=2) as second:
        assert second.back_up(PROMPT, range(COUNT)) == 0
        with Engine(pools, extra_of(terms), tp_rank=0, tp_size=2) as first:
            assert first.fetch(PROMPT, range(COUNT)) == 0
            assert first.back_up(PROMPT, range(COUNT)) == len(PROMPT)
            keys = hicache.keys_of(PROMPT)
            assert until(lambda: second.backend.batch_exists(keys) == COUNT, LIMIT)
            hicache.fill(pools.host, 5)
            assert second.fetch(PROMPT, range(COUNT)) == COUNT
            assert page_bytes(pools.host, tokens_of(range(COUNT))) == right


def test_ranks_have_separate_folders(terms: dict[str, Any]) -> None:
    pools = build("mha", "page_first")
    with (
        Engine(pools, extra_of(terms), tp_rank=0, tp_size=2) as first,
        Engine(pools, extra_of(terms), tp_rank=1, tp_size=2) as second,
    ):
        assert round_trip(first, PROMPT, COUNT)()
        assert second.fetch(PROMPT, range(COUNT)) == 0
        hicache.fill(pools.host, 8)
        assert round_trip(second, PROMPT, COUNT)()
    assert len([*Path(terms["folder"]).iterdir()]) == 2


def test_clear_removes_the_pages(terms: dict[str, Any]) -> None:
    """Now and after a restart; the store goes on."""
    pools = build("mha", "page_first")
    with Engine(pools, extra_of(terms)) as engine:
        assert round_trip(engine, PROMPT, COUNT)()
        assert engine.backend.clear()
        assert engine.fetch(PROMPT, range(COUNT)) == 0
    with Engine(pools, extra_of(terms)) as engine:
        assert engine.fetch(PROMPT, range(COUNT)) == 0
        assert round_trip(engine, PROMPT, COUNT)()


# --- Several pools --------------------------------------------------------------------------------


def moved(name: PoolName, keys: list[str], pages: range) -> PoolTransfer:
    return PoolTransfer(name=name, keys=keys, host_indices=tokens_of(pages))


@pytest.mark.parametrize("layout", ["page_first", "page_first_direct"])
@pytest.mark.parametrize("copied", [False, True], ids=["in place", "copies"])
def test_pools_next_to_that_of_keys_and_values(
    layout: str, copied: bool, terms: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has its own pages under the same keys, by address or by the pool's own copies."""
    pools = build("mha", layout)
    side = build("mla", layout)
    twin = build("mha", layout)
    names = [(PoolName.INDEXER, side.host), (PoolName.SWA, twin.host)]
    rights = [page_bytes(host, tokens_of(range(COUNT))) for _, host in names]
    if copied:
        for _, host in names:
            refuse = mock.Mock(side_effect=NotImplementedError("no addresses"))
            monkeypatch.setattr(host, "get_page_buffer_meta", refuse)
    keys = hicache.keys_of(PROMPT)
    with Engine(pools, extra_of(terms)) as engine:
        for name, host in names:
            engine.backend.register_mem_host_pool_v2(host, name)
        assert engine.back_up(PROMPT, range(COUNT)) == len(PROMPT)
        transfers = [moved(name, keys, range(COUNT)) for name, _ in names]
        assert engine.backend.batch_get_v2(transfers) == {
            x.name: [False] * COUNT for x in transfers
        }
        stored = engine.backend.batch_set_v2(transfers)
        assert stored == {x.name: [True] * COUNT for x in transfers}
        for _, host in names:
            hicache.fill(host, 11)
        landed = engine.backend.batch_get_v2(
            [moved(name, keys, range(3, 3 + COUNT)) for name, _ in names]
        )
        assert landed == stored
    monkeypatch.undo()
    for (_, host), right in zip(names, rights, strict=True):
        assert page_bytes(host, tokens_of(range(3, 3 + COUNT))) == right


ALL = PoolHitPolicy.ALL_PAGES
TRAILING = PoolHitPolicy.TRAILING_PAGES


@pytest.mark.parametrize(
    ("policy", "window", "there", "able"),
    [
        (ALL, 1, [0, 1, 2], [1, 2, 3]),
        (ALL, 1, [1, 2], []),
        (ALL, 1, range(6), [1, 2, 3, 4, 5]),
        (TRAILING, 1, [1, 3], [2, 4]),
        (TRAILING, 2, [1, 2, 4], [3]),
        (TRAILING, 2, [0, 3, 4], [1, 5]),
        (TRAILING, 9, [0, 1, 2, 3, 4], [1, 2, 3, 4, 5]),
        (PoolHitPolicy.BLOCK_GROUPS, 1, range(6), []),
    ],
)
def test_what_a_pool_can_restore(
    policy: PoolHitPolicy, window: int, there: Any, able: list[int], terms: dict[str, Any]
) -> None:
    """Of six pages, five of which are stored for keys and values."""
    keys = hicache.keys_of(PROMPT)
    side = build("mla", "page_first")
    with Engine(build("mha", "page_first"), extra_of(terms)) as engine:
        engine.backend.register_mem_host_pool_v2(side.host, PoolName.SWA)
        assert engine.back_up(PROMPT[: 5 * PAGE], range(5)) == 5 * PAGE
        for page in there:
            engine.backend.batch_set_v2([moved(PoolName.SWA, [keys[page]], range(page, page + 1))])
        transfer = PoolTransfer(name=PoolName.SWA, keys=keys[:window], hit_policy=policy)
        result = engine.backend.batch_exists_v2(keys, [transfer])
        assert result.restorable_prefix_pages == able
        assert result.kv_hit_pages == (able[-1] if able else 0)
        assert result.extra_pool_hit_pages.get(PoolName.SWA, 0) == (able[-1] if able else 0)
        assert engine.backend.batch_exists_v2(keys).kv_hit_pages == 5


# --- Faults ---------------------------------------------------------------------------------------


def fetched(engine: Engine, right: list[bytes]) -> int:
    """Fetch into lost pages; check each, and return how many came."""
    hicache.fill(engine.host, 9)
    lost = page_bytes(engine.host, tokens_of(range(COUNT)))
    came = engine.fetch(PROMPT, range(COUNT))
    got = page_bytes(engine.host, tokens_of(range(COUNT)))
    for number in range(came):
        assert got[number] == right[number], f"page {number} is wrong"
    # Pages after the first miss may have come, too; SGLang does not use them.
    for number in range(came, COUNT):
        assert got[number] in (lost[number], right[number]), f"page {number} is wrong"
    return came


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("guard", [True, False], ids=["checked", "not checked"])
def test_damaged_pages(
    damage: Callable[..., None], guard: bool, terms: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pools = build("mha", "page_first")
    right = page_bytes(pools.host, tokens_of(range(COUNT)))
    with Engine(pools, extra_of(terms)) as engine:
        assert engine.back_up(PROMPT, range(COUNT)) == len(PROMPT)
    damage(Path(terms["folder"]), len(right[0]))
    if not guard:
        if damage is DAMAGE["a cut file"]:
            pytest.skip("what a read does not return cannot be believed")
        monkeypatch.setattr(disk_store, "verifies", lambda _: False)
        monkeypatch.setattr(disk_store, "verify", lambda *_: True)
        monkeypatch.setattr(disk_store, "header", lambda *_: mock.ANY)
    with Engine(pools, extra_of(terms)) as engine:
        if not guard:
            with pytest.raises(AssertionError, match="is wrong"):
                fetched(engine, right)
            return
        assert fetched(engine, right) < COUNT
        pools.host.kv_buffer.copy_(build("mha", "page_first").host.kv_buffer)
        engine.back_up(PROMPT, range(COUNT))
        assert fetched(engine, right) == COUNT, "they were stored again"


@pytest.mark.parametrize("code", FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize("call", ["save", "load"])
def test_a_disk_that_fails(
    code: int, call: str, terms: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The threads of the controller go on, and the pages are missing."""
    disk = FaultyDisk(monkeypatch)
    pools = build("mha", "page_first")
    rows = pools.host.kv_buffer.clone()
    right = page_bytes(pools.host, tokens_of(range(COUNT)))
    if call == "load":
        with Engine(pools, extra_of(terms)) as engine:
            assert engine.back_up(PROMPT, range(COUNT)) == len(PROMPT)

    def stored_again() -> bool:
        pools.host.kv_buffer.copy_(rows)
        return engine.back_up(PROMPT, range(COUNT)) == len(PROMPT)

    with Engine(pools, extra_of({**terms, "deadline": 0.5})) as engine, disk.failing(code):
        if call == "save":
            assert engine.back_up(PROMPT, range(COUNT)) == 0
        else:
            assert fetched(engine, right) == 0
        disk.mend()
        assert until(stored_again, LIMIT)
        assert until(lambda: fetched(engine, right) == COUNT, LIMIT)


KILLED = """
import sys
sys.path[:0] = {path!r}
from support import sglang_on_cpu
from support.hicache import Engine, build, extra_of
from support.sglang_pools import PAGE

prompt = [*range(100, 100 + {count} * PAGE)]
engine = Engine(build("mha", "page_first"), extra_of({terms!r}))
assert engine.back_up(prompt[: 3 * PAGE], range(3)) == 3 * PAGE
print("stored", flush=True)
while True:
    engine.back_up(prompt, range({count}))
"""


def test_kill_9(terms: dict[str, Any]) -> None:
    """Another process has what was stored before, and the rest is right or missing."""
    code = textwrap.dedent(KILLED).format(path=sys.path, count=COUNT, terms=terms)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert any(line == b"stored\n" for line in process.stdout)
        finally:
            os.kill(process.pid, signal.SIGKILL)
    pools = build("mha", "page_first")
    right = page_bytes(pools.host, tokens_of(range(COUNT)))
    with Engine(pools, extra_of(terms)) as engine:
        assert fetched(engine, right) >= 3


# --- What is refused ------------------------------------------------------------------------------


def test_configurations_that_are_refused(terms: dict[str, Any]) -> None:
    pools = build("mha", "page_first")
    wrong: list[tuple[Any, type[Exception], str]] = [
        (None, ValueError, "'portakv'"),  # as SGLang raises it again
        ({"floder": "x"}, ValueError, "'floder'"),
        ({**terms, "by_layer": True}, IntegrationError, "by_layer"),
        ({**terms, "block_size": 16}, IntegrationError, "block_size"),
    ]
    for each, error, message in wrong:
        with pytest.raises(error, match=message):
            Engine(pools, extra_of(each))
    with pytest.raises(IntegrationError, match="shared, or a bucket"):
        Engine(build("mla", "page_first"), extra_of(terms), tp_rank=1, tp_size=2)
    with pytest.raises(IntegrationError, match="tp_lcm_size"):
        Engine(build("mha", "page_head"), extra_of(terms) | {"tp_lcm_size": 2})
    assert not [*Path(terms["folder"]).iterdir()]


def test_a_pool_without_pages(terms: dict[str, Any]) -> None:
    class NoPages:
        page_size = PAGE

    with (
        Engine(build("mha", "page_first"), extra_of(terms)) as engine,
        pytest.raises(IntegrationError, match=r"'mamba'.*NoPages"),
    ):
        engine.backend.register_mem_host_pool_v2(NoPages(), PoolName.MAMBA)


def test_calls_one_by_one(terms: dict[str, Any]) -> None:
    """`get`, `set` and `exists` of pages that SGLang has copied, and memory of a wrong size."""
    host = build("mha", "layer_first").host
    page = host.get_data_page(PAGE)
    with Engine(build("mha", "layer_first"), extra_of(terms, in_place=False)) as engine:
        key = hicache.keys_of(PROMPT)[0]
        target = host.get_dummy_flat_data_page()
        backend = engine.backend
        assert not backend.exists(key)
        assert backend.get(key, target) is None
        assert backend.set(key, page)
        assert backend.exists(key)
        assert backend.get(key, target) is target
        assert torch.equal(target.view(torch.uint8), page.view(torch.uint8))
        assert backend.get(key, target[1:]) is None
        assert backend.get(key) is None
        assert not backend.set(key, page[:-1])
        assert not backend.set(key)
