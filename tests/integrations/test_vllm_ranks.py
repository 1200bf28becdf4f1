# SPDX-License-Identifier: Apache-2.0
"""vLLM's connector with several workers and engines, without vLLM."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.vllm_stub import configuration
from support.waits import LIMIT

from portakv.copy.layer_words import LayerWords
from portakv.errors import InvalidTerms, StoreBusy
from portakv.integrations import IntegrationError
from portakv.integrations.vllm.caches import (
    FUSED,
    INDEX,
    LATENT,
    Settings,
    parts_of_states,
    settings_of,
)
from portakv.integrations.vllm.ranks import (
    JoinedIndex,
    WorkerStore,
    heads_of,
    index_of,
    read_views,
    stage_of,
)
from portakv.runtime import late_release
from portakv.serving import StoreServer
from portakv.serving.local import GroupView, LocalIndex
from portakv.serving.server import server
from portakv.storage import prefix_keys
from portakv.view import KVView

BLOCKS = 8
SIZE = 16
DIM = 8


@pytest.fixture
def configurations(tmp_path: Path) -> tuple[Any, Any]:
    return configuration(str(tmp_path / "store"), "engine", BLOCKS, SIZE)


def change(configurations: tuple[Any, Any], **terms: Any) -> None:
    """Change vLLM's configuration of parallelism."""
    vars(configurations[0].parallel_config).update(terms)


def extra_terms(configurations: tuple[Any, Any]) -> dict[str, Any]:
    """Return PortaKV's terms, to be changed."""
    terms: dict[str, Any] = configurations[0].kv_transfer_config.kv_connector_extra_config
    return terms


# --- settings


@pytest.mark.parametrize(
    ("terms", "shared", "count", "store_server"),
    [
        ({}, False, 1, False),
        ({}, True, 1, True),
        ({"distributed_executor_backend": "uni"}, False, 1, False),
        ({"distributed_executor_backend": "mp"}, False, 1, True),
        ({"world_size": 4, "tensor_parallel_size": 4}, False, 4, True),
        ({"world_size": 2, "pipeline_parallel_size": 2}, False, 2, True),
        ({"data_parallel_size": 2}, False, 1, True),
    ],
    ids=["one", "shared", "executor uni", "executor mp", "TP 4", "PP 2", "DP 2"],
)
def test_who_uses_a_store_server(
    terms: dict[str, Any],
    shared: bool,
    count: int,
    store_server: bool,
    configurations: tuple[Any, Any],
) -> None:
    change(configurations, **terms)
    extra_terms(configurations)["shared"] = shared
    settings = settings_of(*configurations)
    assert settings.workers.size == count
    assert settings.uses_store_server is store_server
    assert settings.reads_rows is store_server
    assert settings.has_whole_blocks is not store_server


def test_packed_blocks_have_the_size_of_the_engines(configurations: tuple[Any, Any]) -> None:
    """They are read by head and token, also by one worker that has the store itself."""
    terms = extra_terms(configurations)
    terms["encoding"] = "pack"
    settings = settings_of(*configurations)
    assert settings.block_size == SIZE
    assert settings.reads_rows
    assert not settings.uses_store_server
    assert not settings.has_whole_blocks
    terms["block_size"] = SIZE
    assert settings_of(*configurations).block_size == SIZE
    terms["block_size"] = 4 * SIZE
    with pytest.raises(InvalidTerms, match=r"kv_connector_extra_config: .* start the engine with"):
        settings_of(*configurations)


def test_packed_blocks_of_groups_with_other_blocks_are_refused(
    configurations: tuple[Any, Any],
) -> None:
    config, caches = configurations
    extra_terms(configurations)["encoding"] = "pack"
    (group,) = caches.kv_cache_groups
    spec = group.kv_cache_spec
    other = type(spec)(block_size=2 * SIZE, num_kv_heads=1, head_size=1)
    caches.kv_cache_groups.append(SimpleNamespace(kv_cache_spec=other, layer_names=["other"]))
    with pytest.raises(InvalidTerms, match=r"blocks of one size, got \[16, 32\]"):
        settings_of(config, caches)


@pytest.mark.parametrize("number", [0, 1])
def test_copies_of_an_engine_that_know_nothing_of_each_other(
    number: int, configurations: tuple[Any, Any]
) -> None:
    """vLLM gives them the size 1, and appends their number to the engine's name."""
    change(configurations, data_parallel_size=1)
    assert not settings_of(*configurations).uses_store_server
    configurations[0].kv_transfer_config.engine_id = f"engine_dp{number}"
    assert settings_of(*configurations).uses_store_server


@pytest.mark.parametrize(
    ("terms", "says"),
    [
        ({"decode_context_parallel_size": 2}, "2 ranks of decode context parallelism"),
        ({"prefill_context_parallel_size": 2}, "2 ranks of prefill context parallelism"),
        ({"distributed_executor_backend": "ray"}, "executor 'ray'"),
        ({"distributed_executor_backend": "external_launcher"}, "executor 'external_launcher'"),
        ({"nnodes": 2}, "got 2 hosts"),
    ],
    ids=lambda each: next(iter(each)) if isinstance(each, dict) else "",
)
def test_parallelism_that_is_not_served_is_refused(
    terms: dict[str, Any], says: str, configurations: tuple[Any, Any]
) -> None:
    change(configurations, **terms)
    with pytest.raises(IntegrationError, match=says):
        settings_of(*configurations)


def test_several_workers_do_not_load_by_layer(configurations: tuple[Any, Any]) -> None:
    """A worker whose rows have landed would save what it computes with wrong rows of another."""
    change(configurations, world_size=2, tensor_parallel_size=2)
    extra_terms(configurations)["by_layer"] = True
    with pytest.raises(IntegrationError, match="Expected one worker for by_layer, got 2"):
        settings_of(*configurations)


def test_shared_is_true_or_false(configurations: tuple[Any, Any]) -> None:
    extra_terms(configurations)["shared"] = "yes"
    with pytest.raises(InvalidTerms, match=r"kv_connector_extra_config: .*shared"):
        settings_of(*configurations)


# --- heads


@pytest.mark.parametrize(
    ("heads", "parts"),
    [
        (8, [(0, 2, 8), (2, 4, 8), (4, 6, 8), (6, 8, 8)]),
        (4, [(0, 1, 4), (1, 2, 4), (2, 3, 4), (3, 4, 4)]),
        (2, [(0, 1, 2), (0, 1, 2), (1, 2, 2), (1, 2, 2)]),
        (1, [(0, 1, 1)] * 4),
    ],
    ids=["two each", "one each", "pairs have one", "all have one"],
)
def test_heads_of_each_of_four_ranks(heads: int, parts: list[tuple[int, int, int]]) -> None:
    many = parts[0][1] - parts[0][0]
    made = [
        heads_of(of_heads(4, heads), number, GroupView(with_heads(many))) for number in range(4)
    ]
    assert made == parts


def of_heads(ranks: int, heads: int) -> Any:
    """Return vLLM's configuration of a model with so many heads."""
    return SimpleNamespace(
        parallel_config=SimpleNamespace(tensor_parallel_size=ranks),
        model_config=SimpleNamespace(get_total_num_kv_heads=lambda: heads),
    )


def with_heads(heads: int, kv: int = 2) -> Any:
    """Return a view of a rank's caches."""
    return SimpleNamespace(heads=heads, kv=kv)


def test_a_rank_that_has_all_heads() -> None:
    assert heads_of(of_heads(4, 128), 3, GroupView(with_heads(1, kv=1))) is None
    assert heads_of(of_heads(1, 8), 0, GroupView(with_heads(8))) is None
    states = GroupView(with_heads(1, kv=1), "", None)
    assert heads_of(of_heads(4, 8), 3, states) == (3, 4, 4)
    assert heads_of(of_heads(1, 8), 0, states) is None
    assert heads_of(of_heads(4, 8), 3, states._replace(replicated=True)) is None


def test_a_rank_whose_caches_have_other_heads_is_refused() -> None:
    with pytest.raises(IntegrationError, match=r"Expected 2 of the model's 8 .* got 4"):
        heads_of(of_heads(4, 8), 1, GroupView(with_heads(4)))


# --- stages


STAGED = {"world_size": 2, "pipeline_parallel_size": 2}


def stages_of(configurations: tuple[Any, Any], first: int, past: int, of: int) -> Any:
    """Return the configuration of the worker of a stage with layers of a model with so many."""
    change(configurations, **STAGED)
    model = configurations[0].model_config
    model.get_layers_start_end_indices = lambda parallel: (first, past)
    model.get_total_num_hidden_layers = lambda: of
    return configurations[0]


def names_of(*layers: int) -> dict[str, int]:
    """Return the positions of layers by their names, as vLLM gives them."""
    return {f"model.layers.{layer}.self_attn.attn": at for at, layer in enumerate(layers)}


def test_layers_of_a_stage(configurations: tuple[Any, Any]) -> None:
    assert stage_of(configurations[0], names_of(0, 1)) is None
    config = stages_of(configurations, 3, 5, 7)
    assert stage_of(config, names_of(3, 4)) == (3, 5, 7)


@pytest.mark.parametrize(
    "names",
    [
        {},
        names_of(3),
        names_of(4, 3),
        names_of(3, 4, 5),
        names_of(0, 1),
        {**names_of(3, 4), "model.layers.2.self_attn.attn": 0},
        {"model.layers.3.attn": 0, "model.layers.4.part.1.attn": 1},
        {"model.layers.3.attn": 0, "model.attn": 1},
    ],
    ids=["none", "too few", "order", "drafts", "other stage", "shared", "two numbers", "no number"],
)
def test_caches_that_are_not_those_of_a_stage_are_refused(
    names: dict[str, int], configurations: tuple[Any, Any]
) -> None:
    """They would be stored in the place of other layers, or be waited for in vain."""
    config = stages_of(configurations, 3, 5, 7)
    with pytest.raises(IntegrationError, match="one cache for each of the layers 3 to 4 in a"):
        stage_of(config, names)


def test_a_step_that_computes_nothing_does_not_show_that_stages_are_idle(
    configurations: tuple[Any, Any],
) -> None:
    assert settings_of(*configurations).shows_idle
    change(configurations, **STAGED)
    assert not settings_of(*configurations).shows_idle


def test_a_step_that_computes_nothing_does_not_show_that_copies_of_an_engine_are_idle(
    configurations: tuple[Any, Any],
) -> None:
    change(configurations, data_parallel_size=2)
    assert not settings_of(*configurations).shows_idle


def test_stages_of_a_model_with_several_groups_are_refused(
    configurations: tuple[Any, Any],
) -> None:
    change(configurations, **STAGED)
    configurations[1].kv_cache_groups *= 2
    with pytest.raises(IntegrationError, match="Expected one group of layers for pipeline"):
        settings_of(*configurations)


def test_stages_that_draft_tokens_are_refused(configurations: tuple[Any, Any]) -> None:
    configurations[0].speculative_config = object()
    settings_of(*configurations)
    change(configurations, **STAGED)
    with pytest.raises(IntegrationError, match="only the last stage calls the hook wait_for_save"):
        settings_of(*configurations)


def test_stages_of_a_model_that_pools_are_refused(configurations: tuple[Any, Any]) -> None:
    configurations[0].model_config.runner_type = "pooling"
    settings_of(*configurations)
    change(configurations, **STAGED)
    with pytest.raises(IntegrationError, match="only the last stage returns its reports"):
        settings_of(*configurations)


# --- views


def rows(heads: int) -> torch.Tensor:
    """Return the cache of a layer with keys and values by head and token."""
    draw = torch.Generator("cpu").manual_seed(heads)
    shape = (BLOCKS, heads, SIZE, 2 * DIM)
    made: torch.Tensor = torch.randn(shape, generator=draw, dtype=torch.float32, device="cpu")
    return made


def describe(configurations: tuple[Any, Any], heads: int) -> Settings:
    """Describe caches of so many heads, and return the settings."""
    spec = configurations[1].kv_cache_groups[0].kv_cache_spec
    spec.num_kv_heads = heads
    spec.head_size = DIM
    return settings_of(*configurations)


def test_several_workers_need_rows_that_can_be_read(configurations: tuple[Any, Any]) -> None:
    change(configurations, world_size=2, tensor_parallel_size=2)
    settings = describe(configurations, 2)
    caches = {"layer": rows(2)}
    with pytest.raises(IntegrationError, match=r"got other.Backend .*Several workers need it"):
        read_views(settings, caches, configurations[1], {"layer": "other.Backend"})
    ((view, notes, tokens, *_),) = read_views(
        settings, caches, configurations[1], {"layer": FUSED[0]}
    )
    assert (view.heads, tokens, notes) == (2, 1, "")


def test_one_worker_shares_pages_whose_inside_is_not_known(
    configurations: tuple[Any, Any],
) -> None:
    extra_terms(configurations)["shared"] = True
    caches = {"layer": rows(2)}
    settings = describe(configurations, 2)
    (group,) = read_views(settings, caches, configurations[1], {"layer": "other.Backend"})
    assert group.row_tokens == SIZE
    assert group.notes
    extra_terms(configurations)["block_size"] = 32
    settings = describe(configurations, 2)
    with pytest.raises(IntegrationError, match="leave block_size out"):
        read_views(settings, caches, configurations[1], {"layer": "other.Backend"})


# --- stores


def worker_of(
    configurations: tuple[Any, Any], heads: int, total: int, count: int
) -> tuple[Settings, WorkerStore]:
    """Return the settings and the store of a worker with so many heads of the model's."""
    change(configurations, world_size=count, tensor_parallel_size=count)
    extra_terms(configurations)["block_size"] = SIZE
    configurations[0].model_config.get_total_num_kv_heads = lambda: total
    settings = describe(configurations, heads)
    return settings, WorkerStore(settings, configurations[0])


def view_of(configurations: tuple[Any, Any], settings: Settings, cache: torch.Tensor) -> GroupView:
    caches = {"layer": cache}
    (group,) = read_views(settings, caches, configurations[1], {"layer": FUSED[0]})
    return group


def test_blocks_of_two_ranks_are_loaded_by_one(
    configurations: tuple[Any, Any], tmp_path: Path
) -> None:
    """And by an engine of another name, which only joins."""
    keys = prefix_keys(range(4 * SIZE), block_size=SIZE)
    caches = [rows(2), rows(2) + 7]
    (settings, first), (_, second) = (worker_of(configurations, 2, 4, 2) for _ in caches)
    views = [view_of(configurations, settings, cache) for cache in caches]
    parts: list[Any] = [first.open([views[0]], 0)[0], second.open([views[1]], 1)[0]]
    index = index_of(settings)
    assert isinstance(index, JoinedIndex)
    assert index.store_server.serves
    assert first.wait(LIMIT)
    assert second.wait(LIMIT)
    saves = [
        part.save(view, [1, 3, 5, 6], keys) for part, (view, *_) in zip(parts, views, strict=True)
    ]
    for save in saves:
        save.synchronize(LIMIT)
        assert save.landed.all()

    other = configuration(str(tmp_path / "store"), "other", BLOCKS, SIZE)
    extra_terms(other)["shared"] = True
    settings, alone = worker_of(other, 4, 4, 1)
    cache = torch.zeros(BLOCKS, 4, SIZE, 2 * DIM, dtype=torch.float32, device="cpu")
    group = view_of(other, settings, cache)
    blocks: Any = alone.open([group], 0)[0]
    joined = index_of(settings)
    assert isinstance(joined, JoinedIndex)
    assert not joined.store_server.serves
    assert alone.wait(LIMIT)
    assert joined.leading(keys) == 4
    load = blocks.load(group.view, [0, 2, 4, 7], keys, deadline=LIMIT)
    load.synchronize(LIMIT)
    whole = torch.cat(caches, dim=1)
    assert torch.equal(cache[[0, 2, 4, 7]], whole[[1, 3, 5, 6]])
    for each in (alone, joined, first, second, index):
        each.close()


def test_blocks_of_two_stages_are_loaded_by_two_ranks(
    configurations: tuple[Any, Any], tmp_path: Path
) -> None:
    """Stages of a model with 2 layers and 4 heads, then ranks, which have both layers."""
    keys = prefix_keys(range(4 * SIZE), block_size=SIZE)
    caches = [rows(4), rows(4) + 7]
    extra_terms(configurations)["block_size"] = SIZE
    configurations[0].model_config.get_total_num_kv_heads = lambda: 4
    clients = list[WorkerStore]()
    saves = []
    for number, cache in enumerate(caches):
        config = stages_of(configurations, number, number + 1, 2)
        settings = describe(configurations, 4)
        client = WorkerStore(settings, config)
        view = view_of(configurations, settings, cache)
        part: Any = client.open([view], 0, names_of(number))[0]
        clients.append(client)
        saves.append((part, view))
    index = index_of(settings)
    assert isinstance(index, JoinedIndex)
    assert all(client.wait(LIMIT) for client in clients)
    for save in [part.save(view.view, [1, 3, 5, 6], keys) for part, view in saves]:
        save.synchronize(LIMIT)
        assert save.landed.all()

    ranks = configuration(str(tmp_path / "store"), "ranks", BLOCKS, SIZE)
    names = [*names_of(0, 1)]
    ranks[1].kv_cache_groups[0].layer_names = names
    for number in range(2):
        settings, rank = worker_of(ranks, 2, 4, 2)
        shape = (BLOCKS, 2, SIZE, 2 * DIM)
        both = [torch.zeros(shape, dtype=torch.float32, device="cpu") for _ in names]
        kernels = dict.fromkeys(names, FUSED[0])
        (group,) = read_views(settings, dict(zip(names, both, strict=True)), ranks[1], kernels)
        blocks: Any = rank.open([group], number, names_of(0, 1))[0]
        clients.append(rank)
        assert rank.wait(LIMIT)
        load = blocks.load(group.view, [0, 2, 4, 7], keys, deadline=LIMIT)
        load.synchronize(LIMIT)
        for stored, cache in zip(caches, both, strict=True):
            part = stored[[1, 3, 5, 6], 2 * number : 2 * number + 2]
            assert torch.equal(cache[[0, 2, 4, 7]], part)
    for client in clients:
        client.close()
    index.close()


@pytest.mark.parametrize("packed", [False, True])
def test_latent_rows_are_equal_in_all_ranks(configurations: tuple[Any, Any], packed: bool) -> None:
    """Also those of ``fp8_ds_mla``."""
    change(configurations, world_size=2, tensor_parallel_size=2)
    spec = configurations[1].kv_cache_groups[0].kv_cache_spec
    spec.num_kv_heads = 1
    spec.head_size = 32
    configurations[0].model_config.get_total_num_kv_heads = lambda: 16
    settings = settings_of(*configurations)
    cache = torch.zeros(BLOCKS, SIZE, 32, dtype=torch.float32, device="cpu")
    if packed:
        spec.state_content_bytes = 656
        cache = torch.zeros(BLOCKS, SIZE, 656, dtype=torch.uint8, device="cpu")
    views = read_views(settings, {"layer": cache}, configurations[1], {"layer": LATENT[-2]})
    stores = [WorkerStore(settings, configurations[0]) for _ in range(2)]
    forms = [store.open(views, number)[0].form for number, store in enumerate(stores)]
    assert forms[0] == forms[1]
    assert forms[0].heads == (0, 1, 1)
    for store in stores:
        store.close()


INDEXED = ["model.layers.0.self_attn.attn", "model.layers.0.self_attn.indexer.k_cache"]


def pages(rows: torch.Tensor, size: int) -> torch.Tensor:
    """Return blocks of an index, whose keys of a block lie before their scales.

    ``rows``: uint8 ``[tokens, 132]``.
    """
    blocks = rows.view(-1, size, 132)
    parts = [blocks[:, :, :128].flatten(1), blocks[:, :, 128:].flatten(1)]
    return torch.cat(parts, 1).view(-1, size, 132)


def open_indexed(
    folder: Path, engine: str, number: int, count: int, size: int, caches: list[torch.Tensor]
) -> tuple[Settings, WorkerStore, list[GroupView], list[Any]]:
    """Open the store of a rank with latent rows and their index, in blocks of a size."""
    config, groups = configuration(str(folder), engine, len(caches[0]), size)
    vars(config.parallel_config).update(world_size=count, tensor_parallel_size=count)
    extra = config.kv_transfer_config.kv_connector_extra_config
    room = {"host": 4 << 20, "staging": 4 << 20, "capacity": 8 << 20}
    extra |= {"shared": True, "block_size": 32, **room}
    (group,) = groups.kv_cache_groups
    group.layer_names = INDEXED
    one = {"block_size": size, "num_kv_heads": 1}
    latent = type(group.kv_cache_spec)(**one, head_size=576, state_content_bytes=656)
    index = type(group.kv_cache_spec)(**one, head_size=132)
    group.kv_cache_spec = latent  # a scheduler has the kind of one layer
    scheduled = settings_of(config, groups)
    specs = dict(zip(INDEXED, (latent, index), strict=True))
    group.kv_cache_spec = SimpleNamespace(kv_cache_specs=specs)
    settings = settings_of(config, groups)
    assert settings.parts == scheduled.parts == (2,)
    kernels = dict(zip(INDEXED, (LATENT[-2], INDEX), strict=True))
    views = read_views(settings, dict(zip(INDEXED, caches, strict=True)), groups, kernels)
    worker = WorkerStore(settings, config)
    return settings, worker, views, [*worker.open(views, number)]


@pytest.mark.parametrize("control", ["", "left out", "shifted"])
def test_latent_rows_and_their_index_are_stored_by_ranks(control: str, tmp_path: Path) -> None:
    """Two ranks store them in blocks of 16 tokens, and one worker loads them in blocks of 32.

    The controls: an index that is left out makes no hit, and one of other tokens is seen.
    """
    draw = torch.Generator().manual_seed(0)
    latent, index = (
        torch.randint(256, (128, wide), dtype=torch.uint8, generator=draw) for wide in (656, 132)
    )
    keys = prefix_keys(range(128), block_size=32)
    folder = tmp_path / "store"
    stored = index.roll(1, 0) if control == "shifted" else index
    caches = [latent.view(8, 16, 656), pages(stored, 16)]
    first = [open_indexed(folder, "a", number, 2, 16, caches) for number in range(2)]
    scheduler = index_of(first[0][0])
    assert isinstance(scheduler, JoinedIndex)
    assert all(worker.wait(LIMIT) for _, worker, *_ in first)
    saves = list[Any]()
    for _, _, views, parts in first:
        both = [*zip(views, parts, strict=True)]
        some = both[:1] if control == "left out" else both
        saves += [part.save(view.view, [*range(8)], keys) for view, part in some]
    for save in saves:
        save.synchronize(LIMIT)
        assert save.landed.all()

    target = [torch.zeros(4, 32, wide, dtype=torch.uint8) for wide in (656, 132)]
    settings, worker, views, parts = open_indexed(folder, "b", 0, 1, 32, target)
    joined = index_of(settings)
    assert isinstance(joined, JoinedIndex)
    assert worker.wait(LIMIT)
    assert joined.leading(keys) == (0 if control == "left out" else 4)
    if control != "left out":
        for view, part in zip(views, parts, strict=True):
            load = part.load(view.view, [2, 0, 3, 1], keys, deadline=LIMIT)
            load.synchronize(LIMIT)
            assert load.landed.all()
        assert torch.equal(target[0][[2, 0, 3, 1]], latent.view(4, 32, 656))
        same = torch.equal(target[1][[2, 0, 3, 1]], pages(index, 32))
        assert same == (control == "")
    opened: list[Any] = [worker, *(one[1] for one in first), joined, scheduler]
    for each in opened:
        each.close()


def test_one_worker_has_its_own_store(configurations: tuple[Any, Any]) -> None:
    settings, store = worker_of(configurations, 2, 2, 1)
    assert not store.wait(0)
    assert isinstance(index_of(settings), LocalIndex)
    store.open([view_of(configurations, settings, rows(2))], 0)
    assert store.wait(0)
    store.close()
    assert not store.wait(0)


def test_a_shared_engine_with_the_folder_of_one_that_is_not(
    configurations: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "BUSY", 0.1)
    settings, alone = worker_of(configurations, 2, 2, 1)
    alone.open([view_of(configurations, settings, rows(2))], 0)
    extra_terms(configurations)["shared"] = True
    settings, shared = worker_of(configurations, 2, 2, 1)
    shared.open([view_of(configurations, settings, rows(2))], 0)
    with StoreServer(settings.store, settings.engine):
        with pytest.raises(InvalidTerms, match="set shared to true in each engine"):
            shared.wait(LIMIT)
        shared.close()
    alone.close()


def test_an_engine_whose_worker_is_refused_starts_at_once(
    configurations: tuple[Any, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Another engine serves the folder with blocks of another size."""
    extra_terms(configurations)["shared"] = True
    settings, first = worker_of(configurations, 2, 2, 1)
    first.open([view_of(configurations, settings, rows(2))], 0)
    serving = index_of(settings)
    assert isinstance(serving, JoinedIndex)
    other = configuration(str(tmp_path / "store"), "other", BLOCKS, SIZE)
    extra_terms(other)["shared"] = True
    settings, second = worker_of(other, 4, 4, 1)
    second.open([view_of(other, settings, rows(4))], 0)
    index = index_of(settings)
    assert isinstance(index, JoinedIndex)
    assert index.leading([bytes(32)]) == 0
    assert not any("No worker has joined" in line for line in caplog.messages)
    assert any("Nothing is stored or loaded" in line for line in caplog.messages)
    with pytest.raises(InvalidTerms):
        second.wait(LIMIT)
    for each in (second, index, first, serving):
        each.close()


def test_a_busy_folder_names_the_term_that_shares_it(tmp_path: Path) -> None:
    settings = []
    indices = []
    view = KVView(
        [torch.zeros(BLOCKS, 2, SIZE, 1, DIM, device="cpu")], "layer | block kv token head dim"
    )
    for name in ("busy one", "busy other"):
        settings.append(settings_of(*configuration(str(tmp_path / "store"), name, BLOCKS, SIZE)))
        indices.append(LocalIndex.of(name))
    indices[0].open([GroupView(view)], settings[0].store, "model", None)
    with pytest.raises(StoreBusy, match="set shared to true in each engine"):
        indices[1].open([GroupView(view)], settings[1].store, "model", None, patience=0)
    indices[0].close()


# --- hand-over


class Attention:
    """A layer of attention by a backend of a name."""

    def __init__(self, module: str) -> None:
        self.backend = type("FlashAttentionBackend", (), {"__module__": module})

    def get_attn_backend(self) -> type:
        return self.backend


READABLE = "vllm.v1.attention.backends.flash_attn"


def handing(configurations: tuple[Any, Any], module: str, **parallel: Any) -> WorkerStore:
    """Return the store of a worker with two heads of four, whose engine offers rows."""
    config = configurations[0]
    config.kv_transfer_config.kv_role = "kv_producer"
    context = {"layer": Attention(module)}
    config.compilation_config = SimpleNamespace(static_forward_context=context)
    settings, store = worker_of(configurations, 2, 4, 2)
    change(configurations, **parallel)
    assert settings.handing is not None
    return store


@pytest.mark.parametrize("number", [0, 1])
def test_a_rank_hands_over_its_heads(number: int, configurations: tuple[Any, Any]) -> None:
    store = handing(configurations, READABLE, rank=number)
    store.hand_over({"layer": rows(2)}, configurations[1], number, {"layer": 0})
    handover = store.handover
    assert handover is not None
    assert handover.owner is not None
    assert handover.reader is None
    (shard,) = handover.owner.shards
    assert shard.group.heads == (2 * number, 2 * number + 2, 4)
    store.close()
    assert store.handover is None


def layer_by(kernel: str) -> SimpleNamespace:
    """Return a layer of an attention backend."""
    module, _, name = kernel.rpartition(".")
    backend = type(name, (), {"__module__": module})
    return SimpleNamespace(get_attn_backend=lambda: backend)


@pytest.mark.parametrize("numbers", ["auto", "mxfp4"])
def test_latent_rows_are_handed_over_with_their_index(
    numbers: str, configurations: tuple[Any, Any]
) -> None:
    """Every rank has all of both. The control: an index whose keys have 4 bits is refused."""
    store = handing(configurations, READABLE, rank=1)
    layers = {"layer": layer_by(LATENT[-2]), "index": layer_by(INDEX)}
    configurations[0].compilation_config.static_forward_context = layers
    configurations[0].attention_config = SimpleNamespace(indexer_kv_dtype=numbers)
    group = configurations[1].kv_cache_groups[0]
    one = {"block_size": SIZE, "num_kv_heads": 1}
    latent = SimpleNamespace(**one, head_size=576, state_content_bytes=656)
    group.layer_names = ["layer", "index"]
    group.kv_cache_spec = SimpleNamespace(
        kv_cache_specs={"layer": latent, "index": SimpleNamespace(**one, head_size=132)}
    )
    widths = {"layer": 656, "index": 132}
    caches = {
        name: torch.zeros(BLOCKS, 1, SIZE, wide, dtype=torch.uint8, device="cpu")
        for name, wide in widths.items()
    }
    if numbers != "auto":
        with pytest.raises(IntegrationError, match="IndexerBackend mxfp4"):
            store.hand_over(caches, configurations[1], 1, {"layer": 0, "index": 1})
        return
    store.hand_over(caches, configurations[1], 1, {"layer": 0, "index": 1})
    assert store.handover is not None
    assert store.handover.owner is not None
    shards = store.handover.owner.shards
    assert [shard.view.widths for shard in shards] == [(656,), (128, 4)]
    assert [shard.group.heads for shard in shards] == [(0, 1, 1)] * 2
    store.close()


def test_rows_that_cannot_be_read_are_not_handed_over(configurations: tuple[Any, Any]) -> None:
    store = handing(configurations, "other")
    with pytest.raises(IntegrationError, match="Engines that hand requests over need it"):
        store.hand_over({"layer": rows(2)}, configurations[1], 0, {"layer": 0})
    assert store.handover is None


def test_engines_by_other_scales_have_other_models(configurations: tuple[Any, Any]) -> None:
    """So that they take no rows of each other, and store others."""
    names = set[str]()
    forms = set[Any]()
    for scale in (0.5, 0.25):
        store = handing(configurations, READABLE)
        layers = configurations[0].compilation_config.static_forward_context
        vars(layers["layer"]).update(_k_scale=torch.tensor(scale))
        store.hand_over({"layer": rows(2)}, configurations[1], 0, {"layer": 0})
        view = GroupView(KVView(rows(2), "block head token dim"))
        forms.add(store.open([view], 0)[0].form)
        assert store.handover is not None
        names.add(store.handover.model)
        store.close()
    assert len(names) == len(forms) == 2


def test_an_engine_that_hands_nothing_over(configurations: tuple[Any, Any]) -> None:
    store = WorkerStore(settings_of(*configurations), configurations[0])
    store.hand_over({"layer": rows(2)}, configurations[1], 0, {"layer": 0})
    assert store.handover is None


def test_a_worker_that_closes_ends_the_waits_of_graphs(configurations: tuple[Any, Any]) -> None:
    store = WorkerStore(settings_of(*configurations), configurations[0])
    store.words = words = LayerWords(torch.device("cpu"), 1)
    words.begin()
    store.close()
    words.wait(0)  # without a word it would take a minute
    assert words.expired
    assert not late_release.is_held()


# --- states of recurrent layers

#: Heads of values or of the state, the width of one, the width of a key or of a projection, and
#: heads of keys or groups.
HEADS = 4
WIDE = 8
STATE = 4
STEPS = 3


class MambaSpec(SimpleNamespace):
    """States of recurrent layers, with the attributes that are read."""


class Whole:
    """The states of a model with one rank, and what each of several ranks has of them."""

    def __init__(self, kind: str, groups: int) -> None:
        self.kind = kind
        self.groups = groups
        draw = torch.Generator().manual_seed(0)
        both = [torch.randn(BLOCKS, STEPS, groups, STATE, generator=draw) for _ in range(2)]
        inner = torch.randn(BLOCKS, STEPS, HEADS, WIDE, generator=draw)
        self.conv = [*both, inner] if kind == "GDN_ATTN" else [inner, *both]
        self.ssm = torch.randn(BLOCKS, HEADS, WIDE, STATE, generator=draw)

    def cache(self, rank: int, size: int, empty: bool = False) -> tuple[list[torch.Tensor], Any]:
        """Return the states of a rank as vLLM has them, in longer pages, and their spec."""
        some = [self.of_rank(each, 2, rank, size).flatten(2) for each in self.conv]
        conv = torch.cat(some, 2).to(torch.bfloat16)
        ssm = self.of_rank(self.ssm, 1, rank, size)
        first = conv[0].numel() * 2
        memory = torch.zeros(BLOCKS, first + ssm[0].numel() * 4 + 64, dtype=torch.uint8)
        page = memory.shape[1]
        made = [
            memory.view(torch.bfloat16).as_strided(conv.shape, (page // 2, conv.shape[2], 1)),
            memory.view(torch.float32).as_strided(
                ssm.shape, (page // 4, WIDE * STATE, STATE, 1), first // 4
            ),
        ]
        if not empty:
            made[0].copy_(conv)
            made[1].copy_(ssm)
        spec = MambaSpec(
            block_size=SIZE,
            shapes=(tuple(conv.shape[1:]), tuple(ssm.shape[1:])),
            dtypes=(torch.bfloat16, torch.float32),
            mamba_cache_mode="align",
            mamba_type=SimpleNamespace(name=self.kind),
        )
        return made, spec

    def of_rank(self, whole: torch.Tensor, axis: int, rank: int, size: int) -> torch.Tensor:
        """Return the heads of a rank; with fewer groups than ranks some have the same one."""
        count = whole.shape[axis]
        return whole.narrow(axis, rank * count // size, max(1, count // size))


def open_worker(
    folder: Path, engine: str, whole: Whole, rank: int, size: int, empty: bool = False
) -> tuple[Settings, WorkerStore, list[GroupView], list[Any], list[torch.Tensor]]:
    """Open the store of a worker, whose model has a group of states and one of rows."""
    config, caches = configuration(str(folder), engine, BLOCKS, SIZE)
    vars(config.parallel_config).update(world_size=size, tensor_parallel_size=size)
    extra = config.kv_transfer_config.kv_connector_extra_config
    room = {"host": 4 << 20, "staging": 4 << 20, "capacity": 8 << 20}
    extra |= {"shared": True, "block_size": SIZE, **room}
    config.model_config.get_total_num_kv_heads = lambda: HEADS
    config.model_config.hf_text_config = SimpleNamespace(n_groups=whole.groups)
    states, spec = whole.cache(rank, size, empty)
    group = SimpleNamespace(kv_cache_spec=spec, layer_names=["states"])
    caches.kv_cache_groups.insert(0, group)
    vars(caches.kv_cache_groups[1].kv_cache_spec).update(num_kv_heads=HEADS // size, head_size=DIM)
    caches.kv_cache_groups[1].layer_names = ["rows"]
    settings = settings_of(config, caches)
    tensors: dict[str, Any] = {"states": states, "rows": rows(HEADS // size)}
    kernels = {"rows": FUSED[0], "states": ""}
    views = read_views(settings, tensors, caches, kernels)
    worker = WorkerStore(settings, config)
    parts = [*worker.open(views, rank)]
    return settings, worker, views, parts, states


@pytest.mark.parametrize(("stored", "loaded"), [(2, 1), (1, 2), (4, 2), (2, 4), (2, 2)])
@pytest.mark.parametrize(
    ("kind", "groups"), [("GDN_ATTN", 4), ("MAMBA2", 4), ("MAMBA2", 1)], ids=str
)
def test_states_of_other_numbers_of_ranks_are_found(
    kind: str, groups: int, stored: int, loaded: int, tmp_path: Path
) -> None:
    """Each part by its heads: of the convolution by channels, and recurrent ones."""
    whole = Whole(kind, groups)
    keys = prefix_keys(range(2 * SIZE), block_size=SIZE)
    first = [open_worker(tmp_path / "store", "a", whole, n, stored) for n in range(stored)]
    settings = first[0][0]
    assert settings.parts == (4, 1)
    index = index_of(settings)
    assert isinstance(index, JoinedIndex)
    assert all(worker.wait(LIMIT) for _, worker, *_ in first)
    saves = list[Any]()
    for _, _, views, parts, _ in first:
        assert [view.group for view in views] == [0, 0, 0, 0, 1]
        both = zip(views, parts, strict=True)
        saves += [part.save(view.view, [5, 2], keys) for view, part in both]
    for save in saves:
        save.synchronize(LIMIT)
        assert save.landed.all()
    second = [
        open_worker(tmp_path / "store", "b", whole, n, loaded, empty=True) for n in range(loaded)
    ]
    joined = index_of(second[0][0])
    assert isinstance(joined, JoinedIndex)
    assert all(worker.wait(LIMIT) for _, worker, *_ in second)
    assert joined.leading(keys) == 2
    for rank, (_, _, views, parts, states) in enumerate(second):
        for view, part in zip(views, parts, strict=True):
            load = part.load(view.view, [1, 7], keys, deadline=LIMIT)
            load.synchronize(LIMIT)
            assert load.landed.all()
        expected, _ = whole.cache(rank, loaded)
        for made, right in zip(states, expected, strict=True):
            assert torch.equal(made[[1, 7]], right[[5, 2]])
            assert not made[[0, 2, 3]].any()
    for _, worker, *_ in [*first, *second]:
        worker.close()
    joined.close()
    index.close()


def test_states_that_are_not_divided() -> None:
    whole = Whole("GDN_ATTN", 4)
    _, spec = whole.cache(0, 1)
    assert len(parts_of_states(spec)) == 4
    for change in (
        {"mamba_type": SimpleNamespace(name="MAMBA1")},
        {"tp_replicated": True},
        {"shapes": (spec.shapes[0],)},
        {"shapes": (spec.shapes[0][::-1], spec.shapes[1])},
        {"shapes": ((STEPS, 5), spec.shapes[1])},
    ):
        assert parts_of_states(MambaSpec(**{**vars(spec), **change})) == []
