# SPDX-License-Identifier: Apache-2.0
"""The blocks of vLLM's ranks and engines, in the store of the keeper of their host."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from portakv.integrations import IntegrationError
from portakv.integrations.vllm_caches import Settings
from portakv.integrations.vllm_graphs import GraphWaits
from portakv.integrations.vllm_handover import worker_numbers
from portakv.integrations.vllm_views import BY_HEAD, HANDED, kernels_of, views_of
from portakv.migrate import Shard
from portakv.serving import Blocks, Keeper, KeeperClient, KeeperIndex, place_of
from portakv.serving.handover import Handover
from portakv.serving.local import GroupView, LocalIndex, forms_of, found_in, log_start
from portakv.serving.no_store import NoBlocks, NoStore
from portakv.serving.start import rehearse, warm_up
from portakv.storage.form import Range

_log = logging.getLogger(__name__)
#: Seconds for which the start of an engine waits until a rank of it has joined a keeper.
PATIENCE = 30.0


class Rank(NamedTuple):
    """A rank of tensor parallelism.

    Attributes:
        number: of the rank.
        size: how many ranks there are.
        heads: the key-value heads of the model, in all ranks.
    """

    number: int
    size: int
    heads: int

    def part(self, view_heads: int, latent: bool) -> tuple[int, int, int] | None:
        """Return which heads of the model's a rank has: from, to, and of how many; None: all.

        Ranks have equal parts if the model has fewer heads than ranks.

        Args:
            view_heads: the heads in the caches of the rank.
            latent: all heads have one row in common, which each rank has.

        Raises `IntegrationError` for caches of another number of heads.
        """
        if latent or self.size == 1:
            return None
        first = self.number * self.heads // self.size
        past = first + max(1, self.heads // self.size)
        if past - first != view_heads:
            raise IntegrationError(
                f"Expected {past - first} of the model's {self.heads} key-value heads in the "
                f"caches of each of {self.size} ranks, got {view_heads}. Run one worker, or "
                f"choose the OffloadingConnector for this model."
            )
        return first, past, self.heads


def rank_of(config: Any, number: int) -> Rank:
    """Return a rank of tensor parallelism by its number."""
    size = getattr(config.parallel_config, "tensor_parallel_size", 1)
    heads = config.model_config.get_total_num_kv_heads() if size > 1 else 1
    return Rank(number, size, heads)


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


class KeptIndex(KeeperIndex):
    """The index of an engine's scheduler, whose process also serves if no other one does."""

    def __init__(self, settings: Settings) -> None:
        terms = settings.store
        terms.check_usable()
        self.keeper = Keeper(terms, settings.engine)
        try:
            super().__init__(self.keeper.place, settings.engine, len(settings.groups))
        except BaseException:
            self.keeper.close()
            raise

    def await_ranks(self, timeout: float) -> bool:
        """Wait until a rank has joined, or was refused, at most so many seconds; return whether
        one has joined.

        Without one, the log has a line. A rank that was refused may join later.
        """
        if self.answered(timeout):
            return not self.is_refused
        _log.warning(
            "No worker has joined the store of PortaKV in %s yet. Until one does, nothing is "
            "stored or loaded.",
            self.keeper.place.name,
        )
        return False

    def statistics(self) -> Mapping[str, Sequence[Mapping[str, object]]]:
        """Return the figures of the keeper's store; none while another process serves."""
        return self.keeper.figures()

    def close(self) -> None:
        """Leave the keeper, and serve no longer."""
        super().close()
        self.keeper.close()


def index_of(settings: Settings) -> LocalIndex | KeptIndex | NoStore:
    """Return the index of an engine's scheduler.

    With a keeper it waits until a worker has joined, or was refused. vLLM makes its workers before
    the scheduler.

    Raises `StoreError` for a folder that cannot be used, and `InvalidTerms` for the keeper of an
    engine with another number of groups.
    """
    if not settings.stores:
        return NoStore()
    if not settings.uses_keeper:
        index = LocalIndex.of(settings.engine)
        found = found_in(index.statistics(), len(settings.groups))
        _log_start(settings, found, "This process")
        return index
    kept = KeptIndex(settings)
    try:
        joined = kept.await_ranks(PATIENCE)
    except BaseException:
        kept.close()
        raise
    if joined:
        server = "This process" if kept.keeper.serves else "Another process of this host"
        _log_start(settings, max(kept.counts(), default=0), server)
    return kept


def _log_start(settings: Settings, found: int, server: str) -> None:
    """Log where an engine stores its blocks; see `log_start`."""
    log_start(settings.store, f"blocks of {settings.block_size} tokens", found, server)


class WorkerStore:
    """Where one worker saves and loads blocks: its own store, or that of the host's keeper.

    Args:
        config: vLLM's configuration.

    Attributes:
        handover: offers rows to other engines, and pulls theirs; None: not open.
        graphs: the waits of the worker's CUDA graphs.
    """

    def __init__(self, settings: Settings, config: Any) -> None:
        self._settings = settings
        self._config = config
        self._opened: LocalIndex | KeeperClient | None = None
        self.handover: Handover | None = None
        self.graphs = GraphWaits()

    def views(self, kv_caches: Mapping[str, torch.Tensor], kv_cache_config: Any) -> list[GroupView]:
        """Return a view of each group's layers; see `read_views`."""
        return read_views(self._settings, kv_caches, kv_cache_config, kernels_of(self._config))

    def open(
        self, views: Sequence[GroupView], number: int, layers: Mapping[str, int] | None = None
    ) -> Sequence[Blocks]:
        """Return the blocks of each group of layers, after copies that build kernels.

        A keeper may serve later. Until then nothing is loaded, and saves are dropped.

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
        self.graphs.open(views, self._settings.store)
        if not self._settings.stores:
            forms = forms_of(views, self._settings.model, None)
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
        if not settings.uses_keeper:
            index = LocalIndex.of(engine)
            parts = index.open(views, terms, settings.model, settings.block_size)
            self._opened = index
            return parts
        rank = rank_of(self._config, number)
        heads = [rank.part(each.view.heads, latent=each.view.kv == 1) for each in views]
        stage = stage_of(self._config, layers)
        terms_of_rows = (settings.block_size, heads, stage, terms.encoding)
        forms = forms_of(views, settings.model, *terms_of_rows)
        client = KeeperClient(place_of(terms, engine), forms, engine, views[0].view.device)
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
        (group,) = views_of(kv_caches, kv_cache_config, kernels, HANDED)
        heads = rank_of(self._config, number).part(group.view.heads, latent=group.view.kv == 1)
        shard = Shard(group.view, layers=stage_of(self._config, layers), heads=heads)
        worker, place = worker_numbers(self._config.parallel_config)
        self.handover = Handover(
            [shard],
            self._settings.model,
            handing.terms,
            offers=handing.offers,
            pulls=handing.pulls,
            address=handing.terms.address_of(place),
            leads=worker == 0,
        )
        rehearse(self.handover)
        self.handover.meet()

    def wait(self, timeout: float) -> bool:
        """Wait until blocks can be saved and loaded, at most so many seconds; return whether they
        can.

        Raises `InvalidTerms` with the sentence of a keeper that refuses the blocks.
        """
        opened = self._opened
        return opened.wait(timeout) if isinstance(opened, KeeperClient) else opened is not None

    def statistics(self) -> Mapping[str, Sequence[Mapping[str, object]]]:
        """Return the figures of this worker's own store; none without one."""
        opened = self._opened
        return opened.statistics() if isinstance(opened, LocalIndex) else {}

    def close(self) -> None:
        """End the waits of graphs, the loads and saves, and what is handed over."""
        words = self.graphs.words
        self.graphs.words = None
        if words is not None:
            words.close()
        handover = self.handover
        self.handover = None
        if handover is not None:
            handover.close()
        opened = self._opened
        self._opened = None
        if opened is not None:
            opened.close()


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
        return views_of(kv_caches, kv_cache_config)
    if settings.workers.size > 1:
        return views_of(kv_caches, kv_cache_config, kernels, BY_HEAD)
    try:
        return views_of(kv_caches, kv_cache_config, kernels)
    except IntegrationError:
        if settings.store.block_size is not None:
            raise
        return views_of(kv_caches, kv_cache_config)
