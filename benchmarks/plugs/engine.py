# SPDX-License-Identifier: Apache-2.0
"""vLLM's own offloading worker and PortaKV's inside a real engine, by the pages of its cache.

Each engine runs in a separate process; see `vllm_engine`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from typing import NamedTuple

from portakv.integrations import check_release
from portakv_benchmarks.plugs.suite import IntegrationBench
from portakv_benchmarks.shared.harness import Rows, Step
from portakv_benchmarks.shared.shapes import in_words

#: Tokens of a block of the engine.
BLOCK = 16
_LAYERS = 32
#: The limit on one engine, which starts in 25 to 70 s.
_SECONDS = 240


class PageShape(NamedTuple):
    """The pages of an engine's cache: of 32 layers with heads of 128 numbers in bfloat16."""

    heads: int
    together: bool  # one tensor holds the pages of all layers

    @property
    def tensors(self) -> int:
        return 1 if self.together else _LAYERS

    @property
    def page(self) -> int:
        """Return the bytes of a page in one tensor."""
        return BLOCK * 2 * self.heads * 128 * 2 * (_LAYERS // self.tensors)

    @property
    def pages(self) -> str:
        """Return the pages of one block in words."""
        return f"{self.tensors} x pages of {in_words(self.page)}"


#: Llama-3-8B with a tensor for each layer and with one for all layers, and one of its eight ranks.
SHAPES = {
    "layers": PageShape(8, False),
    "together": PageShape(8, True),
    "rank": PageShape(1, False),
}


def engine_steps(bench: IntegrationBench) -> Iterator[Step]:
    """Yield a step for each page shape.

    Raises `IntegrationError` if vLLM is not here.
    """
    check_release("vllm")
    if bench.device.type != "cuda":
        bench.left_out.append(f"vllm's engine: it needs a CUDA device, and this is {bench.device}")
        return
    bench.installed["vllm"] = version("vllm")
    for name, shape in SHAPES.items():
        yield f"vLLM's engine, {shape.pages}", partial(_rows_of_process, name)


def _rows_of_process(name: str) -> Rows:
    """Return the rows of one engine, which a new process starts and ends."""
    command = [sys.executable, "-m", "portakv_benchmarks.plugs.vllm_engine", name]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SECONDS)
    if ran.returncode:
        raise RuntimeError(f"vLLM's engine ended with {ran.returncode}: {ran.stderr[-2000:]}")
    rows: Rows = json.loads(ran.stdout.splitlines()[-1])
    return rows
