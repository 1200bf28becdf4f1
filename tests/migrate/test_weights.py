# SPDX-License-Identifier: Apache-2.0
"""Weights: which piece of a tensor comes from whom for any sharding, judged by numpy's slices of
the whole tensor, and the exchange between owners and a reader."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any, cast

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from support.ambient import STATES
from support.peer_process import Peer
from support.waits import LIMIT
from support.weight_cases import (
    Array,
    Between,
    Channels,
    local_of,
    make_channels,
    rank_of,
    shared,
    whole_of,
)
from torch.utils._python_dispatch import TorchDispatchMode

from portakv.errors import (
    InvalidTerms,
    LayoutError,
    OfferGone,
    PeerError,
    TransferError,
    TransferTimeout,
)
from portakv.migrate.channel import Channel
from portakv.migrate.messages import unsealed
from portakv.migrate.shared_memory import shared_empty
from portakv.weights import owner as owners
from portakv.weights.messages import AskWeights, Weights, WeightsTicket
from portakv.weights.owner import checksums, publish
from portakv.weights.parameters import Box, Parameter
from portakv.weights.plan import copy_pairs
from portakv.weights.pull import pull_weights

channels = pytest.fixture(make_channels)


def test_tp_2_becomes_tp_3_between_channels(channels: Channels) -> None:
    """Column, row parallel and fused parameters, a scale by its own name, all replicated norms."""
    qkv = whole_of((24, 8))
    down = whole_of((6, 12))
    scale = whole_of((12, 4))
    norm = whole_of((8,))

    def rank(r: int, size: int, empty: bool) -> dict[str, Parameter]:
        def retained(array: Array) -> torch.Tensor:
            return torch.zeros(array.shape, dtype=torch.int32) if empty else shared(array)

        return {
            "qkv": Parameter.split(
                retained(local_of(qkv, 0, (12, 6, 6), r, size, 1)), 0, (12, 6, 6), (r, size)
            ),
            "down": Parameter.split(retained(rank_of(down, 1, r, size, 1)), 1, (12,), (r, size)),
            "scale": Parameter.split(retained(rank_of(scale, 0, r, size, 1)), 0, (12,), (r, size)),
            "norm": Parameter(retained(norm)),
        }

    published = [publish(channels(), rank(r, 2, False)) for r in range(2)]
    for r in range(3):
        local = rank(r, 3, True)
        expected = rank(r, 3, False)
        nbytes = pull_weights(channels(), [x.ticket for x in published], local)
        assert nbytes == sum(x.tensor.nbytes for x in local.values())
        for name, x in local.items():
            assert torch.equal(x.tensor, expected[name].tensor), name
    for owner in published:
        owner.close()


def test_tied_tensors_cross_once(channels: Channels) -> None:
    rows = whole_of((6, 4))
    with_head = shared(rows)
    published = publish(channels(), {x: Parameter(with_head) for x in ("embed", "head")})
    into = torch.zeros(6, 4, dtype=torch.int32)
    local = {x: Parameter(into) for x in ("head", "embed")}
    assert pull_weights(channels(), published.ticket, local) == into.nbytes
    assert torch.equal(into, with_head)
    published.close()


def test_all_names_of_a_tied_tensor_are_compared(channels: Channels) -> None:
    """Two stages of a pipeline have a copy of one tensor each, of which one differs."""
    first = shared(whole_of((6, 4)))
    last = shared(whole_of((6, 4)))
    last[5, 3] += 1
    offered = {"embed": first, "head": last}
    owners = [publish(channels(), {name: Parameter(x)}) for name, x in offered.items()]
    local = dict.fromkeys(offered, Parameter(torch.zeros(6, 4, dtype=torch.int32)))
    with pytest.raises(TransferError, match=r"others of head\. Do not"):
        pull_weights(channels(), [x.ticket for x in owners], local)
    for owner in owners:
        owner.close()


@pytest.mark.parametrize("total", [1, 2, 1 << 18])
def test_an_owner_that_lists_another_number_than_it_announces_is_refused(
    channels: Channels, total: int
) -> None:
    """It repeats its first item for ever, or makes up new ones past the number."""
    owner = publish(channels(), {"w": Parameter(shared(whole_of((4,))))})
    between: Any = Between(channels(), lambda: None)
    ask = between.ask
    names = iter(range(1 << 30))

    def lie(address: str, requested: AskWeights, kind: type[Weights], timeout: float) -> Any:
        answer = ask(address, replace(requested, first=0), kind, timeout)
        if total > 2:
            return replace(answer, total=total)
        item = answer.items[0][1]
        return replace(answer, total=total, items=tuple((f"{next(names)}", item) for _ in range(3)))

    between.ask = lie
    local = {"w": Parameter(torch.zeros(4, dtype=torch.int32))}
    with pytest.raises(PeerError, match=r"Expected \d+ weights from"):
        pull_weights(between, owner.ticket, local)
    assert not local["w"].tensor.any()
    owner.close()


def test_an_endless_list_ends_with_the_time_of_the_call(channels: Channels) -> None:
    """One item an answer, and always new ones."""
    owner = publish(channels(), {"w": Parameter(shared(whole_of((4,))))})
    between: Any = Between(channels(), lambda: None)
    ask = between.ask

    def lie(address: str, requested: AskWeights, kind: type[Weights], timeout: float) -> Any:
        answer = ask(address, replace(requested, first=0), kind, timeout)
        item = answer.items[0][1]
        return replace(answer, total=1 << 18, items=((f"{requested.first}", item),))

    between.ask = lie
    with pytest.raises(TransferTimeout, match=r"timed out after 0\.3 s"):
        pull_weights(between, owner.ticket, {"w": torch.zeros(4, dtype=torch.int32)}, timeout=0.3)
    owner.close()


def test_another_number_of_checksums_is_the_owners_error(channels: Channels) -> None:
    owner = publish(channels(), {"w": Parameter(shared(whole_of((4,))))})
    between: Any = Between(channels(), lambda: None)
    ask = between.ask
    between.ask = lambda address, requested, kind, timeout: replace(
        ask(address, requested, kind, timeout), sums=(1, 2, 3)
    )
    with pytest.raises(PeerError, match="Expected 1 checksums"):
        pull_weights(between, owner.ticket, {"w": torch.zeros(4, dtype=torch.int32)})
    owner.close()


def while_pulled(channels: Channels, change: Callable[[Any, torch.Tensor], None]) -> Any:
    """Pull two tensors of 32 MiB by the limited rate, and have the first one's owner change them
    once the first is there; return the outcome of the pull."""
    whole = torch.zeros(2, 8 << 20, dtype=torch.int32).share_memory_().fill_(1)
    published = publish(channels(), {"a": whole[0], "b": whole[1]})
    into = torch.zeros(2, 8 << 20, dtype=torch.int32)
    done = threading.Event()

    def follow() -> None:
        while not into[0, -1].item() and not done.wait(1e-3):
            pass
        change(published, whole)

    thread = threading.Thread(target=follow)
    thread.start()
    try:
        return pull_weights(
            channels(), published.ticket, {"a": into[0], "b": into[1]}, max_gbps=0.05
        )
    finally:
        done.set()
        thread.join()
        published.close()


def test_an_update_between_two_batches_publishes_no_mixture(channels: Channels) -> None:
    """The checksums of each batch agree with what the owner has at that moment."""

    def step(published: Any, whole: torch.Tensor) -> None:
        with published.update():
            whole.numpy()[:] = 2  # torch does not count this one

    with pytest.raises(TransferError, match="changed while they were pulled"):
        while_pulled(channels, step)


def test_a_change_that_is_said_afterwards_fails_the_pull(channels: Channels) -> None:
    def step(published: Any, whole: torch.Tensor) -> None:
        whole.numpy()[:] = 2
        published.changed()

    with pytest.raises(TransferError, match=r"changed while they were pulled|checksums"):
        while_pulled(channels, step)


def test_an_optimizer_that_says_nothing_is_noticed_by_torch_s_own_count(
    channels: Channels,
) -> None:
    with pytest.raises(TransferError, match="changed while they were pulled"):
        while_pulled(channels, lambda _, whole: cast(None, whole.add_(1)))


def test_weights_that_do_not_change_are_pulled(channels: Channels) -> None:
    """The negative control of the three before."""
    assert while_pulled(channels, lambda *_: None) == 64 << 20


def test_a_pull_waits_for_the_end_of_an_update_and_again_brings_the_new_weights(
    channels: Channels,
) -> None:
    tensor = torch.ones(4).share_memory_()
    published = publish(channels(), {"w": tensor})
    into = torch.zeros(4)
    with published.update():
        with pytest.raises(TransferTimeout):
            pull_weights(channels(), published.ticket, {"w": into}, timeout=0.2)
        assert not into.any()
        tensor.fill_(3)
    assert pull_weights(channels(), published.ticket, {"w": into}) == 16
    assert into.eq(3).all()
    published.close()


WRONG_TENSORS: dict[str, Callable[[], Any]] = {
    "expanded": lambda: torch.zeros(1, dtype=torch.int32).expand(4),
    "sparse": lambda: torch.zeros(4, dtype=torch.int32).to_sparse(),
    "nested": lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
    "numpy": lambda: np.zeros(4, np.int32),
    "conjugate": lambda: torch.zeros(4, dtype=torch.complex64).conj(),
    "negative": lambda: torch.zeros(4, dtype=torch.complex64).conj().imag,
    "float boxes": lambda: Parameter(
        torch.zeros(4, dtype=torch.int32),
        (4,),
        [Box((0.0,), (0,), (4,))],  # type: ignore[arg-type]
    ),
    "number": lambda: 5,
    "none": lambda: None,
}


@pytest.mark.parametrize("kind", WRONG_TENSORS)
def test_a_reader_s_wrong_tensor_is_refused_before_a_byte_is_written(
    channels: Channels, kind: str
) -> None:
    memory = shared(whole_of((2, 4)))
    owner = publish(channels(), {"first": memory[0], "second": memory[1]})
    first = torch.zeros(4, dtype=torch.int32)
    local = {"first": first, "second": WRONG_TENSORS[kind]()}
    with pytest.raises((InvalidTerms, LayoutError), match="second"):
        pull_weights(channels(), owner.ticket, local)
    assert not first.any()
    owner.close()


@pytest.mark.parametrize(
    "parameters",
    [{}, None, 5, [torch.zeros(3)], {1: torch.zeros(3)}, {"a": 5}, {"a": None}, {"": 5}],
)
def test_what_cannot_be_published_is_named(channels: Channels, parameters: Any) -> None:
    with pytest.raises(InvalidTerms, match="parameters"):
        publish(channels(), parameters)


@pytest.mark.parametrize("timeout", [float("nan"), -1, 0, "5", True])
def test_a_timeout_that_is_none_is_refused(channels: Channels, timeout: Any) -> None:
    with pytest.raises(InvalidTerms, match="Expected timeout"):
        pull_weights(channels(), [], {}, timeout=timeout)


def test_hundreds_of_parameters_are_listed_by_pages(channels: Channels) -> None:
    """More than one answer holds, and more checksums than one question asks for."""
    memory = shared(whole_of((600, 16)))
    owner = publish(
        channels(), {f"layer.{i}.{'x' * 300}": Parameter(memory[i]) for i in range(600)}
    )
    into = torch.zeros(600, 16, dtype=torch.int32)
    local = {f"layer.{i}.{'x' * 300}": Parameter(into[i]) for i in range(600)}
    assert pull_weights(channels(), owner.ticket, local, max_gbps=1e3) == into.nbytes
    assert torch.equal(into, memory)
    owner.close()


def test_parts_of_many_tensors_are_verified_by_several_requests(channels: Channels) -> None:
    """A request holds 256 boxes; checksums of whole tensors are one list."""
    whole = shared(whole_of((300, 4, 6)))
    owner = publish(channels(), {str(i): Parameter(whole[i]) for i in range(300)})
    into = torch.zeros(300, 4, 3, dtype=torch.int32)
    between: Any = Between(channels(), lambda: None)
    local = {str(i): Parameter.split(into[i], 1, (6,), (1, 2)) for i in range(300)}
    assert pull_weights(between, owner.ticket, local) == into.nbytes
    assert torch.equal(into, whole[:, :, 3:])
    assert sorted(len(x.boxes) for x in between.requested) == [44, 256]
    between.requested.clear()
    again = {str(i): torch.zeros(4, 6, dtype=torch.int32) for i in range(300)}
    assert pull_weights(between, owner.ticket, again) == whole.nbytes
    assert not between.requested, "they came with the begin"
    owner.close()


def test_a_stage_of_a_pipeline_asks_for_some(channels: Channels) -> None:
    owner = publish(channels(), {x: Parameter(shared(whole_of((3,)))) for x in "abc"})
    into = torch.zeros(3, dtype=torch.int32)
    with pytest.raises(LayoutError, match="a: it was not requested\nc: it was not"):
        pull_weights(channels(), owner.ticket, {"b": Parameter(into)})
    assert pull_weights(channels(), owner.ticket, {"b": Parameter(into)}, some=True) == 12
    owner.close()


@pytest.mark.parametrize("state", STATES)
def test_parameters_of_a_module_are_filled_in_any_state(channels: Channels, state: str) -> None:
    """Leaves that require a gradient, and tensors of inference mode."""
    weight = shared(np.full((3, 2), 2.5, np.float32))
    owner = publish(channels(), {x: Parameter(weight) for x in "ab"})
    with torch.inference_mode():
        older = torch.zeros(3, 2, dtype=torch.float32, device="cpu")
    grown = torch.nn.Parameter(torch.zeros(3, 2))
    with STATES[state](torch.device("cpu")):
        for into in (older, grown):
            pull_weights(channels(), owner.ticket, {x: Parameter(into) for x in "ab"})
    assert older.eq(2.5).all()
    assert grown.eq(2.5).all()
    owner.close()


def test_another_checksum_is_an_error_that_names_all(channels: Channels) -> None:
    """Fault 37. The owner's tensors are not as its checksums say: one error names them, and says
    that none of the reader's may be used. The owner then computes its checksums anew."""
    tensors = {x: shared(whole_of((5, 3))) for x in "abc"}
    owner = publish(channels(), {x: Parameter(y) for x, y in tensors.items()})
    local = {x: Parameter(torch.zeros(5, 3, dtype=torch.int32)) for x in "abc"}
    channel = channels()
    assert pull_weights(channel, owner.ticket, local) == 180
    tensors["a"].numpy()[4, 2] += 1  # torch does not count these
    tensors["c"].numpy()[0, 0] += 1
    with pytest.raises(TransferError, match=r"others of a, c\. Do not use any"):
        pull_weights(channel, owner.ticket, local)
    assert pull_weights(channel, owner.ticket, local) == 180
    assert all(torch.equal(local[x].tensor, tensors[x]) for x in "abc")
    owner.close()


def test_what_is_published_no_more_is_gone(channels: Channels) -> None:
    """Closed before, closed between the copy and its checksums, and replaced by others."""
    tensor = shared(whole_of((4,)))
    local = {"w": Parameter(torch.zeros(4, dtype=torch.int32))}
    channel = channels()
    first = publish(channel, {"w": Parameter(tensor)})
    second = publish(channel, {"w": Parameter(tensor)})
    with pytest.raises(OfferGone, match="request a new ticket"):
        pull_weights(channels(), first.ticket, local)
    between: Any = Between(channels(), second.close)
    with pytest.raises(OfferGone, match="no longer published"):
        pull_weights(between, second.ticket, local)
    with pytest.raises(OfferGone):
        pull_weights(channels(), second.ticket, local)
    first.close()


def test_an_owner_that_makes_no_checksums_is_waited_for_until_the_timeout(
    channels: Channels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its helper computes, and does not end."""
    release = threading.Event()
    begun = threading.Event()
    owner = publish(channels(), {"w": Parameter(shared(whole_of((4,))))})

    def hang(boxes: Any) -> list[int]:
        begun.set()
        assert release.wait(LIMIT)
        return checksums(boxes)

    monkeypatch.setattr(owners, "checksums", hang)
    owner.changed()  # the checksums that it has are of another version
    local = {"w": Parameter(torch.zeros(4, dtype=torch.int32))}
    with pytest.raises(TransferTimeout, match=r"timed out after 0\.05 s"):
        pull_weights(channels(), owner.ticket, local, timeout=0.05)
    assert begun.is_set()
    release.set()
    owner.close()


@pytest.mark.parametrize("ticket", [b"", b"ticket", bytes(40)])
def test_what_is_no_ticket_is_refused(channels: Channels, ticket: Any) -> None:
    with pytest.raises(PeerError, match="not a ticket of weights"):
        pull_weights(channels(), [ticket], {})


def test_a_tensor_without_memory_is_refused(channels: Channels) -> None:
    nothing = {"w": torch.zeros(3, device="meta")}
    with pytest.raises(LayoutError, match="without memory"):
        publish(channels(), nothing)
    with pytest.raises(LayoutError, match="without memory"):
        pull_weights(channels(), [], nothing)


@pytest.mark.parametrize("rate", [0, -1.0, "fast"])
def test_a_rate_that_is_none_is_refused(channels: Channels, rate: Any) -> None:
    with pytest.raises(InvalidTerms, match="max_gbps"):
        pull_weights(channels(), [], {}, max_gbps=rate)


def test_a_module_is_filled_from_another_one_as_it_is(channels: Channels) -> None:
    """Whole tensors need no Parameter of ours."""
    remote = torch.nn.Linear(4, 3)
    local = torch.nn.Linear(4, 3)
    remote.share_memory()
    owner = publish(channels(), dict(remote.named_parameters()))
    assert pull_weights(channels(), owner.ticket, dict(local.named_parameters())) == 60
    assert torch.equal(local.weight, remote.weight)
    owner.close()


def test_memory_that_cannot_be_mapped_crosses_by_a_transport(channels: Channels) -> None:
    """The reason names the tensor."""
    tensors = {"a": torch.arange(3.0).share_memory_(), "b": torch.arange(5.0)}
    owner = publish(channels(), {"a": tensors["a"], "b": Parameter(tensors["b"])})
    assert owner.why_not_mapped.startswith("Publishing parameters['b']: it does not lie in shared")
    local = {name: torch.zeros_like(x) for name, x in tensors.items()}
    assert pull_weights(channels(), owner.ticket, local) == 32
    for name, x in tensors.items():
        assert torch.equal(local[name], x)
    owner.close()


PUBLISH = """
import torch
from portakv.migrate import Channel, publish

channel = Channel(timeout=20.0)
tensor = torch.ones(1 << 20, dtype=torch.int32, device="cuda:0")
published = publish(channel, {"w": tensor})
answer = published.ticket
"""
UPDATE = """
with published.update():
    torch.cuda._sleep(4_000_000_000)  # more than a second
    tensor.fill_(2)
"""


@pytest.mark.gpu
@pytest.mark.parametrize("guarded", [True, False])
def test_an_update_ends_behind_the_stream_that_writes(guarded: bool) -> None:
    """A pull that begins inside it brings the new weights. Without the wait for the stream, the
    negative control, it begins too early: the checksums that the owner sums up later differ."""
    with Peer() as owner, closing(Channel(timeout=20.0)) as channel:
        ticket = owner.do(PUBLISH)
        into = torch.zeros(1 << 20, dtype=torch.int32, device="cuda:0")
        pull_weights(channel, ticket, {"w": into})
        assert into.eq(1).all()
        if not guarded:
            owner.do("published._synchronize = lambda: None")
        updating = threading.Thread(target=owner.do, args=(UPDATE,))
        updating.start()
        time.sleep(0.3)
        if guarded:
            pull_weights(channel, ticket, {"w": into})
            assert into.eq(2).all()
        else:
            with pytest.raises(TransferError, match="checksums"):
                pull_weights(channel, ticket, {"w": into})
        updating.join()


def ask_until_done(channel: Channel, address: str, requested: AskWeights) -> None:
    while channel.ask(address, requested, Weights).state == "busy":
        pass


def test_boxes_that_an_owner_has_not_are_refused(channels: Channels) -> None:
    """Checksums of what lies outside, or of no parameter of it."""
    owner = publish(channels(), {"w": Parameter(shared(whole_of((4,))))})
    channel = channels()
    ticket = unsealed(owner.ticket, WeightsTicket)
    assert ticket is not None
    for number, start in ((1, (0,)), (0, (2,))):
        requested = AskWeights(ticket.id, 0, ((number, Box((0,), start, (3,))),))
        with pytest.raises(PeerError, match="rejected"):
            ask_until_done(channel, ticket.address, requested)
    owner.close()


_OWNER = """
import torch
from portakv.migrate.channel import Channel
from portakv.migrate import Parameter, publish
channel = Channel()
weights = [torch.arange(n * 7, dtype=torch.int16).view(n, 7).share_memory_() for n in (5, 900)]
owner = publish(channel, {str(i): Parameter(x) for i, x in enumerate(weights)})
answer = owner.ticket
"""


def test_another_process_serves_its_weights_until_it_dies(channels: Channels) -> None:
    """Killed between the copy and the checksums, the reader learns it immediately."""
    local = {
        str(i): Parameter(torch.zeros(n, 7, dtype=torch.int16)) for i, n in enumerate((5, 900))
    }
    with Peer() as owner:
        ticket = owner.do(_OWNER)
        assert pull_weights(channels(), ticket, local) == 905 * 14
        for x in local.values():
            assert x.tensor.flatten().equal(torch.arange(x.tensor.numel(), dtype=torch.int16))
        between: Any = Between(channels(), owner.kill)
        with pytest.raises(PeerError):
            pull_weights(between, ticket, local)


_DTYPES = """uint8 int8 uint16 int16 int32 int64 float16 bfloat16 float32 float64 float8_e4m3fn
float8_e5m2 float8_e8m0fnu complex64 complex128"""


def test_small_tensors_of_any_dtype_are_copied_bit_by_bit(device: torch.device) -> None:
    """On the host they are runs of bytes. CUDA copies 16-bit floats of a list through float32,
    which changes NaNs (torch 2.11): lists are of integers."""

    class Lists(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kw: Any = None) -> Any:
            if op is torch.ops.aten._foreach_copy_.default:
                seen.extend(x.dtype.is_floating_point or x.dtype.is_complex for x in args[0])
            return op(*args, **(kw or {}))

    random = torch.Generator().manual_seed(1)
    seen = list[bool]()
    pairs = list[Any]()
    for name in _DTYPES.split():
        made = (torch.randint(0, 256, (1 << 18,), dtype=torch.uint8, generator=random),)
        bits, into = (x.to(device) for x in (*made, torch.zeros_like(*made)))
        both = [x.view(getattr(torch, name)) for x in (into, bits)]
        pairs += [[x[:8192] for x in both], [x[8192] for x in both], [x[8193::2] for x in both]]
        pairs.append([x[8194::2].clone() for x in both])
    with Lists():  # type: ignore[no-untyped-call]
        copy_pairs(pairs)
    assert len(seen) > len(_DTYPES.split()) or device.type == "cpu"
    assert not any(seen)
    for into, bits in pairs:
        assert torch.equal(*(x.contiguous().view(-1).view(torch.uint8) for x in (into, bits)))


_ON_A_DEVICE = """
import torch
from portakv.migrate.channel import Channel
from portakv.migrate import Parameter, publish
channel, room = Channel(), torch.arange(1 << 23, dtype=torch.int32, device="cuda:0")
weights = {f"small.{i}": room[i * 16384 :][:16384].clone() for i in range(300)}
weights |= {"large": room, "wide": (room[:384000] * 3).view(1000, 384)}
owner = publish(channel, {name: Parameter(x) for name, x in weights.items()})
answer = owner.ticket
"""


@pytest.mark.gpu
@pytest.mark.parametrize(
    "number",
    [0, pytest.param(1, marks=pytest.mark.skipif("torch.cuda.device_count() < 2", reason="one"))],
)
def test_weights_cross_from_a_device_of_another_process(channels: Channels, number: int) -> None:
    """Many small ones, a large one, and the second third of rows."""
    device = torch.device("cuda", number)
    memory = torch.arange(1 << 23, dtype=torch.int32)
    expected = {f"small.{i}": memory[i * 16384 :][:16384] for i in range(300)}
    expected |= {"large": memory, "wide": (memory[:384000] * 3).view(1000, 384)[:, 128:256]}
    into = {
        name: torch.zeros(x.shape, dtype=x.dtype, device=device) for name, x in expected.items()
    }
    local = {name: Parameter(x) for name, x in into.items()}
    local["wide"] = Parameter.split(into["wide"], 1, (384,), (1, 3))
    with Peer() as owner:
        ticket = owner.do(_ON_A_DEVICE)
        for limit in (None, 50.0):
            for x in into.values():
                x.zero_()
            nbytes = pull_weights(channels(), ticket, local, max_gbps=limit)
            assert nbytes == sum(x.nbytes for x in expected.values())
            assert all(torch.equal(into[name].cpu(), x) for name, x in expected.items())


def test_a_packing_that_cannot_be_told_is_refused_by_its_owner() -> None:
    for packing in (3, "\ud800", "x" * 2000):
        with closing(Channel()) as channel, pytest.raises(InvalidTerms, match="packing of"):
            publish(channel, {"a": Parameter(torch.zeros(3), packing=packing)})  # type: ignore[arg-type]


def test_large_tensors_cross_in_pieces() -> None:
    """So a pull ends in its time, and every byte lands whatever the ends of the pieces."""
    shapes = {"line": (9_000_001,), "wide": (3, 1, 12_000_003), "number": ()}
    source = {name: shared_empty(shape, torch.float32) for name, shape in shapes.items()}
    for tensor in source.values():
        tensor.view(torch.int32).random_()
    target = {name: torch.zeros(shape) for name, shape in shapes.items()}
    with closing(Channel()) as here, closing(Channel()) as there:
        published = publish(here, source)
        with pytest.raises(TransferTimeout):
            pull_weights(there, published.ticket, target, max_gbps=1e-4, timeout=0.5)
        untouched = sum(int((tensor == 0).sum()) for tensor in target.values())
        assert untouched > 20_000_000, "a pull whose time is over copies no more"
        pull_weights(there, published.ticket, target)
        for name, tensor in target.items():
            assert torch.equal(tensor.view(torch.int32), source[name].view(torch.int32)), name
        published.close()
