# SPDX-License-Identifier: Apache-2.0
"""A hand-over before an engine's first step: the caches keep their bytes, and nothing is left."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.waits import LIMIT, until

from portakv import CopyPlan, KVView, copy_rows
from portakv.backends.rows_kernel import kernels_of
from portakv.interconnect.zero_copy import ZeroCopyKernel
from portakv.migrate import Shard, shared_empty
from portakv.plan.plan import Move
from portakv.serving import handover as handovers
from portakv.serving.handover import Handover, HandoverTerms, rehearse

LAYERS = 3
HEADS = 2
DIM = 8
BLOCKS = 40


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


def drawn(*shape: int) -> torch.Tensor:
    """Return shared memory with different numbers."""
    memory = shared_empty(shape, torch.int32)
    memory.copy_(torch.arange(memory.numel(), dtype=torch.int32, device="cpu").view(shape))
    return memory


def keys_by_dim(size: int) -> tuple[torch.Tensor, Shard]:
    """Return a cache whose keys lie as [dim, token] in a block, as vLLM's on a CPU do."""
    memory = drawn(LAYERS, BLOCKS, HEADS, 2, size * DIM)
    pairs = [
        [
            layer[:, :, 0].view(BLOCKS, HEADS, DIM, size).transpose(2, 3),
            layer[:, :, 1].view(BLOCKS, HEADS, size, DIM),
        ]
        for layer in memory
    ]
    return memory, Shard(KVView(pairs, "layer kv | block head token dim"))


def fused(size: int) -> tuple[torch.Tensor, Shard]:
    """Return one of two ranks' heads, whose keys and values lie side by side."""
    memory = drawn(LAYERS, BLOCKS, HEADS, size, 2 * DIM)
    view = KVView([*memory], "layer | block head token (kv dim)", kv=2, dim=(DIM, DIM))
    return memory, Shard(view, heads=(0, HEADS, 2 * HEADS))


def latent(size: int) -> tuple[torch.Tensor, Shard]:
    """Return the rows of one of two stages of a model with MLA."""
    memory = drawn(LAYERS, BLOCKS, size, DIM)
    view = KVView([*memory], "layer | block token dim")
    return memory, Shard(view, layers=(0, LAYERS, 2 * LAYERS))


def slots(size: int) -> tuple[torch.Tensor, Shard]:
    """Return a cache whose blocks and tokens are one dimension."""
    memory = drawn(2, LAYERS, BLOCKS * size, HEADS, DIM)
    view = KVView([[*kv] for kv in memory], "kv layer | (block token) head dim", block_size=size)
    return memory, Shard(view)


CACHES = {"keys by dim": keys_by_dim, "fused": fused, "latent": latent, "slots": slots}
ROLES: dict[str, dict[str, Any]] = {
    "offers": {"offers": True, "pulls": False},
    "pulls": {"offers": False, "pulls": True},
    "both": {"offers": True, "pulls": True},
}


def check_quiet(handover: Handover) -> None:
    """Check that an engine sees nothing of a rehearsal."""
    assert not handover.busy
    assert handover.ended_pulls() == []
    assert handover.ended_offers() == []
    assert handover.lending == set()


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("size", [16, 48])
@pytest.mark.parametrize("cache", CACHES)
def test_the_caches_keep_their_bytes(
    stack: ExitStack, caplog: pytest.LogCaptureFixture, cache: str, size: int, role: str
) -> None:
    """Rows are handed over in both directions of the engine's role, and nothing is left."""
    memory, shard = CACHES[cache](size)
    before = memory.clone()
    handover = Handover([shard], "m", HandoverTerms(), **ROLES[role])
    stack.callback(handover.close)
    with caplog.at_level(logging.WARNING):
        rehearse(handover)
    assert caplog.text == ""
    assert torch.equal(memory, before)
    check_quiet(handover)
    if handover.owner is not None:
        assert handover.owner.counts["taken"] == handover.owner.counts["offered"] > 0
    if handover.reader is not None:
        reader = handover.reader
        # A pull leaves the reader a moment after its end.
        assert until(lambda: reader.statistics()["pulls"] == 0, LIMIT)
        ends = reader.statistics()
        assert ends["committed"] > 0
        assert ends["failed"] == 0


def test_the_caches_of_a_device_keep_their_bytes(
    stack: ExitStack, caplog: pytest.LogCaptureFixture, accelerator: torch.device
) -> None:
    """Also where this process's own memory is read as another device's."""
    drawn_there = [layer.to(accelerator) for layer in drawn(LAYERS, BLOCKS, 16, HEADS, DIM)]
    before = [layer.clone() for layer in drawn_there]
    shard = Shard(KVView(drawn_there, "layer | block token head dim"))
    handover = Handover([shard], "m", HandoverTerms())
    stack.callback(handover.close)
    with caplog.at_level(logging.WARNING):
        rehearse(handover)
    assert "The first hand-over" not in caplog.text
    assert all(map(torch.equal, drawn_there, before))
    check_quiet(handover)
    if accelerator.type == "cuda":
        assert handover.reader is not None
        assert [x["strategy"] for x in handover.reader.figures()["pull_bytes_total"]] == ["mapped"]


@pytest.mark.parametrize("size", [16, 48])
def test_rows_come_from_blocks_of_all_sizes(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """A kernel is built for two sizes: the engine's, and that of the other engine."""
    copied = set[tuple[int | None, int | None, str]]()

    def noted(src: KVView, dst: KVView, *ids: Any, **terms: Any) -> Any:
        if ids:
            copied.add((src.block_size, dst.block_size, terms["overlap"]))
        return copy_rows(src, dst, *ids, **terms)

    monkeypatch.setattr(handovers, "copy_rows", noted)
    memory, shard = fused(size)
    before = memory.clone()
    handover = Handover([shard], "m", HandoverTerms(), offers=False)
    stack.callback(handover.close)
    rehearse(handover)
    sizes = {16, 32, 64, 128, size}
    assert copied == {(other, size, how) for other in sizes for how in ("compute", "idle")}
    assert torch.equal(memory, before)


MANY = 32  # layers of a model


def fused_layers(lie: str, blocks: int, size: int) -> Shard:
    """Return keys and values of many layers, side by side, in blocks whose rows lie by token."""
    layers = lying(lie, blocks, size, HEADS, 2 * DIM)
    view = KVView(
        [layer.transpose(1, 2) for layer in layers],
        "layer | block head token (kv dim)",
        kv=2,
        dim=(DIM, DIM),
    )
    return Shard(view)


def split_layers(lie: str, blocks: int, size: int) -> Shard:
    """Return keys and values of many layers, each a part of a block."""
    return Shard(KVView(lying(lie, blocks, 2, HEADS, size, DIM), "layer | block kv head token dim"))


def latent_layers(lie: str, blocks: int, size: int) -> Shard:
    """Return the rows of many layers of a model with MLA."""
    return Shard(KVView(lying(lie, blocks, size, 9 * DIM), "layer | block token dim"))


def lying(lie: str, blocks: int, *row: int) -> list[torch.Tensor]:
    """Return tensors of many layers: each an allocation, or one after the other in one."""
    if lie == "apart":
        return [shared_empty((blocks, *row), torch.int16) for _ in range(MANY)]
    return [*shared_empty((MANY, blocks, *row), torch.int16)]


LAYERED = {
    "fused": fused_layers,
    "split": split_layers,
    "latent": latent_layers,
}


def texts(src: KVView, dst: KVView, units: set[int]) -> set[str]:
    """Return the kernels that copy blocks in such units on a GPU, from its own memory and from
    another one's."""
    made = set[str]()
    into = replace(dst.form, place="device")
    steps = src.block_size or 0, dst.block_size or 0
    for unit in units:
        own = CopyPlan(replace(src.form, place="device"), into, *steps, unit)
        peer = CopyPlan(replace(src.form, place="peer"), into, *steps, unit)
        made |= {kernel.source for plan in (own, peer) for kernel in kernels_of(plan)}
        made |= {ZeroCopyKernel(peer, nest).source for nest in range(len(peer.nests))}
    return made


@pytest.mark.parametrize("lie", ["apart", "together"])
@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("cache", LAYERED)
def test_the_kernels_of_a_real_pull_are_prepared(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch, cache: str, size: int, lie: str
) -> None:
    """Layers of the other engine are separate allocations, or lie as those of this engine."""
    prepared = set[str]()
    compiled = set[str]()

    def noted(src: KVView, dst: KVView, *ids: Any, **terms: Any) -> Any:
        if ids:
            src_index, dst_index = ids
            plan = CopyPlan(src.form, dst.form, src_index.plan_step, dst_index.plan_step)
            sections = plan.split(Move(src, dst, src_index, dst_index, terms["count"]))
            prepared.update(texts(src, dst, {unit for _, _, unit in sections}))
        elif terms.get("backend") != "reference":
            compiled.add(f"{src} to {dst}")
        return copy_rows(src, dst, *ids, **terms)

    monkeypatch.setattr(handovers, "copy_rows", noted)
    shard = LAYERED[cache](lie, 9, size)
    handover = Handover([shard], "m", HandoverTerms(), offers=False)
    stack.callback(handover.close)
    rehearse(handover)
    needed = set[str]()
    for other in (16, 32, 64, 128):
        for there in {"apart", lie}:
            units = {min(size, other), 1}  # whole blocks, and the tokens that are left
            needed |= texts(LAYERED[cache](there, 11, other).view, shard.view, units)
    assert needed <= prepared
    assert prepared <= needed, "a kernel that no pull needs takes a fifth of a second"
    assert not compiled, "scratch memory gets its bytes without a kernel"


def test_an_engine_with_an_address_also_sends_rows(stack: ExitStack, tmp_path: Path) -> None:
    """Engines of other hosts map no memory; rows cross encrypted, on a port of its own."""
    secret = tmp_path / "secret"
    secret.write_text("f" * 64)
    secret.chmod(0o600)
    terms = HandoverTerms(address="tcp://127.0.0.1:0", secret_file=str(secret))
    memory, shard = fused(16)
    before = memory.clone()
    handover = Handover([shard], "m", terms, address=terms.address)
    stack.callback(handover.close)
    rehearse(handover)
    assert torch.equal(memory, before)
    check_quiet(handover)
    assert handover.reader is not None
    crossed = {sample["strategy"] for sample in handover.reader.figures()["pull_bytes_total"]}
    assert "mapped" in crossed
    assert len(crossed) == 2


def test_a_rehearsal_that_fails_is_a_line_in_the_log(
    stack: ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    memory, shard = fused(16)
    before = memory.clone()
    handover = Handover([shard], "m", HandoverTerms(), pulls=False)
    stack.callback(handover.close)
    assert handover.owner is not None
    handover.owner.close()
    with caplog.at_level(logging.WARNING):
        rehearse(handover)
    assert "The first hand-over of an engine will be slow: " in caplog.text
    assert torch.equal(memory, before)
    check_quiet(handover)


class CompilerError(Exception):
    """An error of a compiler's own type."""


def test_a_compiler_that_fails_in_a_rehearsal_stops_no_engine(
    stack: ExitStack, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise CompilerError("ptxas")

    monkeypatch.setattr("portakv.serving.handover.copy_rows", fail)
    _, shard = fused(16)
    handover = Handover([shard], "m", HandoverTerms())
    stack.callback(handover.close)
    with caplog.at_level(logging.WARNING):
        rehearse(handover)
    assert "The first hand-over of an engine will be slow: ptxas" in caplog.text
