# SPDX-License-Identifier: Apache-2.0
"""A worker of the model of an engine: a `WorkerSide` saves and loads the rows of its caches."""

from __future__ import annotations

import time
from typing import ClassVar

import torch

from portakv import KVView
from portakv.serving import GroupCache, Plan, Report, WorkerSide
from support.serving_model import NOTHING, Engine

LAYOUT = "layer | block kv token head dim"


def caches(blocks: int, size: int, numbers: int = 1) -> tuple[torch.Tensor, KVView]:
    """Return memory of blocks of so many tokens, and its view, in which rows of several numbers
    are bf16."""
    memory = torch.full((blocks, 2, size, 1, numbers), NOTHING, dtype=torch.int64)
    return memory, KVView([memory if numbers == 1 else memory.view(torch.bfloat16)], LAYOUT)


class ModelWorker:
    """A worker of the model.

    Attributes:
        step: seconds of a step in which workers of the store go on.
        numbers: of a row.
    """

    step: ClassVar[float]
    numbers: ClassVar[int] = 1

    def __init__(self, engine: Engine, number: int) -> None:
        self._memory, view = caches(engine.draw.blocks, engine.draw.block_size, self.numbers)
        self._worker_side = WorkerSide([self.cache(engine, view, number)])
        self._said = Report()
        self.freed = set[str]()

    @staticmethod
    def cache(engine: Engine, view: KVView, number: int) -> GroupCache:
        """Return a view of the worker of that number, and where its blocks are stored."""
        raise NotImplementedError

    @property
    def busy(self) -> bool:
        return self._worker_side.busy

    @property
    def report(self) -> Report:
        return self._said.merged(self._worker_side.report())

    @report.setter
    def report(self, empty: Report) -> None:
        self._said = empty

    def row(self, block: int, at: int) -> int:
        both = {int(x) for x in self._memory[block, :, at].flatten()}
        return both.pop() if len(both) == 1 else NOTHING

    def write(self, block: int, at: int, row: int) -> None:
        self._memory[block, :, at] = row

    def before_step(self, plan: Plan) -> None:
        self._worker_side.stop(plan)

    def after_step(self, plan: Plan) -> None:
        self._worker_side.load(plan)
        self._worker_side.save(plan)
        self._said = self._said.merged(self._worker_side.report())
        self.freed |= self._worker_side.ended().freed
        if self._worker_side.busy:
            time.sleep(self.step)
