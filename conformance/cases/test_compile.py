# SPDX-License-Identifier: Apache-2.0
"""`torch.compile`: a transfer inside of a compiled function is the transfer outside of it, in its
place among the function's other work, whichever backend carries it out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from portakv_conformance.cases import Bench, Shape, between

pytestmark = pytest.mark.area("capture")

SHAPE = Shape(layers=3, blocks=8)


@pytest.fixture
def compiler() -> Iterator[str]:
    """Yield the name of a compiler that traces and runs the trace; nothing is compiled before."""
    torch._dynamo.reset()
    yield "aot_eager"
    torch._dynamo.reset()


@pytest.mark.parametrize("move", ["from_gpu", "to_gpu"])
def test_a_transfer_inside_a_compiled_function(bench: Bench, compiler: str, move: str) -> None:
    """A transfer runs after the function's earlier writes and before its later reads."""
    if torch._C._len_torch_dispatch_stack():
        bench.judge.declined.append(
            "what emulates this device watches every op by a dispatch mode, and torch.compile "
            "traces through none"
        )
        return
    connector = bench.connector()
    caches = bench.cache(SHAPE, [], source=move == "from_gpu")
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
        shop = bench.other(100 + turn)
        slots = shop.on_device(SHAPE.slots, tokens, 1)
        chunk = shop.chunk(SHAPE, tokens, source=move == "to_gpu")
        paged = replace(caches, ids=slots, arrangement=None)
        case = between("gather" if move == "from_gpu" else "scatter", paged, chunk, tokens)
        arguments_of_step = (chunk.tensors, chunk.tensors.clone(), slots)
        returned: list[torch.Tensor] = []

        def carry(
            arguments: Any = arguments_of_step, returned: list[torch.Tensor] = returned
        ) -> None:
            returned.append(compiled(*arguments))
            bench.facility.synchronize()

        if bench.judge.judge(case, carry):
            read, left = (each.cpu().view(torch.uint8) for each in (returned[0], chunk.tensors))
            assert torch.equal(read, left), (
                "The compiled function's read after the transfer differs from the "
                "transfer's result."
            )
