# SPDX-License-Identifier: Apache-2.0
"""Each pattern of wrong rows is found and named, and no other pattern gets its name."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.witness_cases import BLOCKS, DIM, HEADS, LAYERS, TOKENS, Engine, key

from portakv import KVView
from portakv.witness import Fault, Witness
from portakv.witness.faults import Other, is_of_sharding
from portakv.witness.fingerprint import Geometry
from portakv.witness.table import HEAD

DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
#: Blocks with the stored rows, whose keys are the numbers 0 to 7; and blocks that are restored.
STORED = range(8)
TARGET = 20


def faults_of(engine: Engine, wrong: Callable[[Engine], None], count: int = 1) -> list[Fault]:
    """Store 8 blocks, restore the first few into the target blocks, let something go wrong, and
    return the faults."""
    engine.store(STORED, STORED)
    for at in range(count):
        engine.load(TARGET + at, at)
    wrong(engine)
    blocks = [*range(TARGET, TARGET + count)]
    return engine.witness.restored(blocks, [key(at) for at in range(count)]).faults


def nothing(engine: Engine) -> None:
    """Leave the rows as they are."""


def flipped_bit(engine: Engine) -> None:
    engine.cache[1][1, TARGET, 5, 2].view(torch.uint8)[7] ^= 16


def two_changed_heads(engine: Engine) -> None:
    engine.cache[0][0, TARGET, :, 1:3] += 1
    engine.cache[2][1, TARGET, 4, 1] -= 1


def zeroed_head(engine: Engine) -> None:
    for layer in engine.cache:
        layer[0, TARGET, :, 3] = 0


def zeroed(engine: Engine) -> None:
    for layer in engine.cache:
        layer[:, TARGET] = 0


def zeroed_layers(engine: Engine) -> None:
    for layer in engine.cache[1:]:
        layer[:, TARGET] = 0


def rows_before(engine: Engine) -> None:
    """The target block had the rows of key 99, and no load wrote it."""
    engine.load(5, 7)  # rows that are not the target's
    engine.write(TARGET, engine.rows(30))
    engine.store([TARGET], [99])


def layers_before(engine: Engine) -> None:
    rows_before(engine)
    rows = engine.saved[key(0)]
    engine.cache[0][:, TARGET] = rows[0]


def tokens_before(engine: Engine) -> None:
    rows_before(engine)
    for layer, rows in zip(engine.cache, engine.saved[key(0)], strict=True):
        layer[:, TARGET, :10] = rows[:, :10]


def values_before(engine: Engine) -> None:
    rows_before(engine)
    for layer, rows in zip(engine.cache, engine.saved[key(0)], strict=True):
        layer[0, TARGET] = rows[0]


def noise_at_the_end(engine: Engine) -> None:
    for layer in engine.cache:
        layer[:, TARGET, 12:] = torch.randn_like(layer[:, TARGET, 12:])


def noise_in_a_layer(engine: Engine) -> None:
    engine.cache[2][:, TARGET] = torch.randn_like(engine.cache[2][:, TARGET])


def noise(engine: Engine) -> None:
    for layer in engine.cache:
        layer[:, TARGET] = torch.randn_like(layer[:, TARGET])


def another_block(engine: Engine) -> None:
    engine.load(TARGET, 6)


def another_block_in_a_layer(engine: Engine) -> None:
    engine.cache[1][:, TARGET] = engine.saved[key(6)][1]


def another_block_at_a_head(engine: Engine) -> None:
    for layer, rows in zip(engine.cache, engine.saved[key(6)], strict=True):
        layer[:, TARGET, :, 2] = rows[:, :, 2]


def exchanged_blocks(engine: Engine) -> None:
    engine.load(TARGET, 1)
    engine.load(TARGET + 1, 0)


def shifted_blocks(engine: Engine) -> None:
    for at in range(4):
        engine.load(TARGET + at, at + 1)


def shifted_tokens(engine: Engine) -> None:
    for layer, rows in zip(engine.cache, engine.saved[key(0)], strict=True):
        layer[:, TARGET, 3:] = rows[:, :-3]


def earlier_tokens(engine: Engine) -> None:
    for layer, rows in zip(engine.cache, engine.saved[key(0)], strict=True):
        layer[:, TARGET, :-2] = rows[:, 2:]


def reversed_tokens(engine: Engine) -> None:
    for layer, rows in zip(engine.cache, engine.saved[key(0)], strict=True):
        layer[:, TARGET] = rows.flip(1)


def exchanged_planes(engine: Engine) -> None:
    for layer, rows in zip(engine.cache, engine.saved[key(0)], strict=True):
        layer[:, TARGET] = rows.flip(0)


def exchanged_planes_at_two_heads(engine: Engine) -> None:
    for layer, rows in zip(engine.cache, engine.saved[key(0)], strict=True):
        layer[:, TARGET, :, 1:3] = rows[:, :, 1:3].flip(0)


def exchanged_heads(engine: Engine) -> None:
    for layer, rows in zip(engine.cache, engine.saved[key(0)], strict=True):
        layer[:, TARGET] = rows[:, :, [0, 2, 1, 3]]


def shifted_heads(engine: Engine) -> None:
    for layer, rows in zip(engine.cache, engine.saved[key(0)], strict=True):
        layer[:, TARGET] = rows.roll(1, 2)


def exchanged_layers(engine: Engine) -> None:
    rows = engine.saved[key(0)]
    engine.cache[0][:, TARGET] = rows[2]
    engine.cache[2][:, TARGET] = rows[0]


ALL = tuple(range(LAYERS)), tuple(range(HEADS)), ((0, TOKENS),)
#: For each fault its name, layers, heads and tokens.
FAULTS: dict[Callable[[Engine], None], tuple[str, tuple[int, ...], tuple[int, ...], object]] = {
    flipped_bit: ("changed bytes", (1,), (2,), ((5, 6),)),
    two_changed_heads: ("changed bytes", (0, 2), (1, 2), ((0, TOKENS),)),
    zeroed_head: ("zeros", ALL[0], (3,), ((0, TOKENS),)),
    zeroed: ("zeros", *ALL),
    zeroed_layers: ("missing layers", (1, 2), *ALL[1:]),
    rows_before: ("not written", *ALL),
    layers_before: ("missing layers", (1, 2), *ALL[1:]),
    tokens_before: ("half written", *ALL[:2], ((10, TOKENS),)),
    values_before: ("half written", *ALL),
    noise_at_the_end: ("half written", *ALL[:2], ((12, TOKENS),)),
    noise_in_a_layer: ("missing layers", (2,), *ALL[1:]),
    noise: ("unlike", *ALL),
    another_block: ("other block", *ALL),
    another_block_in_a_layer: ("other block", (1,), *ALL[1:]),
    another_block_at_a_head: ("other block", ALL[0], (2,), ((0, TOKENS),)),
    shifted_tokens: ("shifted tokens", *ALL[:2], ((3, TOKENS),)),
    earlier_tokens: ("shifted tokens", *ALL[:2], ((0, TOKENS - 2),)),
    reversed_tokens: ("shifted tokens", *ALL),
    exchanged_planes: ("planes exchanged", *ALL),
    exchanged_planes_at_two_heads: ("planes exchanged", ALL[0], (1, 2), ((0, TOKENS),)),
    exchanged_heads: ("heads exchanged", ALL[0], (1, 2), ((0, TOKENS),)),
    shifted_heads: ("heads exchanged", *ALL),
    exchanged_layers: ("layers exchanged", (0, 2), *ALL[1:]),
}


@DEVICES
@pytest.mark.parametrize("wrong", FAULTS, ids=lambda wrong: wrong.__name__)
def test_a_fault_is_found_and_named(wrong: Callable[[Engine], None], device: str) -> None:
    engine = Engine(device)
    (fault,) = faults_of(engine, wrong)
    assert (fault.kind, fault.layers, fault.heads, fault.tokens) == FAULTS[wrong]
    assert (fault.group, fault.key, fault.block) == ("", key(0), TARGET)
    assert f"block {TARGET}" in fault.sentence
    assert key(0).hex()[:16] in fault.sentence
    assert engine.witness.figures()[""].faults == {fault.kind: 1}


@pytest.mark.parametrize("wrong", [*FAULTS, nothing], ids=lambda wrong: wrong.__name__)
def test_without_the_guard_nothing_is_found(wrong: Callable[[Engine], None]) -> None:
    """The negative control: no witness, no fault; and right rows are no fault for a witness."""
    assert not faults_of(Engine(check="off"), wrong)
    assert bool(faults_of(Engine(), wrong)) == (wrong is not nothing)


@DEVICES
def test_exchanged_blocks_are_two_faults(device: str) -> None:
    (first, second) = faults_of(Engine(device), exchanged_blocks, 3)
    assert (first.kind, first.block) == ("other block", TARGET)
    assert (second.kind, second.block) == ("other block", TARGET + 1)
    assert key(1).hex()[:16] in first.versus


@pytest.mark.parametrize("size", [1, 3])
def test_runs_of_blocks_that_change_places_are_shifted(size: int) -> None:
    """Exchanged chunks; in the control each chunk is one block."""
    engine = Engine()
    engine.store(STORED, STORED)
    order = [*range(size, 2 * size), *range(size)]
    for at, n in enumerate(order):
        engine.load(TARGET + at, n)
    blocks = [TARGET + at for at in range(2 * size)]
    faults = engine.witness.restored(blocks, [key(n) for n in range(2 * size)]).faults
    assert {fault.kind for fault in faults} == {"other block" if size == 1 else "shifted blocks"}
    assert len(faults) == 2 * size


@DEVICES
def test_a_shifted_list_of_blocks_is_named(device: str) -> None:
    faults = faults_of(Engine(device), shifted_blocks, 6)
    assert [fault.block for fault in faults] == [*range(TARGET, TARGET + 4)]
    assert {fault.kind for fault in faults} == {"shifted blocks"}
    assert "+1 blocks away" in faults[0].versus


def test_the_block_before_is_named_by_its_key() -> None:
    (fault,) = faults_of(Engine(), rows_before)
    assert key(99).hex()[:16] in fault.versus


def test_rows_of_a_load_are_the_rows_before_the_next_load() -> None:
    engine = Engine()
    engine.store(STORED, STORED)
    engine.load(TARGET, 3)
    assert not engine.witness.restored([TARGET], [key(3)]).faults
    (fault,) = engine.witness.restored([TARGET], [key(4)]).faults
    assert fault.kind == "not written"
    assert fault.versus == f"the rows that the block had before, of key {key(3).hex()[:16]}..."


def test_a_version_that_a_load_brings_is_not_forgotten() -> None:
    """A tier took the second version, and the engine computes the block again and again. In the
    control nothing was loaded."""
    for loaded in (True, False):
        engine = Engine()
        engine.store([0], [0])
        engine.store([1], [0])
        engine.witness.stored([2], [key(0)])
        for n in range(3, 14):
            engine.witness.stored([n], [key(0)])
            engine.load(TARGET, 0)
            if loaded:
                assert not engine.witness.restored([TARGET], [key(0)]).faults
        assert not engine.witness.restored([TARGET], [key(0)]).faults
        figures = engine.witness.figures()[""]
        assert (figures.compared, figures.unknown) == ((12, 0) if loaded else (0, 1))


def test_rows_of_an_older_version_are_the_rows_before_the_next_load() -> None:
    engine = Engine()
    engine.store([0], [0])
    engine.witness.stored([1], [key(0)])
    engine.load(TARGET, 0)
    engine.store([2], [3])
    assert not engine.witness.restored([TARGET], [key(0)]).faults
    (fault,) = engine.witness.restored([TARGET], [key(3)]).faults
    assert fault.kind == "not written"


def test_a_block_that_an_unknown_key_had_since_is_not_called_unwritten() -> None:
    """The control: the block got other rows meanwhile, which the witness does not know."""
    engine = Engine(check="sample", rate=0)
    engine.store(STORED, STORED, first=STORED)
    engine.load(TARGET, 3)
    assert not engine.witness.restored([TARGET], [key(3)]).faults
    engine.witness.stored([TARGET], [key(50)])
    (fault,) = engine.witness.restored([TARGET], [key(4)]).faults
    assert fault.kind == "other block"


@pytest.mark.parametrize(
    ("wrong", "kind"), [("layer", "missing layers"), ("tokens", "half written")]
)
def test_rows_that_a_load_left_are_named_if_their_key_was_forgotten(wrong: str, kind: str) -> None:
    """The control: in another block the same rows are those of another block."""
    engine = Engine(check="sample", rate=0)
    engine.store(STORED, STORED, first=STORED)
    left = engine.rows(3)
    rows = [*engine.saved[key(5)][:-1], left[-1]]
    if wrong == "tokens":
        half = TOKENS // 2
        sides = zip(engine.saved[key(5)], left, strict=True)
        rows = [torch.cat([saved[:, :half], old[:, half:]], 1) for saved, old in sides]
    for block in (3, TARGET):
        engine.witness.stored([block], [key(60)])  # that the witness does not know
        engine.write(block, rows)
        (fault,) = engine.witness.restored([block], [key(5)]).faults
        assert fault.kind == (kind if block == 3 else "other block")


# Several groups


def groups() -> tuple[dict[str, torch.Tensor], Witness]:
    """Attention and the states of recurrent layers, with 8 stored blocks."""
    torch.manual_seed(1)
    caches = {"attention": torch.randn(2, BLOCKS, 16, 2, 8), "states": torch.randn(BLOCKS, 512)}
    views = {
        "attention": KVView(caches["attention"], "kv block token head dim"),
        "states": KVView(caches["states"], "block page", block_size=16),
    }
    witness = Witness(views, check="all", nbytes=1 << 20)
    for name in caches:
        witness.stored(STORED, [key(n) for n in STORED], name)
    return caches, witness


@pytest.mark.parametrize("wrong", [True, False])
def test_a_missing_group_is_named(wrong: bool) -> None:
    """The states had the rows of other keys, or no rows. In the control they were loaded."""
    (caches, witness) = groups()
    blocks = [20, 21]
    caches["states"][20] = 0
    caches["states"][21] = caches["states"][30]
    witness.stored([21, 30], [key(60), key(61)], "states")
    caches["attention"][:, blocks] = caches["attention"][:, :2].clone()
    if not wrong:
        caches["states"][blocks] = caches["states"][:2].clone()
    results = {
        name: witness.restored(blocks, [key(0), key(1)], name) for name in ("states", "attention")
    }
    assert not results["attention"].faults
    kinds = [(fault.kind, fault.group) for fault in results["states"].faults]
    assert kinds == ([("missing group", "states")] * 2 if wrong else [])


def test_a_state_of_another_position_is_another_block() -> None:
    (caches, witness) = groups()
    caches["states"][20] = caches["states"][3]
    (fault,) = witness.restored([20], [key(2)], "states").faults
    assert (fault.kind, fault.group, fault.tokens) == ("other block", "states", ())


# Other ranks and former versions


@pytest.mark.parametrize("known", [True, False])
def test_heads_of_another_rank_are_named(tmp_path: Path, known: bool) -> None:
    """A tier gave rank 0 the rows of rank 1. The control knows no file of rank 1."""
    other = Engine(seed=7, file=tmp_path / "1")
    other.store(STORED, STORED)
    other.witness.settle(wait=True)
    engine = Engine(others=[tmp_path / "1"] if known else [])
    (fault,) = faults_of(engine, lambda _: engine.write(TARGET, other.rows(0)))
    assert fault.kind == ("other rank" if known else "unlike")
    assert ("heads of" in fault.versus and str(tmp_path / "1") in fault.versus) == known


def test_heads_of_a_rank_with_more_heads_are_named(tmp_path: Path) -> None:
    """A tier has the rows of one rank, and two ranks with half of the heads load them."""
    whole = Engine(seed=7, heads=8, file=tmp_path / "whole")
    whole.store(STORED, STORED)
    whole.witness.settle(wait=True)
    rank = Engine(others=[tmp_path / "whole"])
    rank.write(0, [rows[:, :, 4:] for rows in whole.rows(0)])
    wrong = [rows[:, :, :4] for rows in whole.rows(0)]
    (fault,) = faults_of(rank, lambda _: rank.write(TARGET, wrong))
    assert (fault.kind, fault.heads) == ("other rank", (0, 1, 2, 3))
    assert "2 has those of its 2" in fault.versus


def sharded(folder: Path, ranks: int, seed: int = 7) -> list[Path]:
    """Return the files of an engine whose ranks divide 8 heads, after it has stored the blocks."""
    files = [folder / f"{ranks}-{rank}" for rank in range(ranks)]
    for rank, file in enumerate(files):
        engine = shard(ranks, rank, seed, file=file)
        engine.store(STORED, STORED)
        engine.witness.close()
    return files


def shard(ranks: int, rank: int, seed: int = 7, **terms: Any) -> Engine:
    """Return a rank with its heads of 8. Rows depend on the number of ranks in the last bits."""
    heads = 8 // ranks
    engine = Engine(heads=heads, rank=rank, ranks=ranks, **terms)
    rows = Engine(seed=seed, heads=8).cache
    for layer, some in zip(engine.cache, rows, strict=True):
        layer.copy_(some[:, :, :, heads * rank : heads * (rank + 1)] * (1 + ranks / 4096))
    return engine


def loads(rows: list[torch.Tensor]) -> Callable[[Engine], None]:
    """Return a fault that leaves rows in the target block."""
    return lambda engine: engine.write(TARGET, rows)


def rows_of(ranks: int) -> list[torch.Tensor]:
    """Return the rows of the first block of all 8 heads, as some ranks have computed them."""
    parts = [shard(ranks, rank).rows(0) for rank in range(ranks)]
    return [torch.cat(layer, 2) for layer in zip(*parts, strict=True)]


def read_as_pages(wrote: int, ranks: int) -> list[list[torch.Tensor]]:
    """Return for each rank what it finds in a file that has the pages of other ranks one after the
    other: of each layer the keys and values of each head."""
    parts = [shard(wrote, rank).rows(0) for rank in range(wrote)]
    pages = torch.cat([torch.stack(part).transpose(1, 3).flatten(0, 1) for part in parts])
    shape = ranks, LAYERS, 8 // ranks, TOKENS, 2, pages.shape[-1]
    return [[*part.transpose(1, 3)] for part in pages.view(shape)]


@pytest.mark.parametrize(("wrote", "ranks"), [(1, 2), (2, 1), (4, 2), (1, 8)])
@pytest.mark.parametrize("known", [True, False])
def test_pages_of_another_number_of_ranks_are_named(
    tmp_path: Path, known: bool, wrote: int, ranks: int
) -> None:
    """Whole heads at the places of other layers and heads. The control does not know the files."""
    files = sharded(tmp_path, wrote)
    for rank, pages in enumerate(read_as_pages(wrote, ranks)):
        engine = shard(ranks, rank, shardings=[files] if known else [])
        (fault,) = faults_of(engine, loads(pages))
        assert (fault.kind == "other sharding") == known
        assert (f"rows of {wrote} rank" in fault.versus) == known
        (fault,) = faults_of(engine, noise)
        assert fault.kind == "unlike"


@pytest.mark.parametrize(("wrote", "ranks"), [(1, 2), (2, 1), (4, 2)])
@pytest.mark.parametrize("known", [True, False])
def test_a_tier_that_other_ranks_have_filled_is_checked_before_anything_is_stored(
    tmp_path: Path, known: bool, wrote: int, ranks: int
) -> None:
    """An engine starts with another number of ranks. Rows that no fingerprint explains may be those
    of a third engine. The control does not know the files."""
    files = sharded(tmp_path, wrote)
    for rank, pages in enumerate(read_as_pages(wrote, ranks)):
        engine = shard(ranks, rank, shardings=[files] if known else [])
        right = [layer.split(8 // ranks, 2)[rank] for layer in rows_of(wrote)]
        for rows, kinds in ((right, []), (pages, ["other sharding"])):
            engine.write(TARGET, rows)
            faults = engine.witness.restored([TARGET], [key(0)]).faults
            assert [fault.kind for fault in faults] == (kinds if known else [])
            engine = shard(ranks, rank, shardings=[files] if known else [])
        noise(engine)
        assert not engine.witness.restored([TARGET], [key(0)]).faults
        figures = engine.witness.figures()[""]
        assert (figures.compared, figures.unknown) == (0, 1)


def test_the_layers_that_pages_of_other_ranks_come_from_are_named(tmp_path: Path) -> None:
    for ranks, rank, wrote, versus in (
        (2, 0, 1, "rows of 1 rank: layers 0-1 of rank 0"),
        (2, 1, 1, "rows of 1 rank: layers 1-2 of rank 0"),
        (1, 0, 2, "rows of 2 ranks: layers 0-2 of rank 0, layers 0-2 of rank 1"),
    ):
        pages = read_as_pages(wrote, ranks)[rank]
        engine = shard(ranks, rank, shardings=[sharded(tmp_path, wrote)])
        (fault,) = faults_of(engine, loads(pages))
        assert fault.versus == versus


def test_rows_that_no_name_can_be_decided_for_stay_unlike(tmp_path: Path) -> None:
    """In pages of tokens, a token of one rank is read as several tokens of a rank with fewer heads:
    no head and no token is whole."""
    pages = torch.stack(rows_of(1)).view(LAYERS, 2, 2, TOKENS // 2, 2, 4, DIM)
    engine = shard(2, 0, shardings=[sharded(tmp_path, 1)])
    wrong = [*pages[:, :, 0].reshape(LAYERS, 2, TOKENS, 4, DIM)]
    (fault,) = faults_of(engine, loads(wrong))
    assert fault.kind == "unlike"


@pytest.mark.parametrize(("wrote", "ranks"), [(1, 2), (2, 1), (4, 2), (2, 8)])
@pytest.mark.parametrize("known", [True, False])
def test_right_heads_of_another_number_of_ranks_are_accepted(
    tmp_path: Path, known: bool, wrote: int, ranks: int
) -> None:
    """They are rounded otherwise. The control does not know the files."""
    files = sharded(tmp_path, wrote)
    heads = 8 // ranks
    for rank in range(ranks):
        right = [layer.split(heads, 2)[rank] for layer in rows_of(wrote)]
        engine = shard(ranks, rank, shardings=[files] if known else [])
        faults = faults_of(engine, loads(right))
        assert [fault.kind for fault in faults] == ([] if known else ["unlike"])
        figures = engine.witness.figures()[""]
        assert (figures.compared, figures.older, figures.unknown) == (1, int(known), 0)
        # The rows are known now. One changed number is a fault.
        assert bool(engine.witness.restored([TARGET], [key(0)]).faults) is not known
        assert engine.witness.figures()[""].older == int(known)
        right[1][1, 5, 0, 3] += 1
        (fault,) = faults_of(engine, loads(right))
        assert fault.kind == ("changed bytes" if known else "unlike")


@pytest.mark.parametrize("why", ["older", "renewed", "former weights", "another key", ""])
def test_right_heads_of_another_number_of_ranks_are_a_fault_after_a_change(
    tmp_path: Path, why: str
) -> None:
    """Of weights, as the caller says, or of the key. Nothing has changed in the control."""
    file = tmp_path / "whole"
    whole = shard(1, 0, file=file)
    whole.store(STORED, STORED)
    if why == "former weights":
        whole.witness.renew()
    whole.witness.close()
    engine = shard(2, 1, shardings=[[file]], older="fault" if why == "older" else "accept")
    if why == "renewed":
        engine.witness.renew()
    block = 1 if why == "another key" else 0
    right = [layer[:, :, 4:] for layer in whole.rows(block)]
    faults = faults_of(engine, loads(right))
    kind = "unlike" if why == "another key" else "other sharding"
    assert [fault.kind for fault in faults] == ([kind] if why else [])


def test_each_number_of_ranks_has_its_heads_in_order() -> None:
    """More ranks than heads have each head several times. The control has the heads of another
    place."""
    heads = 4
    numbers = np.random.default_rng(0).integers(1, 1 << 60, (LAYERS, 2, heads))

    def of(ranks: int) -> list[Other]:
        """Return the fingerprint of each rank, whose sums by segment are 0."""
        each = max(1, heads // ranks)
        geometry = Geometry(LAYERS, 2, each, 16, 1, (32, 32), 4)
        rest = np.zeros(LAYERS * 2 * 16, np.int64)
        firsts = [rank * heads // ranks for rank in range(ranks)]
        parts = [numbers[:, :, first : first + each].ravel() for first in firsts]
        return [Other("", geometry, np.concatenate([part, rest])) for part in parts]

    sizes = [1, 2, 4, 8, 16]
    for ranks, wrote in product(sizes, sizes):
        sharding = [[other] for other in of(wrote)]
        for rank, (_, geometry, sums, _) in enumerate(of(ranks)):
            for place in range(ranks):
                same = rank * heads // ranks == place * heads // ranks
                assert is_of_sharding(geometry, sums, place, ranks, sharding) == same
        sharding[wrote // 2] = []  # a rank does not know the key
        own = of(ranks)[ranks // 2]
        assert not is_of_sharding(own.geometry, own.sums, ranks // 2, ranks, sharding)


@pytest.mark.parametrize("older", ["accept", "fault"])
def test_an_older_version_is_accepted_or_a_fault(older: str) -> None:
    """An engine that computes a block again rounds otherwise; only the caller knows of weights."""
    engine = Engine(older=older)
    engine.store([0], [0])
    engine.witness.stored([1], [key(0)])
    engine.load(TARGET, 0)
    faults = engine.witness.restored([TARGET], [key(0)]).faults
    assert [fault.kind for fault in faults] == (["older version"] if older == "fault" else [])
    assert engine.witness.figures()[""].older == (older == "accept")
    engine.write(TARGET, engine.rows(1))
    assert not engine.witness.restored([TARGET], [key(0)]).faults


@pytest.mark.parametrize("renewed", [True, False])
@pytest.mark.parametrize("again", [True, False])
def test_rows_from_before_a_renewal_are_a_fault(tmp_path: Path, renewed: bool, again: bool) -> None:
    """The weights changed, and a tier has rows of former weights. In the control they did not."""
    path = tmp_path / "table"
    engine = Engine(file=path)
    engine.store(range(3), range(3))
    if renewed:
        engine.witness.renew()
    if again:  # under the new weights; two blocks have other rows, one has the same
        engine.witness.stored([10, 11, 2], [key(n) for n in range(3)])
    engine.witness.close()
    after = Engine(file=path)
    for n in range(3):
        after.write(TARGET + n, engine.rows(n))
    blocks = [TARGET, TARGET + 1, TARGET + 2]
    faults = after.witness.restored(blocks, [key(n) for n in range(3)]).faults
    wrong = blocks[: 2 if again else 3] if renewed else []
    assert [(fault.block, fault.kind) for fault in faults] == [(b, "older version") for b in wrong]
    assert not wrong or faults[0].layers == ALL[0]

    # New rows of a key that only has former ones are unknown, and no fault.
    after.write(TARGET, engine.rows(10))
    assert bool(after.witness.restored([TARGET], [key(0)]).faults) == (not (renewed or again))
    assert after.witness.figures()[""].unknown == (renewed and not again)


def test_layers_of_an_older_version_are_a_fault() -> None:
    engine = Engine()
    engine.store([0], [0])
    engine.witness.stored([1], [key(0)])
    engine.load(TARGET, 0)
    engine.cache[2][:, TARGET] = engine.cache[2][:, 1]
    (fault,) = engine.witness.restored([TARGET], [key(0)]).faults
    assert fault.kind == "older version"
    assert fault.layers in ((2,), (0, 1))


def test_one_group_is_not_missing_beside_itself() -> None:
    """Of two blocks with one key the first is right."""
    engine = Engine()
    engine.store([0], [0])
    engine.load(TARGET, 0)
    other = TARGET + 1
    engine.witness.stored([other], [key(5)])
    (fault,) = engine.witness.restored([TARGET, other], [key(0)] * 2).faults
    assert (fault.block, fault.kind) == (other, "not written")


def one_number(cache: Any) -> None:
    cache[0][0, TARGET, 0, 0, 0] += 1


def half_of_the_tokens(cache: Any) -> None:
    for layer in cache:
        layer[:, TARGET, : layer.shape[2] // 2] += 1


def values_alone(cache: Any) -> None:
    for layer in cache:
        layer[1, TARGET] += 1


def last_layer(cache: Any) -> None:
    cache[-1][:, TARGET] += 1


def test_rows_of_an_evicted_version_are_unknown_and_no_fault() -> None:
    """A tier may have the first version of a key, whose fingerprint the table has dropped."""
    small = 12 * Engine().witness.block_bytes[""]
    for evicted in (True, False):
        engine = Engine(nbytes=small if evicted else 1 << 20)
        engine.store([0], [0])
        first = engine.rows(0)
        engine.witness.stored(range(1, 13), [key(100 + n) for n in range(12)])
        engine.witness.stored([13], [key(0)])
        engine.write(TARGET, first)
        assert not engine.witness.restored([TARGET], [key(0)]).faults
        figures = engine.witness.figures()[""]
        assert (figures.compared, figures.unknown) == ((0, 1) if evicted else (1, 0))
        # A part of a block is not another rounding, and a fault nevertheless.
        for damage in (one_number, half_of_the_tokens, values_alone, last_layer):
            engine.write(TARGET, engine.rows(13))
            damage(engine.cache)
            assert len(engine.witness.restored([TARGET], [key(0)]).faults) == 1, damage
        # So are rows that equal sums explain.
        engine.write(TARGET, engine.rows(12))
        (fault,) = engine.witness.restored([TARGET], [key(0)]).faults
        assert fault.kind == "other block"


def test_more_faults_than_are_searched_for_are_all_reported() -> None:
    torch.manual_seed(0)
    cache = torch.randn(2, 400, 4, 2, 4)
    witness = Witness(
        KVView(cache, "kv block token head dim"), check="all", action="recompute", nbytes=1 << 20
    )
    keys = [key(n) for n in range(100)]
    witness.stored(range(100), keys)
    cache[:, 200:300] = cache[:, :100].roll(7, 1)
    comparison = witness.restored(range(200, 300), keys)
    assert comparison.failed == {*range(200, 300)}
    assert sum(witness.figures()[""].faults.values()) == 100


@pytest.mark.parametrize("wrong", [True, False])
def test_no_fault_of_a_lost_version_is_overlooked_among_many(wrong: bool) -> None:
    """The table has lost the first version of all keys. In the control a tier has these rows."""
    torch.manual_seed(0)
    cache = torch.randn(2, 400, 4, 2, 4)
    view = KVView(cache, "kv block token head dim")
    each = HEAD.itemsize + Witness(view).block_bytes[""]
    witness = Witness(view, check="all", action="recompute", nbytes=300 * each)
    keys = [key(n) for n in range(100)]
    witness.stored(range(100), keys)
    witness.stored(range(100, 300), [key(1000 + n) for n in range(200)])
    witness.stored(range(300, 400), keys)
    cache[:, 100:200] = cache[:, 300:].roll(7, 1) if wrong else cache[:, :100]
    comparison = witness.restored(range(100, 200), keys)
    assert comparison.failed == ({*range(100, 200)} if wrong else set())
    assert witness.figures()[""].unknown == (0 if wrong else 100)


def test_many_older_versions_are_all_named() -> None:
    torch.manual_seed(0)
    witness = Witness(KVView(torch.randn(2, 100, 4, 2, 4), "kv block token head dim"), check="all")
    keys = [key(n) for n in range(100)]
    witness.stored(range(100), keys)
    witness.renew()
    assert len(witness.restored(range(100), keys).faults) == 100
    assert witness.figures()[""].faults == {"older version": 100}


# Blocks without a fault


def blocks_without_fault(count: int) -> None:
    """Store, load, evict and compute blocks again, at random; no rows are wrong."""
    generator = torch.Generator().manual_seed(3)
    cache = torch.randn(2, 512, 4, 2, 8, generator=generator)
    witness = Witness(KVView(cache, "kv block token head dim"), check="all", nbytes=3000 * 192)
    tier = dict[int, torch.Tensor]()
    restored = 0
    while restored < count:
        numbers = torch.randint(0, 1200, (256,), generator=generator).unique().tolist()
        blocks = torch.randperm(512, generator=generator)[: len(numbers)].tolist()
        stored = list[tuple[int, int]]()
        loaded = list[tuple[int, int]]()
        for n, block in zip(numbers, blocks, strict=True):
            rounding = 1 + torch.rand((), generator=generator) / 4096
            if n not in tier:
                tier[n] = torch.randn(2, 4, 2, 8, generator=generator)
                cache[:, block] = tier[n]
                stored.append((n, block))
            elif n % 40 == 0:  # computed again; the tier may take the new rows
                cache[:, block] = tier[n] * rounding
                stored.append((n, block))
                if n % 80:
                    tier[n] = cache[:, block].clone()
            else:
                cache[:, block] = tier[n]
                loaded.append((n, block))
        witness.stored([b for _, b in stored], [key(n) for n, _ in stored])
        loaded += [(n, b) for n, b in stored if n % 80 == 0]
        for n, block in loaded:
            cache[:, block] = tier[n]
        result = witness.restored([b for _, b in loaded], [key(n) for n, _ in loaded])
        assert not result.faults
        restored += len(loaded)
    figures = witness.figures()[""]
    assert not figures.faults
    assert figures.older
    assert figures.compared > restored * 9 // 10
    assert figures.dropped or count < 100_000


def test_hundreds_of_blocks_without_a_fault_raise_no_alarm() -> None:
    blocks_without_fault(500)


@pytest.mark.full
def test_100_000_blocks_without_a_fault_raise_no_alarm() -> None:
    blocks_without_fault(100_000)
