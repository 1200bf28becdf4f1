# SPDX-License-Identifier: Apache-2.0
"""The blocks of vLLM's ranks and engines, in the store of the server of their host."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from portakv.copy.layer_words import LayerWords
from portakv.errors import InvalidTerms, Unsupported
from portakv.integrations import IntegrationError
from portakv.integrations.vllm.caches import (
    BY_HEAD,
    BY_TOKEN,
    HANDED,
    Settings,
    kernels_of,
    scales_of,
    views_of,
    worker_numbers,
)
from portakv.migrate import Shard
from portakv.serving import (
    Blocks,
    Described,
    ServerIndex,
    StoreClient,
    StoreServer,
    Validity,
    place_of,
)
from portakv.serving.handover import Handover, rehearse
from portakv.serving.kv_events import medium_of, number_of, runs_of
from portakv.serving.local import (
    GroupView,
    LocalIndex,
    NoBlocks,
    StoreIndex,
    StoreTerms,
    forms_of,
    found_in,
    log_start,
)
from portakv.serving.worker import warm_up
from portakv.storage.calls import Change
from portakv.storage.form import Range

# ------------------------------------------------------------------------------------------------
# The events by which vLLM tells routers which blocks the store has.


class Kinds(NamedTuple):
    """vLLM's classes of events, and how its events name a block by its key."""

    stored: Any
    removed: Any
    hash_of: Callable[[bytes], Any] = number_of


try:
    from vllm.distributed.kv_events import BlockRemoved, BlockStored
    from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash
except ImportError:  # a release without events
    KINDS = None
else:
    KINDS = Kinds(BlockStored, BlockRemoved, maybe_convert_block_hash)


def are_wanted(config: Any, kinds: Kinds | None = KINDS) -> bool:
    """Return whether an engine is to publish events, and its release of vLLM has them."""
    events = getattr(config, "kv_events_config", None)
    return kinds is not None and bool(getattr(events, "enable_kv_cache_events", False))


def events_of(
    changes: Iterable[Change],
    describe: Callable[[bytes], Described | None],
    block_size: int,
    kinds: Kinds | None = KINDS,
) -> list[Any]:
    """Return vLLM's events of the changes of a store, in order.

    Blocks that follow each other in a tier are one event. Blocks that were stored before the engine
    started have no description, and no event.

    Args:
        describe: returns what a block has been made of.
        block_size: the tokens of a stored block.
    """
    events = list[Any]()
    if kinds is None:
        return events
    for run in runs_of(changes, describe):
        medium = medium_of(run[0])
        keys = [change.key for change in run]
        hashes = [kinds.hash_of(key) for key in keys]
        if not run[0].stored:
            events.append(kinds.removed(block_hashes=hashes, medium=medium))
            continue
        described = [each for key in keys if (each := describe(key)) is not None]
        if not described:
            continue
        after = described[0].after
        adapter = getattr(described[0].about, "lora_request", None)
        events.append(
            kinds.stored(
                block_hashes=hashes,
                parent_block_hash=None if after is None else kinds.hash_of(after),
                token_ids=[token for each in described for token in each.tokens],
                block_size=block_size,
                lora_id=getattr(adapter, "lora_int_id", None),
                medium=medium,
                lora_name=getattr(adapter, "lora_name", None),
            )
        )
    return events


# ------------------------------------------------------------------------------------------------
# Waits for the layers of loads in vLLM's CUDA graphs.

#: Seconds by which a wait of a graph outlasts the deadline of its load, and how many times as long
#: it is: then the host's threads hang.
LATER = 5.0
LONGER = 2.0


def words_of(views: Sequence[GroupView], terms: StoreTerms) -> LayerWords | None:
    """Return the words of the layers that graphs wait for; None if the terms let none wait.

    Raises:
        IntegrationError: no graph of the device can wait for words.
    """
    if not terms.waits_in_graphs:
        return None
    view = views[0].view
    try:
        return LayerWords(view.device, view.layers, LONGER * terms.deadline + LATER)
    except Unsupported as error:
        raise IntegrationError(
            f'Expected a device whose graphs can wait for layers, for by_layer "graph": '
            f"{error} Pass true, with which vLLM uses piecewise graphs."
        ) from error


_log = logging.getLogger(__name__)
#: Seconds for which the start of an engine waits until a rank of it has joined a server.
PATIENCE = 30.0


def heads_of(config: Any, number: int, group: GroupView) -> Range | None:
    """Return which heads of the model's a rank of tensor parallelism has.

    Ranks have equal parts if the model has fewer heads than ranks. Of states that are not divided
    by heads a rank has one of as many parts as there are ranks; those of other numbers differ.

    Args:
        config: vLLM's configuration.
        number: of the rank.
        group: the caches of the rank.

    Returns:
        From, to, and of how many; None: all heads, also of MLA, where they have one row in common,
        and of states that all ranks have.

    Raises `IntegrationError` for caches of another number of heads.
    """
    size = getattr(config.parallel_config, "tensor_parallel_size", 1)
    view = group.view
    if size == 1 or group.replicated:
        return None
    if group.row_tokens is None and not group.heads:
        return number, number + 1, size
    if view.kv == 1 and not group.heads:
        return None
    heads = group.heads or config.model_config.get_total_num_kv_heads()
    first = number * heads // size
    past = first + max(1, heads // size)
    if past - first != view.heads:
        raise IntegrationError(
            f"Expected {past - first} of the model's {heads} heads in the caches of each "
            f"of {size} ranks, got {view.heads}. Run one worker, or choose the "
            f"OffloadingConnector for this model."
        )
    return first, past, heads


def stage_of(config: Any, numbers: Mapping[str, int]) -> Range | None:
    """Return which layers of the model a stage of pipeline parallelism has.

    Args:
        config: vLLM's configuration, of the worker.
        numbers: the position of each layer in the caches, by name; see `layer_numbers`.

    Returns:
        From, to, and of how many; None: there is one stage, which has all layers.

    Raises `IntegrationError` for caches that are not those of the stage's layers, one for each.
    """
    parallel = config.parallel_config
    if getattr(parallel, "pipeline_parallel_size", 1) == 1:
        return None
    model = config.model_config
    first, past = model.get_layers_start_end_indices(parallel)
    places = sorted((number, _layer_of(name)) for name, number in numbers.items())
    if places != [*enumerate(range(first, past))]:
        raise IntegrationError(
            f"Expected one cache for each of the layers {first} to {past - 1} in a stage of "
            f"pipeline parallelism, got those of {', '.join(numbers) or 'none'}. Leave "
            f"--pipeline-parallel-size out, or choose the OffloadingConnector for this model."
        )
    return first, past, model.get_total_num_hidden_layers()


def _layer_of(name: str) -> int:
    """Return the number in the name of a layer; -1 unless it has one number."""
    numbers = [part for part in name.split(".") if part.isdecimal()]
    return int(numbers[0]) if len(numbers) == 1 else -1


class JoinedIndex(ServerIndex):
    """The index of an engine's scheduler, whose process also serves if no other one does."""

    def __init__(self, settings: Settings) -> None:
        terms = settings.store
        terms.check_usable()
        self.store_server = StoreServer(terms, settings.engine)
        try:
            super().__init__(self.store_server.place, settings.engine, sum(settings.parts))
            self.parts = settings.parts
            self.validity = Validity(settings.groups, settings.block_size)
        except BaseException:
            self.store_server.close()
            raise

    def await_ranks(self, timeout: float) -> bool:
        """Wait until a rank has joined, or was refused, at most so many seconds; return whether
        one has joined.

        Without one, the log has a line. A rank that was refused may join later.
        """
        try:
            if self.wait(timeout):
                return True
        except InvalidTerms:
            if not self._link.refused:
                raise
            return False  # the log has the sentence
        _log.warning(
            "No worker has joined the store of PortaKV in %s yet. Until one does, nothing is "
            "stored or loaded.",
            self.store_server.place.name,
        )
        return False

    def statistics(self) -> Mapping[str, Sequence[Mapping[str, object]]]:
        """Return the figures of the server's store; none while another process serves."""
        return self.store_server.figures()

    def close(self) -> None:
        """Leave the server, and serve no longer."""
        super().close()
        self.store_server.close()


def index_of(settings: Settings) -> StoreIndex:
    """Return the index of an engine's scheduler.

    With a server it waits until a worker has joined, or was refused. vLLM makes its workers before
    the scheduler.

    Raises `StoreError` for a folder that cannot be used, and `InvalidTerms` for the server of an
    engine with another number of groups.
    """
    if not settings.stores:
        return StoreIndex()
    what = f"blocks of {settings.block_size} tokens"
    if not settings.uses_store_server:
        index = LocalIndex.of(settings.engine)
        found = found_in(index.statistics(), len(settings.groups))
        log_start(settings.store, what, found, "This process")
        return index
    kept = JoinedIndex(settings)
    try:
        joined = kept.await_ranks(PATIENCE)
    except BaseException:
        kept.close()
        raise
    if joined:
        server = "This process" if kept.store_server.serves else "Another process of this host"
        log_start(settings.store, what, max(kept.counts(), default=0), server)
    return kept


class WorkerStore:
    """Where one worker saves and loads blocks: its own store, or that of the host's server.

    Args:
        config: vLLM's configuration.

    Attributes:
        handover: offers rows to other engines, and pulls theirs; None: not open.
        words: of the layers that the worker's CUDA graphs wait for; None: not open, or none.
    """

    def __init__(self, settings: Settings, config: Any) -> None:
        self._settings = settings
        self._config = config
        self._opened: LocalIndex | StoreClient | None = None
        self.handover: Handover | None = None
        self.words: LayerWords | None = None

    def open(
        self, views: Sequence[GroupView], number: int, layers: Mapping[str, int] | None = None
    ) -> Sequence[Blocks]:
        """Return the blocks of each group of layers, after copies that build kernels.

        A server may serve later. Until then nothing is loaded, and saves are dropped.

        Args:
            views: of the groups, in the caches of this worker.
            number: the rank of the worker in tensor parallelism.
            layers: the position of each layer in the views, by name; see `layer_numbers`. None: the
                views have all layers of the model.

        Raises:
            IntegrationError, InvalidTerms: caches that are no part of whole blocks; a device whose
                graphs cannot wait, if they are to.
            StoreError, StoreBusy: as `LocalIndex.open`.
        """
        check_kinds(views, self._settings)
        self.words = words_of(views, self._settings.store)
        if not self._settings.stores:
            forms = forms_of(views, self._model, None)
            return [NoBlocks(form) for form in forms]
        parts = self._open(views, number, layers or {})
        for each, part in zip(views, parts, strict=True):
            warm_up(each.view, part.form, bool(self._settings.store.by_layer))
        return parts

    def _open(
        self, views: Sequence[GroupView], number: int, layers: Mapping[str, int]
    ) -> Sequence[Blocks]:
        settings = self._settings
        terms = settings.store
        engine = settings.engine
        if not settings.uses_store_server:
            index = LocalIndex.of(engine)
            index.validity = Validity(settings.groups, settings.block_size)
            parts = index.open(views, terms, self._model, settings.block_size)
            self._opened = index
            return parts
        heads = [heads_of(self._config, number, each) for each in views]
        stage = stage_of(self._config, layers)
        terms_of_rows = (settings.block_size, heads, stage, terms.encoding)
        forms = forms_of(views, self._model, *terms_of_rows)
        client = StoreClient(place_of(terms, engine), forms, engine, views[0].view.device)
        self._opened = client
        return client.blocks

    def hand_over(
        self,
        kv_caches: Mapping[str, torch.Tensor],
        kv_cache_config: Any,
        number: int,
        layers: Mapping[str, int],
    ) -> None:
        """Open `handover` for this worker's caches, if the engine hands requests over, and make a
        first hand-over within this process.

        Args:
            number: the rank of the worker in tensor parallelism.
            layers: the position of each layer in the caches, by name; see `layer_numbers`.

        Raises `IntegrationError` for caches whose rows cannot be read, and as `Handover`.
        """
        handing = self._settings.handing
        if handing is None:
            return
        kernels = kernels_of(self._config)
        settings = self._settings
        views = views_of(kv_caches, kv_cache_config, kernels, HANDED, settings.ranks)
        stage = stage_of(self._config, layers)
        shards = [
            Shard(each.view, layers=stage, heads=heads_of(self._config, number, each))
            for each in views
        ]
        numbers = [each.group or 0 for each in views]
        worker, place = worker_numbers(self._config.parallel_config)
        self.handover = Handover(
            shards,
            self._model + "".join(each.notes for each in views),
            handing.terms,
            offers=handing.offers,
            pulls=handing.pulls,
            address=handing.terms.address_of(place),
            leads=worker == 0,
            parts=[(each, settings.groups[each]) for each in numbers],
        )
        rehearse(self.handover)
        self.handover.meet()

    @property
    def _model(self) -> str:
        """Return the name of the model in the forms of its rows, with the scales of its cache."""
        return self._settings.model + scales_of(self._config, self._settings.workers)

    def wait(self, timeout: float) -> bool:
        """Wait until blocks can be saved and loaded, at most so many seconds; return whether they
        can.

        Raises `InvalidTerms` with the sentence of a server that refuses the blocks.
        """
        return self._opened is not None and self._opened.wait(timeout)

    def statistics(self) -> Mapping[str, Sequence[Mapping[str, object]]]:
        """Return the figures of this worker's own store; none without one."""
        return {} if self._opened is None else self._opened.statistics()

    def close(self) -> None:
        """End the waits of graphs, the loads and saves, and what is handed over."""
        parts = (self.words, self.handover, self._opened)
        self.words = self.handover = self._opened = None
        for part in parts:
            if part is not None:
                part.close()


def check_kinds(views: Sequence[GroupView], settings: Settings) -> None:
    """Refuse layers of unequal width in a group where they cannot be served.

    Raises `IntegrationError`.
    """
    by_layer = settings.store.by_layer and len(views) != len(settings.groups)
    apart = settings.uses_store_server and len(views) != sum(settings.parts)
    if by_layer or apart:
        raise IntegrationError(
            f"Expected layers with pages of one kind in each group for by_layer, for several "
            f"workers or a shared store, got {len(views)} kinds in "
            f"{len(settings.groups)} groups. Leave these out, or choose the OffloadingConnector."
        )


def read_views(
    settings: Settings,
    kv_caches: Mapping[str, torch.Tensor],
    kv_cache_config: Any,
    kernels: Mapping[str, str],
) -> list[GroupView]:
    """Return a view of each group's layers, by head and token if blocks are stored so.

    One worker stores pages as they are if nothing is known of what lies in them.

    Raises `IntegrationError` as `views_of` does.
    """
    if not settings.reads_rows:
        return views_of(kv_caches, kv_cache_config, kernels)
    ranks = settings.ranks if settings.uses_store_server else None
    if settings.workers.size > 1:
        return views_of(kv_caches, kv_cache_config, kernels, BY_HEAD, ranks)
    try:
        return views_of(kv_caches, kv_cache_config, kernels, BY_TOKEN, ranks)
    except IntegrationError:
        if settings.store.block_size is not None:
            raise
        return views_of(kv_caches, kv_cache_config, kernels, ranks=ranks)
