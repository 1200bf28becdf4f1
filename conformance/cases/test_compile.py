# SPDX-License-Identifier: Apache-2.0
"""`torch.compile`: a transfer inside of a compiled function is the transfer outside of it, in its
place among the function's other work, whichever backend carries it out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch

from portakv import AdaptiveConnector
from portakv_conformance.draw.arrangement import Case, Side
from portakv_conformance.draw.by_hand import Shape, Workshop
from portakv_conformance.judge.judging import Judge, index_of, view_of
from portakv_conformance.judge.subject import Subject

_len_torch_dispatch_stack = torch._C._len_torch_dispatch_stack

pytestmark = pytest.mark.area("capture")

SHAPE = Shape(layers=3, blocks=8)


@pytest.fixture
def compiler() -> Iterator[str]:
    """A compiler that traces, and runs what it traced; with nothing compiled before."""
    torch._dynamo.reset()
    yield "aot_eager"
    torch._dynamo.reset()


@pytest.mark.parametrize("move", ["from_gpu", "to_gpu"])
def test_a_transfer_inside_a_compiled_function(
    subject: Subject, judge: Judge, home: Workshop, compiler: str, move: str
) -> None:
    """It comes behind what the function writes before and before what it reads behind, and takes
    any number of slots."""
    if _len_torch_dispatch_stack():
        judge.declined.append(
            "what emulates this device watches every op by a dispatch mode, and torch.compile "
            "traces through none"
        )
        return
    connector = AdaptiveConnector(subject.device, backend=subject.name, kv_layout=home.paged)
    caches = home.cache(SHAPE, [], source=move == "from_gpu")
    connector.register_kv_caches(caches.tensors)

    def step(chunk: torch.Tensor, fresh: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        if move == "to_gpu":
            chunk.copy_(fresh)
            connector.to_gpu(chunk, None, slots)
        else:
            connector.from_gpu(chunk, None, slots)
        return chunk.clone()

    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    for turn, tokens in enumerate((5, 9, 12)):
        shop = Workshop(home.device, home.seed + 100 + turn)
        slots = torch.tensor(shop.shuffled(SHAPE.slots, tokens, 1)).to(subject.device)
        chunk = shop.chunk(SHAPE, tokens, source=move == "to_gpu")
        paged = replace(caches, ids=slots, arrangement=None)
        case = Case(paged, chunk, tokens) if move == "from_gpu" else Case(chunk, paged, tokens)
        _check(judge, case, chunk, partial(compiled, chunk.tensors, chunk.tensors.clone(), slots))


def _check(judge: Judge, case: Case, chunk: Side, call: Callable[[], torch.Tensor]) -> None:
    """Judge a call of the compiled function as the copy that it must be, and what it returns."""
    returned: list[torch.Tensor] = []

    def carry() -> None:
        returned.append(call())
        judge.facility.synchronize()

    asked = (
        view_of(case.src), view_of(case.dst), index_of(case.src), index_of(case.dst),
    )  # fmt: skip
    if judge.judge(case, carry, lambda: judge.why_declined(*asked)):
        assert torch.equal(_bits(returned[0]), _bits(chunk.tensors)), (
            "What the compiled function read behind the transfer is not what the transfer left."
        )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().view(torch.uint8)
