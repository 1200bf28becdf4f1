# SPDX-License-Identifier: Apache-2.0
"""vLLM's connector: what it reads of an engine, and walks through its hooks without vLLM."""

from __future__ import annotations

import ast
import json
import os
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import ready
from support.vllm_stub import SlidingWindowSpec, configuration, write_vllm
from support.waits import LIMIT

from portakv import copy_blocks, copy_rows
from portakv.errors import InvalidTerms
from portakv.integrations import IntegrationError
from portakv.integrations.vllm.caches import (
    AMX,
    BY_DIM,
    BY_TOKEN,
    FUSED,
    INDEX,
    LATENT,
    REFUSED,
    Workers,
    groups_of,
    ids_of,
    is_wanted,
    kernels_of,
    leave_last_token,
    needs_all_tokens,
    never_fails,
    parameters_for,
    remote_rows_of,
    scales_of,
    settings_of,
    share_caches,
    view_across_layers,
    views_of,
    warn_of_policy,
    whole_blocks,
    worker_numbers,
)
from portakv.integrations.vllm.ranks import (
    check_kinds,
    heads_of,
    index_of,
    read_views,
    words_of,
)
from portakv.serving import Group
from portakv.serving.handover import Identity
from portakv.serving.local import GroupView, LocalIndex, StoreTerms, forms_of
from portakv.serving.plan import RemoteRows
from portakv.storage import prefix_keys
from portakv.view import KVView

TESTS = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(("store", "walks", "least"), [("alone", 16, 5), ("shared", 8, 0)])
def test_walks_through_the_hooks_of_an_engine(
    store: str, walks: int, least: int, tmp_path: Path
) -> None:
    """Rows of real caches; requests come, load, run, are preempted, end and are aborted."""
    write_vllm(tmp_path)
    paths = [str(tmp_path), str(TESTS), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = ready.run(
        "-m",
        "support.vllm_hooks",
        str(tmp_path),
        "0",
        f"{walks}",
        store,
        env=environment,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stderr
    counts = ast.literal_eval(done.stdout)
    assert counts["saves"] > 2 * walks
    assert counts["landed_blocks"] > least
    # The process that has the store reports its tiers: the worker's, or the server's, whose figures
    # are asked for from time to time, and may be older.
    least_seen = counts["stored_blocks"] if store == "alone" else 1
    assert counts["tier_blocks/disk/save/hit"] >= least_seen > 0
    assert counts["tier_bytes/disk/save"] > 0


def test_layers_of_graphs_wait_by_words(tmp_path: Path) -> None:
    """No piecewise graphs then; the hooks of layers are called while graphs are captured alone."""
    write_vllm(tmp_path)
    paths = [str(tmp_path), str(TESTS), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = ready.run(
        "-m", "support.vllm_graph_hooks", str(tmp_path / "store"), env=environment, timeout=LIMIT
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "waits by words": True,
        "metadata": [False, False],
        "piecewise": [False, True, False],
        "seen": [[0], [1], [2]],
    }


def test_a_device_without_waits_in_graphs_is_named() -> None:
    view: Any = SimpleNamespace(device=torch.device("meta"), layers=2)
    with pytest.raises(IntegrationError, match=r'for by_layer "graph": .*Pass true'):
        words_of([GroupView(view)], StoreTerms(host=1 << 20, by_layer="graph"))


def test_values_of_by_layer() -> None:
    assert not StoreTerms(by_layer=True).waits_in_graphs
    with pytest.raises(InvalidTerms, match='True, False or "graph", got'):
        StoreTerms.of({"by_layer": "graphs"})


@pytest.fixture
def configurations(tmp_path: Path) -> tuple[Any, Any]:
    return configuration(str(tmp_path / "store"), "engine", 8, 16)


def test_what_a_configuration_says(configurations: tuple[Any, Any], tmp_path: Path) -> None:
    settings = settings_of(*configurations)
    assert settings.engine == "engine"
    assert settings.model == f"model:None:None:auto:{sha256(b'').hexdigest()[:16]}:"
    assert settings.block_size == 64
    assert settings.store.folder == str(tmp_path / "store")
    assert settings.groups == (Group(16),)
    assert not settings.fails_by_request


def test_a_folder_of_a_model_has_one_name(
    configurations: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two engines that name it by other paths serve one model."""
    folder = tmp_path / "weights"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    names = set()
    for path in ("weights", "./weights", str(folder)):
        configurations[0].model_config.model = path
        text = json.dumps({"_name_or_path": path, "layers": 2}, indent=2)
        configurations[0].model_config.hf_config = SimpleNamespace(
            to_json_string=lambda use_diff, text=text: text
        )
        names.add(settings_of(*configurations).model)
    assert len(names) == 1
    configurations[0].model_config.model = "other"
    assert settings_of(*configurations).model.startswith("other:")


@pytest.mark.parametrize("name", [*REFUSED, "NewAttentionSpec"])
def test_kinds_of_layers_that_are_not_served_are_named(
    name: str, configurations: tuple[Any, Any]
) -> None:
    spec = type(name, (SimpleNamespace,), {})(block_size=16)
    configurations[1].kv_cache_groups.append(SimpleNamespace(kv_cache_spec=spec))
    reason = REFUSED.get(name, "this kind is not known")
    with pytest.raises(IntegrationError, match=rf"got {name} \({reason}\)\. Choose the Offloading"):
        settings_of(*configurations)


class SlidingWindowMLASpec(SimpleNamespace):
    """Latent rows of the last tokens, with the attributes that are read."""


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tokens_per_state": 4, "model_version": "deepseek_v4"}, "several tokens"),
        ({"compress_ratio": 4}, "several tokens"),
        ({"model_version": "deepseek_v4"}, "deepseek_v4 keep rows and their scales apart"),
        ({"bounded_replay": True}, "computes their windows again"),
    ],
    ids=str,
)
def test_windows_of_latent_rows(
    change: dict[str, Any], says: str, configurations: tuple[Any, Any]
) -> None:
    """Served as other windows, unless a row is more than the row of a token."""
    more = {"tokens_per_state": 1, "model_version": None, "bounded_replay": False}
    spec = SlidingWindowMLASpec(block_size=16, sliding_window=64, extra_retained_tokens=8, **more)
    groups = configurations[1].kv_cache_groups
    groups.append(SimpleNamespace(kv_cache_spec=spec, layer_names=[]))
    assert settings_of(*configurations).groups == (Group(16), Group(16, 72))
    vars(spec).update(change)
    with pytest.raises(IntegrationError, match=rf"got SlidingWindowMLASpec \(.*{says}"):
        settings_of(*configurations)


def test_latent_rows_of_a_window_are_read_by_token() -> None:
    """Rows of two groups of one width, from blocks of 16 tokens to blocks of 32. The control: the
    window's rows of a token before."""
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(256, (2, 128, 64), dtype=torch.uint8, generator=draw)

    def views(size: int, both: torch.Tensor) -> list[GroupView]:
        terms = {"block_size": size, "num_kv_heads": 1, "head_size": 32}
        specs = (SimpleNamespace(**terms), SlidingWindowMLASpec(**terms, sliding_window=64))
        groups = [
            SimpleNamespace(kv_cache_spec=spec, layer_names=[name])
            for spec, name in zip(specs, "ab", strict=True)
        ]
        tensors = both.view(torch.bfloat16).view(2, -1, size, 32)
        caches = SimpleNamespace(num_blocks=128 // size, kv_cache_groups=groups)
        named = dict(zip("ab", tensors, strict=True))
        return views_of(named, caches, dict.fromkeys("ab", LATENT[1]), BY_TOKEN)

    target = torch.zeros_like(rows)
    order = torch.randperm(128, generator=draw)
    for src, dst in zip(views(16, rows), views(32, target), strict=True):
        copy_rows(src.view, dst.view, order, torch.arange(128)).synchronize()
    assert torch.equal(target, rows[:, order])
    assert not torch.equal(target[1], rows[1, order - 1])


def test_every_kind_of_a_group_of_unequal_widths_is_checked(
    configurations: tuple[Any, Any],
) -> None:
    class RSWASpec(SimpleNamespace):
        pass

    group = configurations[1].kv_cache_groups[0]
    specs = {"a": group.kv_cache_spec, "b": RSWASpec(block_size=16)}
    group.kv_cache_spec = SimpleNamespace(kv_cache_specs=specs)
    with pytest.raises(IntegrationError, match="got RSWASpec"):
        settings_of(*configurations)
    specs["b"] = specs["a"]
    assert settings_of(*configurations).groups == (Group(16),)


class MambaSpec(SimpleNamespace):
    """States of recurrent layers, with the attributes that are read."""


def states(size: int = 64, mode: str = "align", **more: Any) -> Any:
    spec = MambaSpec(block_size=size, mamba_cache_mode=mode, **more)
    return SimpleNamespace(kv_cache_spec=spec, layer_names=[])


@pytest.mark.parametrize(
    ("mode", "tells", "kept"),
    [("align", False, "last"), ("align", True, "told"), ("all", False, "every")],
)
def test_groups_with_states(
    configurations: tuple[Any, Any], mode: str, tells: bool, kept: Any
) -> None:
    configurations[1].kv_cache_groups.append(states(mode=mode))
    settings = settings_of(*configurations, tells)
    assert settings.groups == (Group(16), Group(64, states=kept))
    assert settings.block_size == 64
    assert settings.fails_by_request


@pytest.mark.parametrize(
    ("group", "change", "says"),
    [
        (states(mode="none"), {}, "got the mode 'none'"),
        (states(num_speculative_blocks=1), {}, "without num_speculative_blocks, got 1"),
        (
            states(),
            {"bucket": "memory:///", "shared": True},
            "Expected no bucket in the store of a host",
        ),
        (states(), {"block_size": 32}, "of a multiple of 64 tokens"),
    ],
)
def test_what_states_cannot_be_stored_by_is_named(
    configurations: tuple[Any, Any], group: Any, change: dict[str, Any], says: str
) -> None:
    config, caches = configurations
    caches.kv_cache_groups.append(group)
    if "hand_over" in change:
        config.kv_transfer_config.kv_role = "kv_producer"
    config.kv_transfer_config.kv_connector_extra_config |= change
    with pytest.raises((IntegrationError, InvalidTerms), match=says):
        settings_of(config, caches)


@pytest.mark.parametrize(
    ("rows", "speculates", "says"),
    [
        (True, False, ""),
        (True, True, "got speculative decoding"),
        (False, False, "got states alone"),
    ],
)
def test_states_that_cannot_be_handed_over_are_named(
    configurations: tuple[Any, Any], rows: bool, speculates: bool, says: str
) -> None:
    config, caches = configurations
    caches.kv_cache_groups[:] = [*caches.kv_cache_groups[: int(rows)], states()]
    config.speculative_config = object() if speculates else None
    config.kv_transfer_config.kv_role = "kv_producer"
    config.kv_transfer_config.kv_connector_extra_config = {}
    if not says:
        assert settings_of(config, caches).handing is not None
        return
    with pytest.raises(IntegrationError, match=says):
        settings_of(config, caches)


class Asked(SimpleNamespace):
    """A request of vLLM, with what is read and changed of one."""

    def __init__(self, tokens: list[int], **params: bool) -> None:
        more: dict[str, Any] = {"_all_token_ids": [*tokens], "kv_transfer_params": params}
        count = len(tokens)
        super().__init__(prompt_token_ids=tokens, num_prompt_tokens=count, max_tokens=9, **more)


@pytest.mark.parametrize(
    ("tokens", "params", "left"),
    [
        ([1, 2, 3], {"do_remote_decode": True}, [1, 2]),
        ([1], {"do_remote_decode": True}, [1]),
        ([1, 2, 3], {"do_remote_prefill": True}, [1, 2, 3]),
        ([1, 2, 3], {}, [1, 2, 3]),
    ],
    ids=["", "one token", "of another engine", "of this engine"],
)
def test_the_last_token_is_left_to_the_other_engine(
    tokens: list[int], params: dict[str, bool], left: list[int]
) -> None:
    """The list of the prompt is the front end's, which shows it to the user."""
    request = Asked(tokens, **params)
    front = [*tokens]
    leave_last_token(request)
    assert request.prompt_token_ids == vars(request)["_all_token_ids"] == left
    assert request.num_prompt_tokens == len(left)
    assert request.max_tokens == (9 if len(left) == len(tokens) else 1)
    assert tokens == front


def test_groups_with_chunks(configurations: tuple[Any, Any]) -> None:
    class ChunkedLocalAttentionSpec(SimpleNamespace):
        pass

    spec = ChunkedLocalAttentionSpec(block_size=16, attention_chunk_size=32)
    configurations[1].kv_cache_groups.append(SimpleNamespace(kv_cache_spec=spec, layer_names=[]))
    settings = settings_of(*configurations)
    assert settings.groups == (Group(16), Group(16, chunk=32))
    assert settings.block_size == 16
    terms = configurations[0].kv_transfer_config.kv_connector_extra_config
    terms["block_size"] = 64
    with pytest.raises(InvalidTerms, match="a divisor of 32 tokens, the chunk"):
        settings_of(*configurations)


def test_states_of_several_kinds_are_the_bytes_of_their_page() -> None:
    """One tensor of bytes, or one of each state; the page is longer than what it holds."""
    spec = MambaSpec(
        block_size=64, shapes=((3, 8), (2, 4, 4)), dtypes=(torch.bfloat16, torch.float)
    )
    nbytes = 3 * 8 * 2 + 2 * 4 * 4 * 4
    memory = torch.randint(0, 255, (5, 256), dtype=torch.uint8)
    one = memory.view(torch.int8)[:, None, None, :nbytes]
    parts = [
        torch.as_strided(memory.view(torch.bfloat16), (5, 3, 8), (128, 8, 1)),
        torch.as_strided(memory.view(torch.float), (5, 2, 4, 4), (64, 16, 4, 1), 12),
    ]
    for cache in (one, parts):
        config = SimpleNamespace(num_blocks=5, kv_cache_groups=[])
        config.kv_cache_groups.append(SimpleNamespace(kv_cache_spec=spec, layer_names=["a"]))
        (made,) = views_of({"a": cache}, config)
        assert made.row_tokens is None
        assert (made.view.slots, made.view.block_size) == (5, 1)
        (form,) = forms_of([made], "model", 64)
        assert (form.block_size, form.payload_bytes) == (1, nbytes)
        target = torch.zeros(1, 1, 1, nbytes, dtype=torch.uint8)
        stored = KVView([target], "layer | block token head dim")
        copy_blocks(made.view, stored, src_blocks=[3], dst_blocks=[0]).synchronize()
        assert torch.equal(target[0, 0, 0], memory[3, :nbytes])
    gap = [parts[0], torch.as_strided(memory.view(torch.float), (5, 2, 4, 4), (64, 16, 4, 1), 16)]
    with pytest.raises(IntegrationError, match="which each has 176 bytes next to each other"):
        views_of({"a": gap}, config)


def window(size: int, tokens: int, *layers: str) -> Any:
    spec = SlidingWindowSpec(block_size=size, sliding_window=tokens)
    return SimpleNamespace(kv_cache_spec=spec, layer_names=[*layers])


def test_groups_with_a_window(configurations: tuple[Any, Any]) -> None:
    configurations[1].kv_cache_groups.append(window(16, 64))
    settings = settings_of(*configurations)
    assert settings.groups == (Group(16), Group(16, 64))
    assert settings.fails_by_request
    terms = configurations[0].kv_transfer_config.kv_connector_extra_config
    terms["block_size"] = 128
    with pytest.raises(InvalidTerms, match="at most 64 tokens, the window"):
        settings_of(*configurations)


def test_a_stored_block_ends_where_a_state_may_be() -> None:
    """An engine keeps states at the ends of its own blocks. In the control it keeps all rows."""
    assert whole_blocks([Group(32), Group(32, states="last")]) == 32
    assert whole_blocks([Group(32), Group(32)]) == 64


@pytest.mark.parametrize(
    ("sizes", "windows", "stored"),
    [
        ([16], [None], 64),
        ([24], [None], 72),
        ([128], [None], 128),
        ([16, 32], [None, 64], 64),
        ([16, 24], [None, 512], 96),
        ([16, 16], [None, 48], 16),
        ([1072, 1072], [None, 128], 1072),
    ],
)
def test_a_stored_block_has_whole_blocks_of_all_groups(
    sizes: list[int], windows: list[int | None], stored: int
) -> None:
    """At least 64 tokens, unless a window and its blocks have fewer."""
    assert whole_blocks([Group(*each) for each in zip(sizes, windows, strict=True)]) == stored


@pytest.mark.parametrize(
    ("device", "extra", "parallel", "stored"),
    [
        ("cpu", {}, {}, 16),
        ("cuda", {}, {}, 64),
        (None, {}, {}, 64),
        ("cpu", {"block_size": 32}, {}, 32),
        ("cpu", {"shared": True}, {}, 64),
        ("cpu", {}, {"world_size": 2, "tensor_parallel_size": 2}, 16),
    ],
)
def test_a_stored_block_of_a_cpu_is_the_engines_own(
    tmp_path: Path,
    device: str | None,
    extra: dict[str, Any],
    parallel: dict[str, Any],
    stored: int,
) -> None:
    """Unless several engines share the store, or the user says otherwise."""
    config, caches = configuration(str(tmp_path / "store"), "engine", 8, 16)
    if device is not None:
        config.device_config = SimpleNamespace(device_type=device)
    vars(config.parallel_config).update(parallel)
    config.kv_transfer_config.kv_connector_extra_config |= extra
    assert settings_of(config, caches).block_size == stored


def test_groups_whose_blocks_have_little_in_common_need_a_size() -> None:
    with pytest.raises(InvalidTerms, match=r"blocks of \[784, 1056\] tokens, got none"):
        whole_blocks([Group(784), Group(1056)])


def test_a_release_that_cannot_be_told_of_failed_loads(configurations: tuple[Any, Any]) -> None:
    """Only host memory of one worker serves several groups of layers there."""

    class Base:
        """A connector of an older release."""

    class Newer(Base):
        def get_transfer_results(self) -> None: ...

    terms = configurations[0].kv_transfer_config.kv_connector_extra_config
    assert not never_fails(Base, settings_of(*configurations))
    configurations[1].kv_cache_groups.append(window(16, 64))
    settings = settings_of(*configurations)
    assert not never_fails(Newer, settings)
    assert never_fails(Base, settings)
    terms["shared"] = True
    with pytest.raises(
        IntegrationError, match="lacks the hook get_transfer_results, got the store"
    ):
        never_fails(Base, settings_of(*configurations))
    del terms["shared"]
    terms["host"] = 0
    with pytest.raises(IntegrationError, match="got host: 0"):
        never_fails(Base, settings_of(*configurations))
    terms["by_layer"] = True
    with pytest.raises(IntegrationError, match="Leave by_layer out"):
        never_fails(Newer, settings_of(*configurations))


def test_blocks_that_are_gone_are_not_touched() -> None:
    assert ids_of(([0, 3], [2])) == ((-1, 3), (2,))
    assert ids_of(None) == ()
    assert groups_of(configuration("", "engine", 8, 16)[1]) == [Group(16)]


@pytest.mark.parametrize(("size", "says"), [(24, "multiple or a divisor of 16"), (0, "block_size")])
def test_a_size_of_stored_blocks_that_does_not_fit(
    size: int, says: str, configurations: tuple[Any, Any]
) -> None:
    terms = configurations[0].kv_transfer_config.kv_connector_extra_config
    terms["block_size"] = size
    with pytest.raises(InvalidTerms, match=f"kv_connector_extra_config: .*{says}"):
        settings_of(*configurations)


def test_loads_by_layer_need_steps_one_after_the_other(configurations: tuple[Any, Any]) -> None:
    config, _ = configurations
    config.scheduler_config = SimpleNamespace(async_scheduling=True)
    assert not settings_of(*configurations).store.by_layer
    config.kv_transfer_config.kv_connector_extra_config["by_layer"] = True
    with pytest.raises(IntegrationError, match="--no-async-scheduling for by_layer"):
        settings_of(*configurations)
    config.scheduler_config.async_scheduling = False
    assert settings_of(*configurations).store.by_layer


def test_requests_that_need_all_tokens() -> None:
    assert not needs_all_tokens(SimpleNamespace())
    assert not needs_all_tokens(SimpleNamespace(skip_reading_prefix_cache=False))
    assert needs_all_tokens(SimpleNamespace(skip_reading_prefix_cache=True))


def test_a_role_that_does_not_fit_is_refused(configurations: tuple[Any, Any]) -> None:
    configurations[0].kv_transfer_config.kv_role = "kv_neither"
    with pytest.raises(IntegrationError, match="got 'kv_neither'"):
        settings_of(*configurations)


def test_wrong_terms_of_a_hand_over_are_named(configurations: tuple[Any, Any]) -> None:
    terms = configurations[0].kv_transfer_config.kv_connector_extra_config
    terms["hand_over"] = {"leese": 5}
    with pytest.raises(InvalidTerms, match=r"kv_connector_extra_config: .* got 'leese'"):
        settings_of(*configurations)


def test_an_engine_that_hands_over_has_rows_apart(configurations: tuple[Any, Any]) -> None:
    """Also of a window: other engines read them."""
    config, caches = configurations
    config.kv_transfer_config.kv_role = "kv_consumer"
    for more in ([], [window(16, 64)]):
        caches.kv_cache_groups += more
        settings = settings_of(config, caches)
        assert settings.handing is not None
        assert not settings.has_whole_blocks


def test_an_engine_without_a_store_has_no_store_server(configurations: tuple[Any, Any]) -> None:
    config, caches = configurations
    config.parallel_config.world_size = 2
    assert settings_of(config, caches).uses_store_server
    config.kv_transfer_config.kv_role = "kv_producer"
    config.kv_transfer_config.kv_connector_extra_config = {}
    settings = settings_of(config, caches)
    assert not settings.uses_store_server
    index = index_of(settings)
    assert (index.leading([b"a"]), index.has(b"a"), index.losses) == (0, False, 0)
    assert (index.take_events(), index.bytes_of({"landed_blocks": 1})) == ([], {})


def test_caches_are_shared_in_place() -> None:
    """Views of them follow, and each storage is moved once."""
    memory = torch.arange(24, device="cpu", dtype=torch.int32)
    caches = [memory[:12].view(3, 4), memory[12:].view(3, 4)]
    view = memory[4:8]
    share_caches(caches)
    assert all(cache.is_shared() for cache in (*caches, view))
    caches[0][1] = 7
    assert view.tolist() == [7, 7, 7, 7]
    assert caches[1][0].tolist() == [12, 13, 14, 15]
    place = memory.data_ptr()
    share_caches(caches)
    assert memory.data_ptr() == place


def test_shared_memory_that_is_too_small_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        os, "statvfs", lambda _: SimpleNamespace(f_bavail=1, f_frsize=64, f_blocks=9, f_bfree=9)
    )
    with pytest.raises(IntegrationError, match="Expected 400 bytes free in /dev/shm"):
        share_caches([torch.zeros(100, dtype=torch.float32, device="cpu")])


@pytest.mark.parametrize(
    ("parallel", "numbers"),
    [
        ({"world_size": 1}, (0, 0)),
        ({"world_size": 4, "rank": 3}, (3, 3)),
        ({"world_size": 4, "rank": 1, "data_parallel_index": 2}, (1, 9)),
        ({"world_size": 2, "rank": 0, "data_parallel_rank": 1}, (0, 2)),
    ],
)
def test_numbers_of_workers(parallel: dict[str, int], numbers: tuple[int, int]) -> None:
    assert worker_numbers(SimpleNamespace(**parallel)) == numbers


def ended(status: str, computed: int, **params: Any) -> Any:
    """Return a request with a prompt of 4 tokens that has ended."""
    return SimpleNamespace(
        request_id="a",
        prompt_token_ids=[1, 2, 3, 4],
        num_computed_tokens=computed,
        status=SimpleNamespace(name=status),
        kv_transfer_params=params or None,
    )


def test_requests_that_another_engine_goes_on_with() -> None:
    assert is_wanted(ended("FINISHED_LENGTH_CAPPED", 4, do_remote_decode=True))
    assert is_wanted(ended("FINISHED_STOPPED", 5, do_remote_decode=True))
    embedded = ended("FINISHED_STOPPED", 4, do_remote_decode=True)
    embedded.prompt_token_ids = None  # it has embeddings in place of tokens
    for request in (
        ended("FINISHED_ABORTED", 4, do_remote_decode=True),
        ended("FINISHED_LENGTH_CAPPED", 3, do_remote_decode=True),
        ended("FINISHED_LENGTH_CAPPED", 4, do_remote_decode=False),
        ended("FINISHED_LENGTH_CAPPED", 4),
        embedded,
    ):
        assert not is_wanted(request)


def test_what_a_proxy_passes_on() -> None:
    """The keys by which vLLM's front end and its proxies know the halves of a request."""
    request = ended("FINISHED_STOPPED", 4, do_remote_decode=True)
    identity = Identity.of("model", request.prompt_token_ids, b"", ())
    rows = RemoteRows((b"ticket",), 4, 30.0)
    params = parameters_for(request, rows, identity, "engine", 2)
    assert params["do_remote_prefill"] is True
    assert params["do_remote_decode"] is False
    carried = json.loads(json.dumps(params))
    asked = list[Any]()

    def identity_asked(request: Any, tokens: int) -> Any:
        asked.append(request)
        return identity

    assert remote_rows_of(ended("WAITING", 0, **carried), identity_asked) == rows
    assert len(asked) == 1
    assert remote_rows_of(ended("WAITING", 0), identity_asked) is None
    assert remote_rows_of(ended("WAITING", 0, do_remote_decode=True), identity_asked) is None
    assert len(asked) == 1, "the prompts of other requests are not read"


def test_wrong_terms_are_refused_by_name(configurations: tuple[Any, Any], tmp_path: Path) -> None:
    terms = configurations[0].kv_transfer_config.kv_connector_extra_config
    terms["fodler"] = "x"
    with pytest.raises(InvalidTerms, match=r"kv_connector_extra_config: .* got 'fodler'"):
        settings_of(*configurations)
    del terms["fodler"]
    open_folder = tmp_path / "open"
    open_folder.mkdir()
    open_folder.chmod(0o777)
    terms["folder"] = str(open_folder)
    with pytest.raises(InvalidTerms, match="only this user may write"):
        settings_of(*configurations)


def one_group(*layers: str) -> Any:
    """Return caches of 8 blocks of 16 tokens, of 4 heads of 32, for a group of layers."""
    _, caches = configuration("", "engine", 8, 16)
    (group,) = caches.kv_cache_groups
    group.layer_names = [*layers]
    group.kv_cache_spec.num_kv_heads = 4
    group.kv_cache_spec.head_size = 32
    return caches


def pages_of(named: dict[str, torch.Tensor]) -> KVView:
    """Return the view of the pages of a group."""
    ((view, _, tokens, *_),) = views_of(named, one_group(*named))
    assert tokens == 16
    return view


@pytest.mark.parametrize("first", [True, False], ids=["blocks first", "keys and values first"])
def test_a_view_of_pages(first: bool) -> None:
    """Each block of a layer is one row; layers that share a tensor count once."""
    shape = (8, 4, 16, 64) if first else (2, 8, 16, 4, 32)
    tensors = [torch.zeros(shape) for _ in range(3)]
    view = pages_of({"a": tensors[0], "b": tensors[1], "c": tensors[2], "d": tensors[0]})
    assert view.layers == 3
    assert view.widths == ((4 * 16 * 64 * 4,) if first else 2 * (16 * 4 * 32 * 4,))
    assert view.block_size == 1
    assert view.slots == 8


def test_blocks_that_a_kernel_cuts_are_whole_pages() -> None:
    """The kernel's blocks have 4 tokens."""
    view = pages_of({"a": torch.zeros(32, 4, 4, 64)})
    assert view.slots == 8
    assert view.widths == (4 * 16 * 64 * 4,)


def test_a_stored_block_of_several_pages() -> None:
    """A key names four of the engine's blocks, wherever they are."""
    source = torch.arange(8 * 4 * 16 * 64, dtype=torch.float32, device="cpu").view(8, 4, 16, 64)
    target = torch.zeros_like(source)
    (group,), (other,) = (views_of({"a": x}, one_group("a")) for x in (source, target))
    index = LocalIndex()
    terms = StoreTerms(host=1 << 20, staging=1 << 20)
    (store,) = index.open([group], terms, "model", 64)
    keys = prefix_keys(range(128), block_size=64)
    store.save(group.view, [6, 0, 3, 1, 2, 7, 5, 4], keys).synchronize(LIMIT)
    store.load(other.view, [0, 1, 2, 3], keys[1:]).synchronize(LIMIT)
    assert torch.equal(target[:4], source[[2, 7, 5, 4]])
    assert not target[4:].any()
    index.close()


def test_pages_with_gaps_are_refused() -> None:
    with pytest.raises(IntegrationError, match="pages have no gaps"):
        pages_of({"a": torch.zeros(8, 4, 16, 128)[..., :64]})


def test_caches_without_an_axis_of_blocks_are_refused() -> None:
    with pytest.raises(IntegrationError, match=r"got \[4, 8, 16\]"):
        pages_of({"a": torch.zeros(4, 8, 16)})


def test_layers_of_unequal_width_have_a_view_for_each_kind() -> None:
    """Of one group, whose blocks they share."""
    named = {"a": torch.zeros(8, 16), "b": torch.zeros(8, 8), "c": torch.zeros(8, 16)}
    wide, narrow = views_of(named, one_group("a", "b", "c"))
    assert (wide.view.layers, narrow.view.layers) == (2, 1)
    assert (wide.group, narrow.group) == (0, 0)
    wide, narrow = (GroupView(each.view, "", 16, 0) for each in (wide, narrow))
    index = LocalIndex()
    wides, narrows = index.open([wide, narrow], StoreTerms(host=1 << 20), "model", 16)
    keys = prefix_keys(range(48), 16)
    wides.save(wide.view, [0, 1, 2], keys).synchronize(LIMIT)
    narrows.save(narrow.view, [0, 1], keys[:2]).synchronize(LIMIT)
    assert index.leading(keys) == 2
    assert index.has(keys[1])
    assert not index.has(keys[2])
    index.close()


@pytest.mark.parametrize("change", [{"by_layer": True}, {"shared": True}], ids=str)
def test_what_unequal_widths_cannot_have_is_named(
    configurations: tuple[Any, Any], change: dict[str, Any]
) -> None:
    config, caches = configurations
    config.kv_transfer_config.kv_connector_extra_config |= change
    settings = settings_of(config, caches)
    view = GroupView(KVView(torch.zeros(8, 1, 16), "block token dim"), group=0)
    check_kinds([view], settings)
    with pytest.raises(IntegrationError, match="got 2 kinds in 1 groups"):
        check_kinds([view, view], settings)


def test_groups_that_share_tensors_have_a_view_each() -> None:
    caches = one_group("a", "b")
    caches.kv_cache_groups.append(window(16, 64, "c", "d"))
    tensors = [torch.zeros(8, 4, 16, 64) for _ in range(2)]
    named = {"a": tensors[0], "b": tensors[1], "c": tensors[0], "d": tensors[1]}
    first, second = views_of(named, caches)
    assert first.view.layers == second.view.layers == 2


def rows_at(view: KVView, head: int, token: int) -> list[torch.Tensor]:
    """Return the key and the value of a head at a token."""
    target = torch.zeros(view.layers, 2, 1, 4, 32)
    copy_rows(view, KVView(target, "layer kv token head dim"), [token], [0]).synchronize()
    return [*target[0, :, 0, head]]


@pytest.mark.parametrize("order", ["heads first", "tokens first"])
@pytest.mark.parametrize("kernel", FUSED)
def test_a_key_and_a_value_next_to_each_other(kernel: str, order: str) -> None:
    shape = (8, 16, 4, 64) if order == "tokens first" else (8, 4, 16, 64)
    tensor = torch.arange(8 * 4 * 16 * 64, dtype=torch.float32).view(shape)
    if order == "tokens first":
        tensor = tensor.transpose(1, 2)
    ((view, notes, *_),) = views_of({"a": tensor}, one_group("a"), {"a": kernel}, BY_TOKEN)
    assert notes == ""
    key, value = rows_at(view, 2, 3 * 16 + 5)
    assert torch.equal(key, tensor[3, 2, 5, :32])
    assert torch.equal(value, tensor[3, 2, 5, 32:])


@pytest.mark.parametrize("kernel", BY_DIM)
def test_keys_by_dim_and_token(kernel: str) -> None:
    tensor = torch.arange(8 * 4 * 16 * 64, dtype=torch.float32).view(8, 4, 16, 64)
    ((view, *_),) = views_of({"a": tensor}, one_group("a"), {"a": kernel}, BY_TOKEN)
    key, value = rows_at(view, 2, 3 * 16 + 5)
    page = tensor[3, 2].flatten()
    assert torch.equal(key, page[: 32 * 16].view(32, 16)[:, 5])
    assert torch.equal(value, page[32 * 16 :].view(16, 32)[5])


@pytest.mark.parametrize("kernel", LATENT)
def test_a_latent_row(kernel: str) -> None:
    caches = one_group("a")
    caches.kv_cache_groups[0].kv_cache_spec.num_kv_heads = 1
    tensor = torch.arange(8 * 16 * 32, dtype=torch.float32).view(8, 1, 16, 32)
    ((view, *_),) = views_of({"a": tensor}, caches, {"a": kernel}, BY_TOKEN)
    target = torch.zeros(1, 1, 32)
    copy_rows(view, KVView(target, "layer token dim"), [53], [0]).synchronize()
    assert torch.equal(target[0, 0], tensor[3, 0, 5])


def pages_of_an_index(rows: torch.Tensor, size: int, kind: str = "") -> torch.Tensor:
    """Return blocks of keys of an index, uint8 ``[tokens, 132]``: the values of a block first.

    ``kind``: "by token", as the rows of other caches lie.
    """
    if kind == "by token":
        return rows.view(-1, size, 132)
    pages = torch.empty(len(rows) // size, size * 132, dtype=torch.uint8)
    for token, row in enumerate(rows):
        block, at = divmod(token, size)
        pages[block, at * 128 : (at + 1) * 128] = row[:128]
        pages[block, size * 128 + at * 4 : size * 128 + (at + 1) * 4] = row[128:]
    return pages.view(-1, size, 132)


@pytest.mark.parametrize(("kind", "right"), [("", True), ("by token", False)])
def test_packed_latent_rows_and_their_index(kind: str, right: bool) -> None:
    """As DeepSeek V3.2 has them with ``fp8_ds_mla``; blocks of two sizes. The control: keys of the
    index that lie as other rows do."""
    draw = torch.Generator().manual_seed(0)
    latent, keys = (
        torch.randint(256, (128, wide), dtype=torch.uint8, generator=draw) for wide in (656, 132)
    )
    kernels = {"a": next(each for each in LATENT if "FlashMLASparse" in each), "b": INDEX}

    def views(size: int, rows: torch.Tensor, index: torch.Tensor) -> list[GroupView]:
        one = {"block_size": size, "num_kv_heads": 1}
        packed = SimpleNamespace(**one, head_size=576, state_content_bytes=656)
        spec = {"a": packed, "b": SimpleNamespace(**one, head_size=132)}
        group = SimpleNamespace(
            kv_cache_spec=SimpleNamespace(kv_cache_specs=spec), layer_names=["a", "b"]
        )
        caches = SimpleNamespace(num_blocks=128 // size, kv_cache_groups=[group])
        named = {"a": rows.view(-1, 1, size, 656), "b": index.view(-1, 1, size, 132)}
        return views_of(named, caches, kernels, BY_TOKEN)

    src = views(16, latent, pages_of_an_index(keys, 16, kind))
    target = torch.zeros_like(latent)
    index = torch.zeros(4, 32, 132, dtype=torch.uint8)
    order = torch.randperm(128, generator=draw)
    for one, other in zip(src, views(32, target, index), strict=True):
        copy_rows(one.view, other.view, order, torch.arange(128)).synchronize()
    assert torch.equal(target, latent[order])
    assert torch.equal(index, pages_of_an_index(keys[order], 32)) == right
    ranks = SimpleNamespace(parallel_config=SimpleNamespace(tensor_parallel_size=2))
    assert [heads_of(ranks, 1, each) for each in src] == [None, None]


@pytest.mark.parametrize(
    ("kernel", "tensor", "terms"),
    [
        (LATENT[-2], torch.zeros(8, 16, 584, dtype=torch.uint8), {"state_content_bytes": 584}),
        (INDEX, torch.zeros(8, 16, 132, dtype=torch.int8), {"head_size": 132}),
        (INDEX, torch.zeros(8, 16, 68, dtype=torch.uint8), {"head_size": 68}),
        (f"{INDEX} mxfp4", torch.zeros(8, 16, 132, dtype=torch.uint8), {"head_size": 132}),
        (INDEX, torch.zeros(8, 16, 140, dtype=torch.uint8)[..., :132], {"head_size": 132}),
    ],
    ids=["packed otherwise", "dtype", "width", "four bits", "gaps"],
)
def test_latent_rows_and_indices_that_are_not_known(
    kernel: str, tensor: torch.Tensor, terms: dict[str, int]
) -> None:
    """Such as the rows of DeepSeek V4, whose scales follow the rows of a block."""
    caches = one_group("a")
    vars(caches.kv_cache_groups[0].kv_cache_spec).update(terms)
    with pytest.raises(IntegrationError, match="Expected an attention backend whose pages"):
        views_of({"a": tensor}, caches, {"a": kernel}, BY_TOKEN)
    assert views_of({"a": tensor[..., :128].contiguous()}, caches, {"a": kernel})


@pytest.mark.parametrize(
    ("dtype", "nbytes"),
    [(torch.uint8, 32), (torch.int8, 36), (torch.uint8, 20)],
    ids=["fp8", "int8 and a scale", "int4 and a scale"],
)
def test_quantized_rows_with_the_scales_of_a_token_and_a_head(
    dtype: torch.dtype, nbytes: int
) -> None:
    """Of one head each in two caches, whose blocks have other sizes."""
    caches = one_group("a")
    spec = caches.kv_cache_groups[0].kv_cache_spec
    if nbytes != 32:
        spec.state_content_bytes = 2 * nbytes
    draw = torch.Generator().manual_seed(0)
    shape = (8, 4, 16, 2 * nbytes)
    whole = torch.randint(-128, 127, shape, dtype=torch.int8, generator=draw).view(dtype)
    spec.num_kv_heads = 1
    for head in range(4):
        ((src, *_),) = views_of({"a": whole[:, head : head + 1]}, caches, {"a": FUSED[2]}, BY_TOKEN)
        part = torch.zeros(4, 1, 32, 2 * nbytes, dtype=dtype)
        spec.block_size = 32
        caches.num_blocks = 4
        ((dst, *_),) = views_of({"a": part}, caches, {"a": FUSED[2]}, BY_TOKEN)
        spec.block_size = 16
        caches.num_blocks = 8
        copy_rows(src, dst, count=128).synchronize()
        assert torch.equal(part[:, 0].flatten(0, 1), whole[:, head].flatten(0, 1))


def test_quantized_rows_that_are_not_next_to_each_other_are_named() -> None:
    """The scales of a head follow all of its values."""
    caches = one_group("a")
    spec = caches.kv_cache_groups[0].kv_cache_spec
    spec.state_content_bytes = 18
    spec.kv_quant_mode = SimpleNamespace(name="NVFP4")
    tensor = torch.zeros(8, 8, 16, 18, dtype=torch.uint8)
    with pytest.raises(IntegrationError, match=r"FlashInfer.* \(NVFP4\)\. Stored blocks"):
        views_of({"a": tensor}, caches, {"a": FUSED[1]}, BY_TOKEN)
    assert views_of({"a": tensor}, caches)[0].row_tokens == 16


@pytest.mark.parametrize(
    ("tensor", "kernels"),
    [
        (torch.zeros(8, 4, 16, 64), {"a": "vllm.SomeBackend"}),
        (torch.zeros(8, 4, 16, 64), {}),
        (torch.zeros(8, 4, 16, 64), {"a": BY_DIM[0].replace("vec", "amx")}),
        (torch.zeros(8, 2, 16, 128), {"a": FUSED[0]}),
        (torch.zeros(16, 4, 8, 64), {"a": FUSED[0]}),
    ],
    ids=["backend", "none", "instruction set", "shape", "the kernel's blocks"],
)
def test_pages_whose_inside_is_not_known_are_refused(
    tensor: torch.Tensor, kernels: dict[str, str]
) -> None:
    with pytest.raises(IntegrationError, match="leave block_size out") as refused:
        views_of({"a": tensor}, one_group("a"), kernels, BY_TOKEN)
    assert ("--dtype float32" in str(refused.value)) == ("amx" in str(kernels))


def test_the_kernels_of_an_engine() -> None:
    """A layer that is not attention has none."""

    class Backend:
        """What a layer's attention is written in."""

    layer = SimpleNamespace(get_attn_backend=lambda: Backend)
    by_cpu = SimpleNamespace(get_attn_backend=lambda: Backend, isa="vec")
    chunks = type("ChunkedLocalAttention_128_Backend", (Backend,), {"__module__": "abc"})
    wrapped = SimpleNamespace(get_attn_backend=lambda: chunks)
    layers = {"a": layer, "b": by_cpu, "c": SimpleNamespace(), "d": wrapped}
    config = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=layers))
    name = f"{Backend.__module__}.{Backend.__qualname__}"
    assert kernels_of(config) == {"a": name, "b": f"{name} vec", "d": name}
    index = type("SomeIndexerBackend", (), {"__module__": "abc"})
    layers["e"] = SimpleNamespace(get_attn_backend=lambda: index)
    for terms, says in (
        ({"indexer_kv_dtype": "auto"}, "abc.SomeIndexerBackend"),
        ({"indexer_kv_dtype": "mxfp4"}, "abc.SomeIndexerBackend mxfp4"),
        ({"use_fp4_indexer_cache": True}, "abc.SomeIndexerBackend mxfp4"),
    ):
        config.attention_config = SimpleNamespace(**terms)
        assert kernels_of(config)["e"] == says
        assert kernels_of(config)["a"] == name
    assert kernels_of(SimpleNamespace()) == {}


def with_scales(*scales: Any) -> Any:
    """Return vLLM's configuration of layers with so many scales of keys, and 1 of values."""
    layers = {
        f"layer.{number}": SimpleNamespace(
            _k_scale=torch.as_tensor(scale), _v_scale=torch.tensor(1.0), kv_cache_dtype="fp8"
        )
        for number, scale in enumerate(scales)
    }
    return SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=layers))


def test_scales_of_a_cache_are_a_part_of_its_models_name() -> None:
    one = Workers(1, True)
    names = [scales_of(with_scales(*each), one) for each in ([0.5, 1.0], [0.5, 0.25], [1.0, 0.5])]
    assert len({*names}) == 3
    assert scales_of(with_scales(0.5, 1.0), Workers(4, False)) == names[0]
    assert scales_of(with_scales(1.0, 1.0), one) == scales_of(SimpleNamespace(), one) == ""
    assert scales_of(with_scales([0.5, 0.25]), one)


@pytest.mark.parametrize(
    ("scale", "workers"),
    [([0.5, 0.25], Workers(2, False)), (0.5, Workers(2, False, stages=2))],
    ids=["of heads", "of stages"],
)
def test_scales_that_workers_do_not_share_are_refused(scale: Any, workers: Workers) -> None:
    with pytest.raises(IntegrationError, match=r"all 2 workers have, got k_scale \[.*layer\.0"):
        scales_of(with_scales(scale), workers)


def test_scales_of_an_amd_gpu_are_those_of_its_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some architectures have an fp8 of another bias."""
    names = set()
    for architecture in ("gfx942", "gfx950"):
        device = SimpleNamespace(gcnArchName=architecture)
        monkeypatch.setattr(torch.version, "hip", "7.0")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, d=device: d)
        names.add(scales_of(with_scales(1.0), Workers(1, True)))
    assert len(names) == 2


def test_scales_that_an_engine_computes_itself_are_refused(
    configurations: tuple[Any, Any],
) -> None:
    configurations[0].cache_config.calculate_kv_scales = True
    with pytest.raises(IntegrationError, match="got calculate_kv_scales"):
        settings_of(*configurations)


@pytest.mark.parametrize(("policy", "lines"), [("fail", 1), ("recompute", 0)])
def test_a_policy_that_ends_requests_is_warned_of(
    policy: str, lines: int, configurations: tuple[Any, Any], caplog: pytest.LogCaptureFixture
) -> None:
    configurations[0].kv_transfer_config.kv_load_failure_policy = policy
    warn_of_policy(configurations[0])
    assert caplog.text.count("kv_load_failure_policy") == lines


def test_a_page_is_read_in_the_order_of_its_memory() -> None:
    """vLLM names heads before tokens, also where tokens come first in memory."""
    by_token = torch.arange(8 * 16 * 4 * 6).view(8, 16, 4, 6).transpose(1, 2)
    ((view, order, *_),) = views_of({"a": by_token}, one_group("a"))
    (tensor,) = [view.tensors] if isinstance(view.tensors, torch.Tensor) else view.tensors
    assert tensor.data_ptr() == by_token.data_ptr()
    by_head = torch.arange(8 * 16 * 4 * 6).view(8, 4, 16, 6)
    ((_, other, *_),) = views_of({"a": by_head}, one_group("a"))
    assert other != order


@pytest.mark.parametrize("all_layers", [False, True])
def test_pages_whose_order_a_host_chooses_name_it(
    configurations: tuple[Any, Any], all_layers: bool
) -> None:
    """A folder that moves to a host with AMX has nothing for it. Pages on GPUs, whose order shape
    and strides say, have the notes that they always had."""
    config, caches = configurations
    settings = settings_of(config, caches)
    tensor = torch.zeros(8, 4, 16, 64)
    kernels = (*BY_DIM[:1], BY_DIM[0].replace("vec", AMX), FUSED[0], "")
    notes = list[str]()
    for each in kernels:
        used = {"layer": each}
        if all_layers:
            made = view_across_layers(tensor, caches, used)
        else:
            (made,) = read_views(settings, {"layer": tensor}, caches, used)
        notes.append(made.notes)
    assert len({*notes}) == 3
    axes = "all layers: axes [0, 1, 2, 3]" if all_layers else "axes [1, 2, 3]"
    assert notes[2:] == [f"{axes} of [4, 16, 64] torch.float32"] * 2


def test_layers_that_look_ahead_are_refused(configurations: tuple[Any, Any]) -> None:
    configurations[1].kv_cache_groups[0].kv_cache_spec.non_causal = True
    with pytest.raises(IntegrationError, match="Expected causal attention"):
        settings_of(*configurations)


# --- a cache of all layers


def test_a_block_of_all_layers_is_one_page() -> None:
    """The engine's axes may be in any order; its blocks are the outermost one in memory."""
    memory = torch.arange(4 * 2 * 3 * 5 * 7, device="cpu").view(4, 2, 3, 5, 7)
    config = SimpleNamespace(
        num_blocks=4,
        kv_cache_groups=[SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=16))],
    )
    made = view_across_layers(memory.permute(2, 0, 1, 4, 3), config)
    assert made.row_tokens == 16
    assert (made.view.layers, made.view.block_size) == (1, 1)
    copied = torch.zeros_like(memory)
    target = view_across_layers(copied.permute(2, 0, 1, 4, 3), config)
    assert target.notes == made.notes
    copy_blocks(made.view, target.view, [2, 0], [1, 3]).synchronize()
    assert torch.equal(copied[[1, 3]], memory[[2, 0]])
    assert not copied[[0, 2]].any()
    config.num_blocks = 3
    with pytest.raises(IntegrationError, match="one cache of 3 blocks"):
        view_across_layers(memory, config)


def test_notes_of_a_cache_of_all_layers_do_not_depend_on_its_blocks() -> None:
    group = SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=16))
    notes = set[str]()
    for blocks in (4, 9):
        memory = torch.zeros(2, blocks, 3, device="cpu").transpose(0, 1).contiguous()
        config = SimpleNamespace(num_blocks=blocks, kv_cache_groups=[group])
        notes.add(view_across_layers(memory.transpose(0, 1), config).notes)
        notes.add(view_across_layers(memory.transpose(0, 1), config).notes)
    assert len(notes) == 1


def test_blocks_hold_all_layers_unless_these_move_one_by_one(
    configurations: tuple[Any, Any],
) -> None:
    config, caches = configurations
    assert settings_of(config, caches).has_whole_blocks
    config.kv_transfer_config.kv_connector_extra_config["by_layer"] = True
    assert not settings_of(config, caches).has_whole_blocks
