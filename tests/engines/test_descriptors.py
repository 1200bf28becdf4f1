# SPDX-License-Identifier: Apache-2.0
"""`descriptors`: ids wherever they are, lists that are remembered, memory that is held."""

from __future__ import annotations

import gc

import pytest
import torch
from support.device_cases import current, delay
from support.engine_cases import TOKENS, Transfers
from support.guarded_memory import check_sentence, tensors_in
from support.simdev_cases import DEVICE, OTHER
from support.threads import run_threads

from portakv import CopyPlan, Index, KVView, SlotError
from portakv.engines import descriptors
from portakv.engines.descriptors import LEAST_RUN, Descriptors
from portakv.engines.engine import Engine
from portakv.engines.link import TorchLink
from portakv.engines.pageable import Ring
from portakv.engines.staged import Staged
from portakv.plan.runs import Runs
from portakv.runtime.transfer import copies_holding_memory


@pytest.mark.parametrize("engine", [Descriptors, Staged, Ring])
def test_ids_may_lie_anywhere(accelerator: torch.device, engine: type[Engine]) -> None:
    transfer = Transfers(engine(accelerator), True)
    for where in (torch.device("cpu"), accelerator):
        for dtype in (torch.int32, torch.int64):
            transfer.mine = Index(torch.randperm(190)[:TOKENS].to(where, dtype))
            transfer()


@pytest.mark.parametrize("on_host", [True, False])
def test_an_id_past_the_end_moves_nothing(accelerator: torch.device, on_host: bool) -> None:
    transfer, ids = Transfers(Descriptors(accelerator), True), torch.arange(TOKENS)
    ids[7] = 24 * 8
    transfer.mine = Index(ids if on_host else ids.to(accelerator))
    before = transfer.expected(tokens=0)
    with pytest.raises(SlotError) as caught:
        transfer.go()
    check_sentence(str(caught.value), "192")
    transfer.check(before)


def test_negative_ids_are_left_out(accelerator: torch.device) -> None:
    transfer, ids = Transfers(Descriptors(accelerator), True), torch.arange(TOKENS)
    ids[5:9] = -1
    transfer.mine = Index(ids)
    transfer()


@pytest.mark.simdev
def test_a_list_that_is_used_again_is_expanded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    transfer, asked, real = Transfers(Descriptors(DEVICE), True), list[int](), CopyPlan.runs

    def runs(self: CopyPlan, *args: object) -> Runs:
        asked.append(1)
        return real(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(CopyPlan, "runs", runs)
    ids = torch.randperm(150)[:TOKENS]
    index = Index(ids)
    for again, expected in ((index, 1), (index, 1), (index.shifted(3), 2), (index.shifted(3), 2)):
        transfer.mine = again
        transfer.go(tokens=32)
        assert len(asked) == expected
    # Another index of the same tensor may be made after its ids have changed.
    ids.copy_(ids.flip(0))
    transfer.mine = Index(ids)
    transfer(tokens=32)
    assert len(asked) == 3
    transfer.mine = Index(ids)
    transfer(transfer.chunk(5), 32)  # another memory under a list of the same ids


@pytest.mark.simdev
def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptors, "MOST_KEPT", 500)
    monkeypatch.setattr(TorchLink, "copy", lambda *args: None)
    transfer, kept = Transfers(Descriptors(DEVICE), True), list[Index]()
    for seed in range(30):
        kept.append(Index(torch.randperm(190)[: 8 + seed].tolist()))
        transfer.mine = kept[-1]
        transfer.go(tokens=8 + seed if seed < 24 else 32)
        known = transfer.prepared()._known
        number = sum(pieces.number + 1 for pieces in known._pieces.values())
        assert 0 < known._number == number <= 500
        assert kept[-1].ids_token in next(reversed(known._pieces))


@pytest.mark.parametrize("engine", [Descriptors, Staged])
def test_host_memory_outlives_the_copy(accelerator: torch.device, engine: type[Engine]) -> None:
    """Forgotten while the copy flies."""
    torch.accelerator.synchronize(accelerator)
    assert copies_holding_memory() == 0
    transfer = Transfers(engine(accelerator), False)
    transfer()  # what is made once is there
    cache, shape = tensors_in(transfer.rows.tensors), tensors_in(transfer.host.tensors)[0].shape
    for layer in cache:
        layer.zero_()
    wanted = tensors_in(transfer.expected().tensors)
    delay(current(accelerator))
    transfer.go()
    assert copies_holding_memory() == 1
    del transfer
    gc.collect()
    rubbish = [torch.full(shape, 7, dtype=torch.int16).pin_memory() for _ in range(4)]
    torch.accelerator.synchronize(accelerator)
    assert all(torch.equal(x.cpu(), y) for x, y in zip(cache, wanted, strict=True))
    assert copies_holding_memory() == 0
    del rubbish


def test_from_several_threads(accelerator: torch.device) -> None:
    """By one launch, each with a list and a chunk of its own."""
    transfers = [Transfers(Descriptors(accelerator), True) for _ in range(3)]
    for each in transfers:
        each.mine = Index(torch.randperm(190)[:TOKENS].tolist())
        each._prepared = transfers[0]._prepared
    wanted = [each.expected() for each in transfers]
    run_threads(lambda each: [each.go(), each.go()], transfers)
    for each, expected in zip(transfers, wanted, strict=True):
        each.check(expected)


@pytest.mark.simdev
def test_plans_that_it_refuses() -> None:
    engine, noise = Descriptors(DEVICE), torch.arange(4096).to(torch.uint8)
    device = noise.to(DEVICE)
    for host, place in ((noise, "pageable"), (noise.pin_memory(), "pinned")):
        views = [KVView(each.view(-1, 64), "token dim") for each in (device, host)]
        decision = engine.check(CopyPlan(views[0].form, views[1].form))
        assert decision.accepted is (place == "pinned")
        assert place == "pinned" or "pageable" in decision.reason
    src = KVView(device.view(-1, 4, LEAST_RUN // 2), "token head dim")
    dst = KVView(noise.pin_memory().view(4, -1, LEAST_RUN // 2), "head token dim")
    decision = engine.check(CopyPlan(src.form, dst.form))
    assert not decision.accepted
    assert f"runs of {LEAST_RUN} B" in decision.reason
    assert f"{LEAST_RUN // 2} B" in decision.reason
    assert not Descriptors.probe(torch.device("cpu")).accepted
    assert Descriptors.probe(OTHER).accepted
    assert not engine.capabilities().capturable
