# SPDX-License-Identifier: Apache-2.0
"""The witness of another connector's loads without an engine: with the classes of the installed
vLLM, else with a stand-in of them."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from support.stand_ins import imported_with
from support.vllm_stub import (
    WITNESS_IMPORTERS,
    FullAttentionSpec,
    SlidingWindowSpec,
    configuration,
    write_factory,
    write_vllm,
)

from portakv.errors import InvalidTerms
from portakv.integrations import IntegrationError
from portakv.integrations.vllm.caches import (
    BY_TOKEN,
    FUSED,
    LATENT,
    PACKED,
    groups_of,
    views_of,
)
from portakv.integrations.vllm.notes import (
    BlockNotes,
    Filled,
    Load,
    WitnessTerms,
    check_parallel,
    check_policy,
    rank_files,
    served_groups,
)
from portakv.serving import Group
from portakv.witness import Witness

MODULE = "support.witness_double"
BLOCK = 16
BLOCKS = 8
WIDTH = 4
KEYS = [bytes([n]) * 32 for n in range(16)]


class Vllm(SimpleNamespace):
    """The classes that a test uses: those of vLLM, of the witness, and of what it wraps."""

    def config(self, wrapped: str = "Hybrid", **terms: Any) -> Any:
        """Return vLLM's configuration of a witness."""
        made, _ = configuration("", "engine", BLOCKS, BLOCK)
        made.kv_transfer_config = SimpleNamespace(
            kv_connector="PortaKVWitness",
            kv_connector_module_path="portakv.integrations.vllm.witness",
            kv_load_failure_policy="recompute",
            engine_id="engine",
            is_kv_producer=True,
            kv_connector_extra_config={
                "connector": wrapped,
                "connector_module_path": MODULE,
                "check": "all",
                **terms,
            },
        )
        made.scheduler_config = SimpleNamespace(disable_hybrid_kv_cache_manager=False)
        return made

    def caches(self, groups: int = 1) -> Any:
        """Return vLLM's configuration of the caches."""
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=WIDTH)
        kinds: list[Any] = [spec]
        if groups > 1:
            shape = {"block_size": BLOCK, "num_kv_heads": 1, "head_size": WIDTH}
            kinds.append(SlidingWindowSpec(**shape, sliding_window=2 * BLOCK))
        made = [
            SimpleNamespace(kv_cache_spec=kind, layer_names=[f"layer {at}"])
            for at, kind in enumerate(kinds)
        ]
        return SimpleNamespace(num_blocks=BLOCKS, kv_cache_groups=made)

    def scheduler(self, wrapped: str = "Hybrid", groups: int = 1, **terms: Any) -> Any:
        """Return the scheduler's side."""
        config = self.config(wrapped, **terms)
        return self.witness.PortaKVWitness(config, self.role.SCHEDULER, self.caches(groups))

    def worker(self, wrapped: str = "Hybrid", groups: int = 1, **terms: Any) -> tuple[Any, Any]:
        """Return the worker's side with registered caches, and the caches by group."""
        config = self.config(wrapped, **terms)
        made = self.witness.PortaKVWitness(config, self.role.WORKER, self.caches(groups))
        tensors = [torch.zeros(BLOCKS, 1, BLOCK, 2 * WIDTH) for _ in range(groups)]
        made.register_kv_caches({f"layer {at}": each for at, each in enumerate(tensors)})
        return made, tensors


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vllm]:
    def classes(witness: Any, double: Any) -> Vllm:
        base = import_module("vllm.distributed.kv_transfer.kv_connector.v1.base")
        return Vllm(witness=witness, double=double, base=base, role=base.KVConnectorRole)

    if find_spec("vllm") is not None:
        witness = import_module("portakv.integrations.vllm.witness")
        yield classes(witness, import_module(MODULE))
        return
    folder = tmp_path_factory.mktemp("vllm")
    write_vllm(folder)
    write_factory(folder)
    with imported_with(folder, "vllm", WITNESS_IMPORTERS) as (_, witness, double):
        yield classes(witness, double)


# --- all hooks reach the wrapped connector


def hooks_of(base: Any) -> dict[str, Any]:
    """Return the public members of vLLM's class of connectors, by reflection."""
    made = dict[str, Any]()
    for each in (base.KVConnectorBase_V1, base.SupportsHMA):
        for name in dir(each):
            if not name.startswith("_") and name != "role":
                made[name] = inspect.getattr_static(each, name)
    return made


def arguments_of(vllm: Vllm) -> dict[str, tuple[Any, ...]]:
    """Return the arguments of hooks that the witness reads."""
    step = SimpleNamespace(
        num_scheduled_tokens={},
        scheduled_new_reqs=[],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=[], new_block_ids=[], num_computed_tokens=[], resumed_req_ids=set()
        ),
    )
    request = SimpleNamespace(request_id="a", num_tokens=0, block_hashes=[])
    pool = SimpleNamespace(hash_block_size=BLOCK)
    metadata = vllm.witness.WitnessMetadata("metadata")
    return {
        "bind_connector_metadata": (metadata,),
        "bind_gpu_block_pool": (pool,),
        "bind_kv_cache_manager": (SimpleNamespace(block_pool=pool),),
        "build_connector_meta": (step,),
        "get_finished": (set(),),
        "get_num_new_matched_tokens": (request, 0),
        "get_transfer_results": (set(),),
        "handle_preemptions": (metadata,),
        "register_cross_layers_kv_cache": (torch.zeros(1), None),
        "register_kv_caches": ({},),
        "request_finished": (request, []),
        "request_finished_all_groups": (request, ([],)),
        "update_connector_output": (SimpleNamespace(invalid_block_ids=set()),),
        "update_state_after_alloc": (request, None, 0),
    }


def test_every_hook_reaches_the_wrapped_connector(vllm: Vllm) -> None:
    """A hook that a release adds is among them: they are found by reflection."""
    connector = vllm.scheduler(check="off")
    known = arguments_of(vllm)
    hooks = {name: x for name, x in hooks_of(vllm.base).items() if not is_of_class(x)}
    assert len(hooks) >= 8
    for name, hook in hooks.items():
        connector.wrapped.calls.clear()
        if isinstance(hook, property):
            getattr(connector, name)()
        else:
            needed = [
                each
                for each in inspect.signature(hook).parameters.values()
                if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD
            ]
            arguments = known.get(name, tuple(f"argument {n}" for n in range(len(needed) - 1)))
            getattr(connector, name)(*arguments)
        assert name in [call[0] for call in connector.wrapped.calls], name


def test_one_cache_of_all_layers_is_compared(vllm: Vllm) -> None:
    (connector, _) = vllm.worker()
    cache = torch.arange(BLOCKS * 2 * BLOCK * WIDTH).view(BLOCKS, 2, BLOCK, WIDTH).float()
    connector.register_cross_layers_kv_cache(cache, None)
    group = "group 0"
    connector.witness.stored([1, 2], KEYS[:2], group)
    cache[3] = cache[1]
    assert not connector.witness.restored([3], KEYS[:1], group).faults
    assert len(connector.witness.restored([3], KEYS[1:2], group).faults) == 1


@pytest.mark.parametrize("action", ["log", "recompute"])
@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("name", ["async_scheduling", "use_v2_model_runner", ""])
def test_no_load_within_a_step_whose_token_vllm_retains(
    name: str, waits: bool, action: str, vllm: Vllm, caplog: pytest.LogCaptureFixture
) -> None:
    config = vllm.config(action=action)
    of = config.scheduler_config if name == "async_scheduling" else config
    setattr(of, name or "something_else", True)
    connector = vllm.witness.PortaKVWitness(config, vllm.role.SCHEDULER, vllm.caches())
    connector.wrapped.get_num_new_matched_tokens = lambda *_: (BLOCK, waits)
    connector.figures = vllm.witness.Figures(0.0, metrics=vllm.witness.WITNESS)
    left_out = bool(name) and action == "recompute" and not waits
    for request in ("a", "a", "b"):  # vLLM asks again while a request waits for blocks
        asks = SimpleNamespace(request_id=request, num_tokens=2 * BLOCK, block_hashes=KEYS[:2])
        expected = (0, False) if left_out else (BLOCK, waits)
        assert connector.get_num_new_matched_tokens(asks, 0) == expected
    assert caplog.text.count("Nothing is loaded") == left_out
    assert connector.statistics() == {"witness_left_out": 2 * left_out}
    if vllm.witness.SUPPORTED:
        stats = connector.get_kv_connector_stats()
        assert (stats and stats.reduce()) == ({"witness_left_out": 2} if left_out else None)


def test_every_hook_of_the_class_is_there(vllm: Vllm) -> None:
    """They are called before there is a wrapped connector, and need code for each."""
    own = vars(vllm.witness.PortaKVWitness)
    names = {name for name, hook in hooks_of(vllm.base).items() if is_of_class(hook)}
    assert names <= {name for name, hook in own.items() if is_of_class(hook)}


def is_of_class(hook: Any) -> bool:
    return isinstance(hook, classmethod | staticmethod)


def test_hooks_of_the_class_reach_the_wrapped_class(vllm: Vllm) -> None:
    of = vllm.witness.PortaKVWitness
    config = vllm.config(connector_extra_config={"by_layer": True})
    extra = config.kv_transfer_config.kv_connector_extra_config
    assert of.requires_piecewise_for_cudagraph(extra)
    extra["connector_extra_config"] = {}
    assert not of.requires_piecewise_for_cudagraph(extra)
    assert not of.supports_sleep_mode(config.kv_transfer_config)
    assert vllm.double.Named.seen[-1][1][0].kv_connector == "Hybrid"
    assert of.get_required_kvcache_layout(config) == "HND"
    _, (inner,), _ = vllm.double.Named.seen[-1]
    assert inner.kv_transfer_config.kv_connector == "Hybrid"
    assert inner.kv_transfer_config.engine_id == "engine"
    assert config.kv_transfer_config.kv_connector == "PortaKVWitness"


def test_what_vllms_class_lacks_is_the_wrapped_connectors(vllm: Vllm) -> None:
    connector = vllm.scheduler()
    assert connector.register_encoder("x") == "register_encoder"
    assert connector.wrapped.calls[-1] == ("register_encoder", ("x",), {})
    assert not hasattr(connector, "_register")


def test_the_wrapped_connector_sees_no_trace_of_the_witness(vllm: Vllm) -> None:
    connector = vllm.scheduler(check="off")
    step = arguments_of(vllm)["build_connector_meta"][0]
    connector.wrapped.answers["build_connector_meta"] = "the wrapped one's"
    metadata = connector.build_connector_meta(step)
    assert metadata.wrapped == "the wrapped one's"
    connector.handle_preemptions(metadata)
    connector.bind_connector_metadata(metadata)
    assert connector.wrapped.calls[-2:] == [
        ("handle_preemptions", ("the wrapped one's",), {}),
        ("bind_connector_metadata", ("the wrapped one's",), {}),
    ]


# --- hybrids


def test_a_connector_without_hybrids_ends_requests_of_one_group(vllm: Vllm) -> None:
    config = vllm.config("Named")
    role = vllm.role.SCHEDULER
    connector = vllm.witness.PortaKVWitness(config, role, vllm.caches())
    request = SimpleNamespace(request_id="a")
    connector.wrapped.answers["request_finished"] = (True, None)
    assert connector.request_finished_all_groups(request, ([3, 4],)) == (True, None)
    assert connector.wrapped.calls[-1] == ("request_finished", (request, [3, 4]), {})
    # Its configuration says so too, as vLLM's connector of several asserts.
    assert connector.wrapped.config.scheduler_config.disable_hybrid_kv_cache_manager
    assert not config.scheduler_config.disable_hybrid_kv_cache_manager


def test_a_connector_without_hybrids_serves_none(vllm: Vllm) -> None:
    with pytest.raises(IntegrationError, match="--disable-hybrid-kv-cache-manager"):
        vllm.scheduler("Named", groups=2)


def test_a_hybrid_connector_hears_of_all_groups(vllm: Vllm) -> None:
    connector = vllm.scheduler(groups=2)
    request = SimpleNamespace(request_id="a")
    connector.request_finished_all_groups(request, ([3], [4]))
    assert connector.wrapped.calls[-1] == ("request_finished_all_groups", (request, ([3], [4])), {})


# --- terms


@pytest.mark.parametrize(
    ("terms", "says"),
    [
        ({}, "Expected connector to be the name of the connector that the witness wraps"),
        ({"connector": "PortaKVWitness"}, "another connector than the witness"),
        ({"connector": 5}, "Expected connector"),
        ({"connector": "X", "chek": "all"}, "Did you mean check?"),
        ({"connector": "X", "check": "some"}, "'off' or 'sample' or 'all', got 'some'"),
        ({"connector": "X", "action": "stop"}, "'log' or 'recompute' or 'raise'"),
        ({"connector": "X", "rate": 0}, 'Pass check "off"'),
        ({"connector": "X", "rate": 2}, "a part from 0 to 1"),
        ({"connector": "X", "nbytes": 0}, "nbytes"),
        ({"connector": "X", "connector_extra_config": []}, "connector_extra_config"),
        ({"connector": "X", "older": "no"}, "older"),
        ({"connector": "X", "file": 5}, "file"),
    ],
)
def test_wrong_terms_are_refused(terms: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidTerms) as caught:
        WitnessTerms.of(terms)
    assert says in str(caught.value)


def test_recompute_needs_vllms_policy() -> None:
    terms = WitnessTerms("X", action="recompute")
    check_policy(terms, "recompute")
    check_policy(WitnessTerms("X"), "fail")
    with pytest.raises(IntegrationError, match="Set it to 'recompute'"):
        check_policy(terms, "fail")


def test_copies_of_an_engine_have_their_own_files(vllm: Vllm, tmp_path: Path) -> None:
    connectors = list[Any]()
    for copy in range(2):
        config = vllm.config(file=str(tmp_path / "f"))
        config.parallel_config.data_parallel_index = copy
        made = vllm.witness.PortaKVWitness(config, vllm.role.WORKER, vllm.caches())
        made.register_kv_caches({"layer 0": torch.zeros(BLOCKS, 1, BLOCK, 2 * WIDTH)})
        connectors.append(made)
    for made in connectors:
        made.shutdown()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["f", "f.tp1.rank1"]


def test_ranks_that_divide_a_blocks_tokens_are_refused() -> None:
    check_parallel(SimpleNamespace(world_size=2))
    with pytest.raises(IntegrationError, match="leave --decode-context-parallel-size out"):
        check_parallel(SimpleNamespace(decode_context_parallel_size=2))


def test_files_of_ranks() -> None:
    assert rank_files(None, 0, 0, 2, 2) == (None, [], [])
    assert rank_files("f", 0, 0, 1, 1) == (Path("f"), [], [])
    others = [Path("f.tp3.rank0"), Path("f.tp3.rank2")]
    assert rank_files("f", 1, 1, 3, 3) == (Path("f.tp3.rank1"), others, [])
    # The second of two stages, and the second copy of an engine. vLLM tells a copy of a dense model
    # that it has no other copies.
    assert rank_files("f", 1, 0, 1, 2, stages=2) == (Path("f.tp1.rank1"), [], [])
    assert rank_files("f", 1, 0, 1, 1) == (Path("f.tp1.rank1"), [], [])
    assert rank_files("f", 3, 1, 2, 4) == (Path("f.tp2.rank3"), [Path("f.tp2.rank2")], [])


def test_files_of_other_numbers_of_ranks(tmp_path: Path) -> None:
    """In the control another file has the name, a rank's file is missing, or the ranks are those of
    another stage."""
    file = tmp_path / "f[1]"
    one = [file]
    four = [Path(f"{file}.tp4.rank{rank}") for rank in range(4)]
    for path in (*one, *four, tmp_path / "f[1].tp8.rank0", tmp_path / "f1.tp8.rank1"):
        path.touch()
    for wrong in (".tp0.rank0", ".tpx.rank0", ".tp1.rank0.old"):
        Path(f"{file}{wrong}").touch()
    assert rank_files(str(file), 0, 0, 1, 1).shardings == [four]
    assert rank_files(str(file), 1, 1, 2, 2).shardings == [one, four]
    assert rank_files(str(file), 2, 2, 4, 4).shardings == [one]
    # The second copy has no other layers, and the second stage has.
    assert rank_files(str(file), 3, 1, 2, 4).shardings == [one, four]
    assert rank_files(str(file), 3, 1, 2, 4, stages=2).shardings == []
    # Each copy of a former engine has stored blocks.
    assert rank_files(str(file), 0, 0, 1, 2, stages=2).shardings == [four]
    for place in range(4, 8):
        four.append(Path(f"{file}.tp4.rank{place}"))
        four[-1].touch()
    assert rank_files(str(file), 0, 0, 1, 1).shardings == [four[:4], four[4:]]
    assert rank_files(str(file), 2, 0, 2, 4, stages=2).shardings == [four[4:]]
    assert rank_files(str(tmp_path / "none" / "f"), 0, 0, 1, 1).shardings == []


# --- which blocks


def request_of(tokens: int, hash_size: int = BLOCK) -> Any:
    hashes = [bytes([n + 1]) * 32 for n in range(tokens // hash_size)]
    return SimpleNamespace(request_id="a", num_tokens=tokens, block_hashes=hashes)


def begun(notes: BlockNotes, request: Any, computed: int = 0, waits: bool = True) -> None:
    assert notes.offered(request, computed, waits)


def blocks_in(notes: BlockNotes) -> list[int]:
    return [block for some in notes.take().filled.values() for block in some.blocks]


def test_a_prompt_in_chunks_is_noted_once() -> None:
    notes = BlockNotes([Group(BLOCK)])
    begun(notes, request_of(40))
    notes.scheduled("a", 0, 20, ((5, 6),), anew=True)
    step = notes.take()
    assert step.filled == {0: Filled([5], [bytes([1]) * 32], [0], [])}
    notes.scheduled("a", 20, 20, ((7,),), anew=False)
    assert notes.take().filled == {0: Filled([6], [bytes([2]) * 32], [], [])}


def test_the_blocks_of_two_requests_in_a_step_have_their_places() -> None:
    notes = BlockNotes([Group(BLOCK)])
    first = request_of(32)
    second = request_of(64)
    second.request_id = "b"
    begun(notes, first)
    begun(notes, second)
    notes.allocated(second, ((1, 2, 3, 4),), 64)
    notes.take()
    notes.scheduled("a", 0, 32, ((5, 6),), anew=True)
    notes.scheduled("b", 63, 1, ((1, 2, 3, 4),), anew=True)
    keys = [bytes([n]) * 32 for n in (1, 2, 4)]
    assert notes.take().filled == {0: Filled([5, 6, 4], keys, [0], [2])}

    third = request_of(32)
    third.request_id = "c"
    begun(notes, third)
    notes.scheduled("b", 0, 16, ((7,),), anew=True)
    notes.scheduled("c", 0, 16, ((8,),), anew=True)
    keys = [bytes([1]) * 32] * 2
    assert notes.take().filled == {0: Filled([7, 8], keys, [0, 1], [])}


def test_steps_within_blocks_are_left_out() -> None:
    """Each step of a block but the last one, also after other blocks were taken."""
    notes = BlockNotes([Group(BLOCK), Group(2 * BLOCK)])
    request = request_of(200)
    begun(notes, request)
    assert notes.is_within_blocks("b", 0, 1)
    for first in (0, 16):
        notes.scheduled("a", first, 4, ((*range(9),), (*range(9),)), anew=True)
        notes.take()
        within = [notes.is_within_blocks("a", at, 1) for at in range(first + 4, first + 15)]
        assert within == [True] * 11
        assert not notes.is_within_blocks("a", first + 15, 1)
        assert not notes.is_within_blocks("a", first + 12, 5)
        assert not notes.is_within_blocks("a", first, 1)  # a load has failed
        notes.scheduled("a", first + 15, 1, ((), ()), anew=False)
        assert len(blocks_in(notes)) == (1 if first == 0 else 2)


def test_blocks_that_were_there_are_not_noted() -> None:
    notes = BlockNotes([Group(BLOCK)])
    begun(notes, request_of(64))
    notes.scheduled("a", 32, 32, ((5, 6, 7, 8),), anew=True)
    assert blocks_in(notes) == [7, 8]


def test_drafts_are_not_noted_before_they_are_accepted() -> None:
    notes = BlockNotes([Group(BLOCK)])
    request = request_of(31)
    begun(notes, request)
    notes.scheduled("a", 0, 31, ((5, 6),), anew=True)
    assert blocks_in(notes) == [5]
    request.num_tokens = 32  # one token is sampled; it is computed with four drafts after it
    request.block_hashes.append(bytes([2]) * 32)
    notes.scheduled("a", 31, 5, ((7,),), anew=False)
    assert blocks_in(notes) == [6]
    request.num_tokens = 33  # all drafts were rejected
    notes.scheduled("a", 32, 5, ((),), anew=False)
    assert blocks_in(notes) == []
    request.num_tokens = 49  # later ones fill a block with the last tokens of former steps
    request.block_hashes.append(bytes([3]) * 32)
    notes.scheduled("a", 48, 5, ((8,),), anew=False)
    assert blocks_in(notes) == [7]


def test_a_preempted_request_has_other_blocks() -> None:
    notes = BlockNotes([Group(BLOCK)])
    begun(notes, request_of(32))
    notes.scheduled("a", 0, 32, ((5, 6),), anew=True)
    assert blocks_in(notes) == [5, 6]
    notes.scheduled("a", 16, 16, ((3, 4),), anew=True)
    assert blocks_in(notes) == [4]


def test_blocks_after_a_failed_load_are_noted_again() -> None:
    notes = BlockNotes([Group(BLOCK)])
    begun(notes, request_of(48), waits=False)
    notes.allocated(request_of(48), ((5, 6, 7),), 32)
    notes.scheduled("a", 32, 16, ((5, 6, 7),), anew=True)
    step = notes.take()
    assert step.loads == [Load("a", False, {0: {5: bytes([1]) * 32, 6: bytes([2]) * 32}})]
    assert step.filled[0].blocks == [7]
    notes.scheduled("a", 16, 32, ((),), anew=False)
    assert blocks_in(notes) == [6, 7]


@pytest.mark.parametrize("loaded", [63, 64])
def test_a_block_that_a_load_has_begun_is_not_noted(loaded: int) -> None:
    """Of a whole prompt the engine computes the last token alone."""
    notes = BlockNotes([Group(BLOCK)])
    request = request_of(64)
    begun(notes, request)
    notes.allocated(request, ((1, 2, 3, 4),), loaded)
    assert [*notes.take().loads[0].keys[0]] == [*range(1, loaded // BLOCK + 1)]
    notes.scheduled("a", 63, 1, ((1, 2, 3, 4),), anew=True)
    again = Filled([4], [bytes([4]) * 32], [], [0])
    assert notes.take().filled == ({0: again} if loaded == 64 else {})
    notes.scheduled("a", 32, 32, ((),), anew=False)  # the load has failed
    assert blocks_in(notes) == [3, 4]


def test_windows_and_hashes_of_fewer_tokens() -> None:
    notes = BlockNotes([Group(BLOCK), Group(BLOCK, window=20), None])
    notes.hash_size = 8
    request = request_of(64, 8)
    begun(notes, request)
    notes.allocated(request, ((1, 2, 3, 4), (-1, -1, 6, 7), (9, 9, 9, 9)), 64)
    (load,) = notes.take().loads
    assert load.waits
    keys = {group: {x: key[0] for x, key in some.items()} for group, some in load.keys.items()}
    assert keys == {0: {1: 2, 2: 4, 3: 6, 4: 8}, 1: {6: 6, 7: 8}}


@pytest.mark.parametrize("states", ["last", "told"])
def test_states_are_those_at_the_ends_of_steps(states: Any) -> None:
    notes = BlockNotes([Group(BLOCK), Group(BLOCK, states=states)])
    request = request_of(50)
    begun(notes, request)
    told = {32: {1: 8}} if states == "told" else {}
    notes.scheduled("a", 0, 32, ((1, 2), (7, 8)), anew=True, states=told)
    noted = {group: some.blocks for group, some in notes.take().filled.items()}
    assert noted == {0: [1, 2], 1: [8]}
    notes.scheduled("a", 32, 18, ((3,), (9,)), anew=False)
    noted = {group: some.blocks for group, some in notes.take().filled.items()}
    assert noted == {0: [3]}
    begun(notes, request)
    notes.allocated(request, ((1, 2), (-1, 8)), 32)
    keys = notes.take().loads[0].keys
    assert {group: [*some] for group, some in keys.items()} == {0: [1, 2], 1: [8]}


def test_a_connector_is_not_asked_again_after_a_failed_load() -> None:
    notes = BlockNotes([Group(BLOCK)])
    request = request_of(48)
    begun(notes, request)
    notes.allocated(request, ((5, 6, 7),), 32)
    notes.failed({9}, ())
    assert notes.offered(request, 0, True)
    notes.failed({6}, ())
    assert not notes.offered(request, 0, True)
    notes.ended("a")
    assert notes.offered(request, 0, True)
    notes.failed((), {"a"})  # it has no load
    assert notes.offered(request, 0, True)


def test_a_group_that_cannot_be_compared_is_named() -> None:
    class CrossAttentionSpec(SimpleNamespace):
        pass

    spec: Any = CrossAttentionSpec(block_size=BLOCK)
    full: Any = FullAttentionSpec(block_size=BLOCK)
    groups = [SimpleNamespace(kv_cache_spec=each) for each in (full, spec)]
    served, reasons = served_groups(SimpleNamespace(kv_cache_groups=groups), tells=False)
    assert served == [Group(BLOCK), None]
    (reason,) = reasons
    assert reason.startswith("Blocks of group 1 are not compared: ")


def test_pages_are_compared_whatever_their_rows_mean() -> None:
    """A connector of vLLM serves them, though `PortaKVConnector` refuses them."""

    class MLAAttentionSpec(SimpleNamespace):
        pass

    spec: Any = MLAAttentionSpec(
        block_size=BLOCK, tokens_per_state=4, model_version="deepseek_v4", bounded_replay=True
    )
    caches = SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec)])
    with pytest.raises(IntegrationError, match="stands for several tokens"):
        groups_of(caches)
    assert served_groups(caches, tells=False) == ([Group(BLOCK)], [])


# --- comparisons in a worker


def step(connector: Any, vllm: Vllm, **notes: Any) -> None:
    """Begin a step with these notes."""
    made = vllm.witness.StepNotes(**notes)
    connector.bind_connector_metadata(vllm.witness.WitnessMetadata("m", made))


def store(connector: Any, vllm: Vllm, blocks: list[int], group: int = 0) -> None:
    """Have a step fill blocks, whose keys are those of their numbers."""
    filled = Filled(blocks, [KEYS[block] for block in blocks], [], [])
    step(connector, vllm, filled={group: filled})
    connector.get_transfer_results(set())
    connector.clear_connector_metadata()


def load_of(blocks: dict[int, int], waits: bool = True, group: int = 0) -> Load:
    """Return a load of blocks with the keys of others."""
    return Load("a", waits, {group: {x: KEYS[of] for x, of in blocks.items()}})


def ends(connector: Any, *names: str, lost: tuple[str, ...] = ()) -> None:
    """Have the wrapped connector report the ends of loads."""
    connector.wrapped.answers["get_transfer_results"] = SimpleNamespace(
        finished_sending=set(), finished_recving={*names}, failed_recving={*lost}
    )


def faults_of(connector: Any) -> int:
    connector.witness.settle(wait=True)
    counts = Counter(connector.statistics())
    return sum(int(many) for name, many in counts.items() if name.startswith("witness_faults"))


@pytest.fixture
def rows() -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(BLOCKS, 1, BLOCK, 2 * WIDTH, generator=draw)


def test_a_load_that_waits_is_compared_at_its_end(vllm: Vllm, rows: torch.Tensor) -> None:
    connector, (cache,) = vllm.worker(action="recompute")
    cache.copy_(rows)
    store(connector, vllm, [1, 2, 3])
    step(connector, vllm, loads=[load_of({4: 1, 5: 2, 6: 3})])
    assert connector.get_block_ids_with_load_errors() == set()
    connector.get_transfer_results(set())
    connector.clear_connector_metadata()
    assert connector.statistics()["witness_compared"] == 0  # its rows have not landed

    cache[[4, 5]] = cache[[1, 2]]
    cache[6] = cache[2]
    step(connector, vllm)
    ends(connector, "a")
    results = connector.get_transfer_results(set())
    assert results.finished_recving == {"a"}
    assert results.failed_recving == set()
    assert connector.get_block_ids_with_load_errors() == {6}
    assert connector.get_block_ids_with_load_errors() == set()
    assert connector.statistics()["witness_compared"] == 3
    assert faults_of(connector) == 1


def test_rows_after_wrong_ones_are_not_taken(vllm: Vllm, rows: torch.Tensor) -> None:
    """Of no request in the step, which may share the wrong block, or in the next step, which vLLM
    has planned before it hears of the block. The engine computes them again."""
    connector, (cache,) = vllm.worker(action="recompute")
    cache.copy_(rows)
    store(connector, vllm, [1, 2])
    filled = {0: Filled([6, 7], [KEYS[6], KEYS[7]], [], [])}
    step(connector, vllm, loads=[load_of({4: 1, 5: 2}, waits=False)], filled=filled)
    cache[4] = cache[1]
    connector.get_transfer_results(set())
    assert connector.get_block_ids_with_load_errors() == {5}
    connector.clear_connector_metadata()
    store(connector, vllm, [3])
    connector.witness.settle(wait=True)
    assert connector.statistics()["witness_fingerprints"] == 2
    store(connector, vllm, [0])
    connector.witness.settle(wait=True)
    assert connector.statistics()["witness_fingerprints"] == 3


def test_what_the_wrapped_connector_reports_as_failed_is_no_fault(
    vllm: Vllm, rows: torch.Tensor
) -> None:
    connector, (cache,) = vllm.worker(action="recompute")
    cache.copy_(rows)
    store(connector, vllm, [1, 2])
    step(connector, vllm, loads=[load_of({4: 1, 5: 2})])
    cache[4] = cache[1]
    connector.wrapped.answers["get_block_ids_with_load_errors"] = {5}
    ends(connector)
    connector.get_transfer_results(set())
    assert connector.get_block_ids_with_load_errors() == {5}
    connector.clear_connector_metadata()
    connector.wrapped.answers["get_block_ids_with_load_errors"] = set()
    step(connector, vllm, loads=[load_of({4: 1, 5: 2})._replace(request="b")])
    ends(connector, "a", "b", lost=("b",))
    connector.get_transfer_results(set())
    assert connector.get_block_ids_with_load_errors() == set()
    assert faults_of(connector) == 0


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("waits", [False, True])
def test_wrong_blocks_before_a_failed_one_are_found(
    late: bool, waits: bool, vllm: Vllm, rows: torch.Tensor
) -> None:
    """The engine uses them. It computes the failed block and those after it, which have no rows. A
    connector may report a failed block before the end of the load."""
    connector, (cache,) = vllm.worker(action="recompute")
    cache.copy_(rows)
    store(connector, vllm, [0, 1, 2, 3])
    step(connector, vllm, loads=[load_of({4: 0, 5: 1, 6: 2, 7: 3}, waits=waits)])
    cache[4] = cache[0]
    connector.wrapped.answers["get_block_ids_with_load_errors"] = {6}
    ends(connector, *(() if late else ("a",)))
    connector.get_transfer_results(set())
    found = connector.get_block_ids_with_load_errors()
    connector.clear_connector_metadata()
    if late:
        connector.wrapped.answers["get_block_ids_with_load_errors"] = set()
        step(connector, vllm)
        ends(connector, "a")
        connector.get_transfer_results(set())
        found |= connector.get_block_ids_with_load_errors()
    assert found == {5, 6}
    assert faults_of(connector) == 1


def test_the_load_of_an_aborted_request_is_not_compared(vllm: Vllm, rows: torch.Tensor) -> None:
    connector, (cache,) = vllm.worker(action="recompute")
    cache.copy_(rows)
    store(connector, vllm, [1, 2])
    step(connector, vllm, loads=[load_of({4: 1, 5: 2})])
    ends(connector, "a")
    connector.get_transfer_results({"a"})
    assert connector.get_block_ids_with_load_errors() == set()
    assert faults_of(connector) == 0


def test_a_request_of_several_groups_fails_as_a_whole(vllm: Vllm, rows: torch.Tensor) -> None:
    if not hasattr(vllm.base.KVConnectorBase_V1, "get_transfer_results"):
        with pytest.raises(IntegrationError, match="get_transfer_results"):
            vllm.worker(groups=2, action="recompute")
        return
    connector, caches = vllm.worker(groups=2, action="recompute")
    for cache in caches:
        cache.copy_(rows)
    store(connector, vllm, [1], group=0)
    store(connector, vllm, [1], group=1)
    keys = {0: {4: KEYS[1]}, 1: {4: KEYS[1]}}
    step(connector, vllm, loads=[Load("a", True, keys)])
    caches[0][4] = caches[0][1]
    ends(connector, "a")
    assert connector.get_transfer_results(set()).failed_recving == {"a"}
    assert connector.get_block_ids_with_load_errors() == set()
    assert faults_of(connector) == 1

    step(connector, vllm, loads=[Load("b", False, keys)])
    ends(connector)
    with pytest.raises(IntegrationError, match="a load of Hybrid that ends within its step"):
        connector.get_transfer_results(set())


@pytest.mark.parametrize("action", ["log", "raise"])
def test_other_actions(action: str, vllm: Vllm, rows: torch.Tensor) -> None:
    connector, (cache,) = vllm.worker(action=action)
    cache.copy_(rows)
    store(connector, vllm, [1])
    step(connector, vllm, loads=[load_of({4: 1})])
    ends(connector, "a")
    if action == "raise":
        with pytest.raises(Exception, match="block 4"):
            connector.get_transfer_results(set())
        return
    connector.get_transfer_results(set())
    assert connector.get_block_ids_with_load_errors() == set()
    assert faults_of(connector) == 1


def test_rows_before_a_reset_are_a_fault(vllm: Vllm, rows: torch.Tensor) -> None:
    """vLLM resets a connector's cache after a change of weights. If the connector keeps its rows, a
    load of them is a fault as soon as the engine has computed the block again."""
    scheduler = vllm.scheduler(action="recompute")
    connector, (cache,) = vllm.worker(action="recompute")
    request = request_of(BLOCK)
    old = rows[0]
    new = rows[1]
    found = list[set[int]]()
    for reset in (False, True):
        if reset:
            scheduler.reset_cache()
        cache[1] = new if reset else old
        made = scheduler.notes
        begun(made, request)
        made.scheduled("a", 0, BLOCK, ((1,),), anew=True)
        made.allocated(request, ((4,),), BLOCK)
        notes = made.take()
        step(connector, vllm, filled=notes.filled)
        ends(connector)
        connector.get_transfer_results(set())
        connector.clear_connector_metadata()
        cache[4] = old
        step(connector, vllm, loads=notes.loads)
        ends(connector, "a")
        connector.get_transfer_results(set())
        found.append(connector.get_block_ids_with_load_errors())
    assert found == [set(), {4}]


@pytest.mark.parametrize("wrong", [False, True])
def test_a_loaded_block_whose_last_token_is_computed_again_is_another_version(
    wrong: bool, vllm: Vllm, rows: torch.Tensor
) -> None:
    """Of a whole prompt the engine computes the last token, and a tier may take this block. In the
    control the load was wrong."""
    connector, (cache,) = vllm.worker()
    notes = vllm.scheduler().notes
    request = request_of(2 * BLOCK)
    cache.copy_(rows)

    def end_step(*names: str) -> None:
        made = notes.take()
        step(connector, vllm, filled=made.filled, loads=made.loads)
        ends(connector, *names)
        connector.get_transfer_results(set())
        connector.clear_connector_metadata()

    begun(notes, request)
    notes.scheduled("a", 0, 2 * BLOCK, ((1, 2),), anew=True)
    end_step()
    notes.allocated(request, ((3, 4),), 2 * BLOCK)
    cache[[3, 4]] = cache[[1, 2]]
    if wrong:
        cache[4, 0, 3] += 1
    end_step("a")
    notes.scheduled("a", 2 * BLOCK - 1, 1, ((3, 4),), anew=True)
    cache[4, 0, -1] *= 1 + 2**-10
    end_step()
    notes.allocated(request, ((5, 6),), 2 * BLOCK)
    cache[[5, 6]] = cache[[3, 4]]
    end_step("a")
    assert faults_of(connector) == 2 * wrong
    assert connector.statistics()["witness_fingerprints"] == 3 - wrong


# --- figures


def test_figures_are_those_of_both(vllm: Vllm, rows: torch.Tensor) -> None:
    if not vllm.witness.SUPPORTED:
        pytest.skip("this release has no figures of connectors")
    connector, (cache,) = vllm.worker()
    double = vllm.double
    connector.figures = vllm.witness.Figures(0.0, metrics=vllm.witness.WITNESS)
    assert connector.get_kv_connector_stats() is None
    cache.copy_(rows)
    store(connector, vllm, [1, 2])
    connector.witness.settle(wait=True)
    connector.wrapped.answers["get_kv_connector_stats"] = double.Stats(data={"bytes": 5})
    first = connector.get_kv_connector_stats()
    second = vllm.witness.WitnessStats({"witness_compared": 1.0})
    both = second.aggregate(first)
    assert not both.is_empty()
    assert both.reduce() == {"bytes": 5, "witness_compared": 1, "witness_fingerprints": 2}
    sent = both.to_dict()
    assert sent["wrapped"] == {"bytes": 5}
    assert both.data == sent
    read = vllm.witness.PortaKVWitness.build_kv_connector_stats(sent)
    assert read.reduce() == both.reduce()
    assert vllm.witness.PortaKVWitness.build_kv_connector_stats().is_empty()


def test_prometheus_counts_those_of_both(vllm: Vllm) -> None:
    if not vllm.witness.SUPPORTED:
        pytest.skip("this release has no figures of connectors")
    counted = Counter[tuple[Any, ...]]()

    class Series:
        def __init__(self, name: str, labels: tuple[Any, ...] = (), **_: Any) -> None:
            self.key = (name, *labels)

        def labels(self, *values: Any) -> Series:
            return Series(self.key[0], values)

        def inc(self, many: float) -> None:
            counted[self.key] += many  # type: ignore[assignment]

    def counter(name: str, **_: Any) -> Series:
        return Series(name)

    types = {"counter": counter, "gauge": counter}
    for kind in ("Counter", "Gauge", "Histogram") if find_spec("prometheus_client") else ():
        types[getattr(import_module("prometheus_client"), kind)] = counter
    config = vllm.config()
    made = vllm.witness.PortaKVWitness.build_prom_metrics(config, types, [], {0: []})
    made.observe({"witness": {"witness_faults/zeros": 2, "witness_compared": 3}}, 0)
    assert counted["vllm:portakv_witness_faults", "zeros"] == 2
    assert counted["vllm:portakv_witness_compared",] == 3
    made.observe({"witness": {}, "wrapped": {"bytes": 5}, "of": "m:C"}, 0)
    assert vllm.double.Named.observed == [({"bytes": 5}, 0)]


class Quantized(NamedTuple):
    """Pages of a quantized cache.

    Attributes:
        kernel: the attention backend.
        row: bytes of a head's key with its scale, or of a latent row.
        heads: of a layer; None: latent rows.
        scale: the byte of a row, keys and values, in which a scale lies, or a number.
        by_token: a fault is located by head and token, else by a part of the page.
    """

    kernel: str
    row: int
    heads: int | None
    scale: int
    by_token: bool = True


QUANTIZED = {
    "fp8, scales outside of the page": Quantized(FUSED[0], 32, 4, 5),
    "int8 and a scale of each token and head": Quantized(FUSED[2], 36, 4, 34),
    "int4 and a scale of each token and head": Quantized(FUSED[2], 20, 4, 38),
    "fp8_ds_mla": Quantized(LATENT[-1], PACKED, None, 520),
    "NVFP4, scales after all values of a head": Quantized(FUSED[1], 18, 4, 17, False),
}


@pytest.mark.parametrize("name", [*QUANTIZED])
def test_a_byte_of_a_quantized_row_and_of_its_scale_is_found(name: str) -> None:
    """In the control the scale is right."""
    kernel, nbytes, heads, scale, by_token = QUANTIZED[name]
    _, caches = configuration("", "engine", BLOCKS, BLOCK)
    (group,) = caches.kv_cache_groups
    group.layer_names = ["a"]
    spec = group.kv_cache_spec
    spec.num_kv_heads = heads or 1
    spec.head_size = 32
    spec.state_content_bytes = nbytes * (1 if heads is None else 2)
    shape = (BLOCKS, BLOCK, nbytes) if heads is None else (BLOCKS, heads, BLOCK, 2 * nbytes)
    if not by_token:
        shape = (BLOCKS, 8, BLOCK, nbytes)
    draw = torch.Generator().manual_seed(0)
    cache = torch.randint(0, 255, shape, dtype=torch.uint8, generator=draw)
    if by_token:
        (made,) = views_of({"a": cache}, caches, {"a": kernel}, BY_TOKEN)
    else:
        with pytest.raises(IntegrationError, match="whose pages PortaKV can read by token"):
            views_of({"a": cache}, caches, {"a": kernel}, BY_TOKEN)
        (made,) = views_of({"a": cache}, caches)
    witness = Witness(made.view, check="all", nbytes=1 << 20)
    witness.stored([1, 2], KEYS[1:3])
    cache[[3, 4]] = cache[[1, 2]]
    assert witness.restored([3, 4], KEYS[1:3]).faults == []

    wrong = cache[3, 7] if heads is None else cache[3, 2, 7]
    wrong[scale] ^= 1
    (fault,) = witness.restored([3, 4], KEYS[1:3]).faults
    assert (fault.block, fault.kind) == (3, "changed bytes")
    if by_token:
        assert [*fault.heads] == [0 if heads is None else 2]
        assert [*fault.tokens] == [(7, 8)]
    wrong[scale] ^= 1
    assert witness.restored([3, 4], KEYS[1:3]).faults == []
