# SPDX-License-Identifier: Apache-2.0
"""`StoreTerms`, and the store of an engine whose scheduler and only worker are one process."""

from __future__ import annotations

import difflib
import errno
import logging
import os
import stat
import tempfile
import time
from collections import deque
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import partial
from hashlib import blake2b
from itertools import compress
from operator import not_
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, Protocol
from urllib.parse import unquote, urlsplit

import torch

from portakv.arguments import invalid, items, nbytes, one_of, seconds, size_text, text, whole
from portakv.errors import (
    InvalidTerms,
    PortaKVError,
    StoreBusy,
    StoreError,
    TransferTimeout,
    Unsupported,
)
from portakv.layout.encodings import PACK
from portakv.runtime.bounded import Bounded
from portakv.runtime.rate_limited_log import RateLimitedLog
from portakv.serving.bucket import BucketAnswers, bucket_of, check_bucket, look_up
from portakv.serving.groups import Validity
from portakv.storage import BlockForm, BlockStore, Disk
from portakv.storage.calls import Change
from portakv.storage.eviction import Pins
from portakv.storage.form import HEADER, Range
from portakv.storage.store import FormStore
from portakv.storage.tiers.base import Tier
from portakv.storage.work import Handle
from portakv.tasks import runtime
from portakv.view import KVView

# ------------------------------------------------------------------------------------------------
# In place of a store, for an engine that only hands requests over.


class NoBlocks:
    """The blocks of a group of layers of which none is stored.

    Args:
        form: that stored blocks would have.
    """

    def __init__(self, form: BlockForm) -> None:
        self.form = form

    def save(self, *args: Any, **terms: Any) -> NoReturn:
        """Raise `StoreError`."""
        raise StoreError(
            "Expected an engine with a store, got one that only hands requests over. Name a "
            "folder, host or bucket in kv_connector_extra_config."
        )

    load = save


# ------------------------------------------------------------------------------------------------
# Which weights a folder or a model has: the rows of one model are not those of another.

_warnings = RateLimitedLog(logging.getLogger(__name__))
#: The endings of files with weights.
ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
#: Bytes of a sample of a file, and how many are read: 32 files take some milliseconds.
SAMPLE = 4096
SAMPLES = 32
#: Elements of a tensor that are read. A model of 300 tensors takes some milliseconds.
ELEMENTS = 16


def checksum_of_weights(folder: str | os.PathLike[str]) -> str:
    """Return a checksum in hex of the weights in a folder, or in one file; empty if there are none.

    It depends on the names and sizes of the files of weights, and on samples of their bytes, so
    that two copies of a model are equal, on any host, and a model that was trained further is
    another one. Weights that differ in a few places only may have the same checksum.

    Raises `OSError` if a file cannot be read.
    """
    place = Path(folder)
    present = [place] if place.is_file() else []
    if place.is_dir():  # `Path.glob` lists nothing of a folder that it may not read
        present = [place / name for name in os.listdir(place)]
    files = sorted(path for path in present if path.suffix in ENDINGS)
    if not files:
        return ""
    checksum = blake2b(digest_size=8)
    for path in files:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            checksum.update(f"{path.name}:{size};".encode())
            for number in range(SAMPLES):
                file.seek((size - SAMPLE) * number // (SAMPLES - 1) if size > SAMPLE else 0)
                checksum.update(file.read(SAMPLE))
                if size <= SAMPLE:
                    break
    return checksum.hexdigest()


def checksum_if_here(model: str) -> str:
    """Return `checksum_of_weights` of a model's folder or file; empty if its name is neither.

    Empty also if the weights cannot be read here, which is logged.
    """
    try:
        return checksum_of_weights(model)
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as error:
        text = "The weights in %s cannot be read (%s): blocks of other weights of that name would "
        text += "be taken for theirs. Correct its permissions, or remove blocks when it changes."
        _warnings.warning(f"weights {model}", text, model, error.strerror, lines=1)
        return ""


@torch.no_grad()
def checksum_of_tensors(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Return a checksum in hex of the weights of a loaded model.

    It depends on the names, shapes and dtypes of the tensors, and on samples of their elements, on
    any device: a model that was trained further, or that has an adapter, is another one. Tensors
    without memory (``meta``) count by their names and shapes only.
    """
    checksum = blake2b(digest_size=8)
    for name, tensor in tensors:
        checksum.update(f"{name}:{[*tensor.shape]}:{tensor.dtype};".encode())
        if tensor.is_meta or not tensor.numel():
            continue
        count = min(ELEMENTS, tensor.numel())
        last = tensor.numel() - 1
        chosen = [last * number // max(1, count - 1) for number in range(count)]
        ids = torch.tensor(chosen, dtype=torch.int64, device=tensor.device)
        elements = tensor.detach().reshape(-1)[ids].cpu().contiguous()
        checksum.update(elements.view(torch.uint8).numpy().tobytes())
    return checksum.hexdigest()


_logger = logging.getLogger(__name__)
_log = RateLimitedLog(_logger)
#: Seconds to wait for a folder that another process has, and between two attempts.
PATIENCE = 10.0
PAUSE = 0.1
#: Tokens that a stored block has at least, unless ``block_size`` says otherwise. Each stored block
#: occupies the host, in calls that an engine's main thread makes, however small it is. On an H200,
#: blocks of 64 tokens in place of 16 took half of what stores add to a new prompt of 16,391 tokens,
#: and hits of 4,103 tokens came 5 % sooner (benchmarks/notes/engines.md).
TOKENS = 64
#: The same for an engine on a CPU that shares no store. There it costs more to compute the
#: tokens after the last stored block than to store and load more blocks: with blocks of 32, a hit
#: of 800 tokens took 7.7 ms of processor with stored blocks of 32, and 14.0 with those of 64, whose
#: last 32 tokens are computed. A save took as long with either.
TOKENS_ON_CPU = 1
#: What lets several engines use a folder, for errors about one that is busy.
SHARE = "To share it, set shared to true in each engine that uses it."
#: The value of ``by_layer`` with which graphs capture the waits of layers.
GRAPH: Literal["graph"] = "graph"
#: The choice of a store for each save, which an engine's store does not make.
AUTO = "auto"
#: The value of ``shared`` of an engine that leaves serving to a store server.
ATTACH: Literal["attach"] = "attach"
#: The end of the name of a raw form, next to a packed one.
RAW = " raw"
#: The bytes of the smallest image of a block: a header, and one page of rows.
LEAST_IMAGE = 2 * HEADER
#: The most changes of a store that wait for `StoreIndex.take_events`.
EVENTS = 1 << 16


@dataclass(frozen=True)
class StoreTerms:
    """Where the blocks of an engine are stored.

    Attributes:
        folder: of the disk tier, or several of them; None: no disk.
        capacity: bytes of the disk tier.
        host: bytes of host memory that cache blocks.
        staging: bytes of pinned memory for transfers.
        deadline: seconds after which a load gives up what has not landed.
        block_size: the tokens of a stored block, whose rows are then read by head and token; None:
            whole pages of the engine's blocks, as they are: of at least 64 tokens together, and on
            a CPU one block.
        by_layer: a request computes in the step that begins its load, and each layer waits for its
            rows; else the request waits until all have landed. "graph": the waits are captured in
            the engine's CUDA graphs.
        shared: the blocks are stored through a server, so that several engines of the host have
            one store. Each of them has this term. "attach": the engine never serves, not even
            while the store server of its folder restarts; nothing is stored or loaded meanwhile.
        bucket: the address of an object store, as `Remote` takes it: s3://bucket/prefix, gs://,
            az://; None: no bucket. Credentials come from the environment.
        bucket_options: of `Remote`, such as the endpoint and the region; none is secret.
        encoding: "pack": blocks of bf16 rows are stored packed, without loss, and have the size of
            the cache's blocks; None: raw. "auto" is refused, since keys depend on the encoding.

    Raises `InvalidTerms` for values that a term cannot have, and for no tier at all.
    """

    folder: str | Sequence[str] | None = None
    capacity: int = 64 << 30
    host: int = 4 << 30
    staging: int = 1 << 30
    deadline: float = 10.0
    block_size: int | None = None
    by_layer: bool | Literal["graph"] = False
    shared: bool | Literal["attach"] = False
    bucket: str | None = None
    bucket_options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    encoding: str | None = None

    def __post_init__(self) -> None:
        self._check_folders()
        for name in ("capacity", "host", "staging"):
            nbytes(name, getattr(self, name))
        seconds("deadline", self.deadline, above=True)
        if self.block_size is not None:
            whole("block_size", self.block_size, 1)
        if self.by_layer != GRAPH and not isinstance(self.by_layer, bool):
            raise invalid("by_layer", 'True, False or "graph"', self.by_layer, "Pass one of these.")
        self._check_shared()
        self._check_encoding()
        if self.bucket is not None:
            check_bucket(self.bucket, self.bucket_options)
            if self.bucket.startswith("file:"):
                check_private(unquote(urlsplit(self.bucket).path))
        elif self.bucket_options:
            raise InvalidTerms(
                "Expected bucket_options for a bucket, got no bucket. Pass its address as bucket."
            )
        if self.bucket is not None and self.by_layer:
            raise InvalidTerms(
                "Expected by_layer without a bucket, got both: a step would wait for the bucket. "
                "Leave one of them out."
            )
        if not self.folders and not self.host and self.bucket is None:
            raise InvalidTerms(
                "Expected a host tier, a folder for a disk tier or a bucket, got host=0 and none "
                "of the others. Pass one of them."
            )
        self.check_room([LEAST_IMAGE])

    def check_room(self, images: Iterable[int]) -> None:
        """Raise `InvalidTerms` unless a block fits into each part of the store that has a size.

        The sizes of a store server count for an engine that attaches to it.

        Args:
            images: bytes of the image of a block of each form; see `image_of`.
        """
        if self.attaches:
            return
        size = max(images)
        rooms = {"staging": self.staging}
        if self.folders:
            rooms["capacity of each folder"] = self.capacity // len(self.folders)
        elif self.bucket is None:
            rooms["host"] = self.host
        for name, room in rooms.items():
            if room < size:
                raise InvalidTerms(
                    f"Expected {name} to have room for a block of {size} bytes, got {room} bytes. "
                    f"Give it more."
                )

    def check_usable(self) -> None:
        """Raise `InvalidTerms` for a folder that this process cannot make, or cannot write.

        A store server makes and writes the folder of an engine that attaches to it.
        """
        for folder in () if self.attaches else self.folders:
            check_usable(folder)

    def _check_folders(self) -> None:
        """Raise `InvalidTerms` for a folder that cannot be one, or that is there twice."""
        for folder in self.folders:
            text("folder", folder)
            check_private(folder)
        if len({os.path.realpath(folder) for folder in self.folders}) < len(self.folders):
            raise invalid("folder", "different folders", self.folder, "Pass each once.")

    def _check_shared(self) -> None:
        """Raise `InvalidTerms` for another value of ``shared``, and for one without its folder."""
        if self.shared != ATTACH and not isinstance(self.shared, bool):
            raise invalid("shared", 'True, False or "attach"', self.shared, "Pass one of these.")
        if self.attaches and not self.folders:
            raise InvalidTerms(
                'Expected a folder for shared="attach", got none: a store server is found by its '
                "folder. Pass the folder that it serves."
            )

    def _check_encoding(self) -> None:
        """Raise `InvalidTerms` for an unknown encoding, and for one with a term that it lacks."""
        if self.encoding is None:
            return
        if self.encoding == AUTO:
            raise InvalidTerms(
                f"Expected encoding to be {PACK!r} or None in an engine's store, got {AUTO!r}: "
                f"packed blocks have the size of the engine's blocks, so that keys depend on the "
                f"encoding, and a choice for each save comes too late. Pass {PACK!r} if "
                f"portakv.choose_encoding says for your cache and your link that it pays."
            )
        one_of("encoding", self.encoding, (PACK,))
        if self.by_layer:
            raise InvalidTerms(
                "Expected by_layer without an encoding, got both: each layer would wait while its "
                "rows are unpacked. Leave one of them out."
            )

    @property
    def attaches(self) -> bool:
        """Return whether the engine leaves serving to a store server."""
        return self.shared == ATTACH

    @property
    def waits_in_graphs(self) -> bool:
        """Return whether graphs capture the waits of layers."""
        return self.by_layer == GRAPH

    @property
    def folders(self) -> tuple[str, ...]:
        """Return the folders of the disk tier."""
        if self.folder is None:
            return ()
        if isinstance(self.folder, str):
            return (self.folder,)
        return (*items("folder", self.folder, "folders"),)

    @classmethod
    def of(cls, terms: Mapping[str, object], without: Container[str] = ()) -> StoreTerms:
        """Return terms as a configuration file has them.

        ``without``: names of terms that an integration has no use for.

        Raises `InvalidTerms` for a name that is not a term, or is one of these.
        """
        check_names(terms, term_names(without))
        return cls(**terms)  # type: ignore[arg-type]

    def tiers(self) -> list[Tier]:
        """Return the tiers of the store, not open yet: the disk, then the bucket.

        Raises `StoreError` without the package for object stores, or for an option that the
        package refuses.
        """
        tiers = list[Tier]()
        if self.folders:
            tiers.append(Disk(*self.folders, capacity=self.capacity))
        if self.bucket is not None:
            tiers.append(bucket_of(self.bucket, self.bucket_options))
        return tiers


def term_names(without: Container[str] = ()) -> list[str]:
    """Return the names of the terms of a store, without those that a door has no use for."""
    return [each.name for each in fields(StoreTerms) if each.name not in without]


def check_names(terms: Iterable[str], names: Sequence[str], place: str = "") -> None:
    """Raise `InvalidTerms` for a term of a configuration that is none of the names.

    ``place``: of the terms, such as " in hand_over".
    """
    for name in terms:
        if name not in names:
            near = difflib.get_close_matches(str(name), names, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise InvalidTerms(
                f"Expected some of {', '.join(names)}{place}, got {name!r}.{hint} Correct it, or "
                f"leave it out."
            )


def log_start(terms: StoreTerms, what: str, found: int | None, server: str) -> None:
    """Log where an engine stores its blocks, as one line.

    Args:
        what: is stored, such as "blocks of 64 tokens".
        found: blocks that the store has already; None: not known yet.
        server: the process that has the store.
    """
    places = list[str]()
    if terms.folders:
        disk = f"{', '.join(terms.folders)} of {size_text(terms.capacity)}"
        places.append(f"the disk tier in {disk}")
    if terms.bucket is not None:
        places.append(f"the bucket {terms.bucket}")
    if terms.host:
        places.append(f"{size_text(terms.host)} of host memory")
    there = "" if found is None else f" {found} are there."
    _logger.info(
        "PortaKV stores %s in %s, with %s of staging.%s %s serves them.",
        what,
        " and ".join(places),
        size_text(terms.staging),
        there,
        server,
    )


def found_in(statistics: Mapping[str, Sequence[Mapping[str, Any]]], parts: int) -> int:
    """Return how many blocks of ``parts`` parts the disk of a store has."""
    slots = statistics.get("disk_slots", ())
    return int(sum(each["value"] for each in slots if each["state"] == "used")) // parts


class GroupView(NamedTuple):
    """The caches of a group of layers in one worker.

    Attributes:
        view: of all its layers, in their order.
        notes: what else fixes the bytes of a block, such as the kernel that writes them.
        row_tokens: the tokens of a row of the view: 1, or those of a page that moves whole; None: a
            block is the states of the layers after a token.
        group: its number. A group has several views if its layers have pages of several kinds.
        replicated: each rank of tensor parallelism has the same rows or states.
        heads: by which ranks divide states, of the whole model; 0: a rank has one of as many parts
            as there are ranks.
    """

    view: KVView
    notes: str = ""
    row_tokens: int | None = 1
    group: int | None = None
    replicated: bool = False
    heads: int = 0


def numbers_of(groups: Iterable[int | None]) -> list[int]:
    """Return the number of the group of each view; of those without one their place."""
    return [place if number is None else number for place, number in enumerate(groups)]


def check_private(folder: str) -> None:
    """Raise `InvalidTerms` for a folder that exists and that others may write.

    Who can write a folder decides what an engine computes with.
    """
    try:
        entry = os.stat(folder)
    except FileNotFoundError:
        return
    except OSError as error:
        raise InvalidTerms(f"Expected a folder, got {folder!r}: {error}. Pass another.") from None
    if not stat.S_ISDIR(entry.st_mode):
        raise InvalidTerms(f"Expected a folder, got {folder!r}, which is a file. Pass another.")
    if entry.st_mode & 0o022 or entry.st_uid not in (os.getuid(), 0):
        raise InvalidTerms(
            f"Expected a folder that only this user may write, got {folder!r}, which others may "
            f"write. Run chmod go-w on it, or pass another."
        )


def check_usable(folder: str) -> None:
    """Raise `InvalidTerms` for a folder that this process cannot make, or cannot write.

    Makes a folder there, or where the first missing part of the path would be, and removes it. A
    full disk is not an error, since a store gives up older blocks.
    """
    place = existing_part(folder)
    try:
        with tempfile.TemporaryDirectory(prefix=".portakv-", dir=place):
            pass
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return
        raise InvalidTerms(
            f"Expected a folder that this process can make and write, got {folder!r}: {place} "
            f"takes no new folder ({error.strerror}). Pass another, or make it writable."
        ) from None


def existing_part(folder: str) -> str:
    """Return a folder, or else the nearest one above it that exists."""
    place = os.path.abspath(folder)
    while not os.path.exists(place):
        place = os.path.dirname(place)
    return place


def image_of(nbytes: int) -> int:
    """Return the bytes of the image of a block whose rows take some bytes."""
    return HEADER + -(-nbytes // HEADER) * HEADER


def forms_of(
    groups: Sequence[GroupView],
    model: str,
    block_size: int | None,
    heads: Sequence[Range | None] | None = None,
    layers: Range | None = None,
    encoding: str | None = None,
) -> list[BlockForm]:
    """Return the form of the blocks of each group of layers; forms of equal shape differ.

    The blocks of a group whose rows cannot be packed stay raw, and the log has a line.

    Args:
        groups: the caches of each group of layers.
        model: the name of the model, which blocks of another model do not have.
        block_size: the tokens of a stored block; None: of each view's blocks.
        heads: of each group those of the model's that the view has; None: all.
        layers: of the model that the view of the only group has; None: all.
        encoding: of the stored blocks, as in `StoreTerms`.

    Raises `InvalidTerms` for a size that blocks of a view cannot have, and for packed blocks of
    another size than those of the view.
    """
    if block_size is not None:
        whole("block_size", block_size, 1)
    forms = list[BlockForm]()
    for number, (view, notes, tokens, *_) in enumerate(groups):
        if len(groups) > 1:
            notes = f"group {number} of {len(groups)} {notes}".rstrip()
        part = None if heads is None else heads[number]
        rows = None
        if block_size is not None and tokens is not None:
            rows, rest = divmod(block_size, tokens)
            if rest:
                raise InvalidTerms(
                    f"Expected stored blocks of a multiple of {tokens} tokens, which a page has, "
                    f"got {block_size}. Pass a multiple."
                )
        of = partial(
            BlockForm.of, view, model, layers=layers, heads=part, block_size=rows, notes=notes
        )
        forms.append(of() if encoding is None else _packed(of, encoding, view, number))
    return forms


def _packed(of: Callable[..., BlockForm], encoding: str, view: KVView, number: int) -> BlockForm:
    """Return the packed form of the blocks of a group, or the raw one if they cannot be packed.

    ``of`` makes the form, by default the raw one. Raises `InvalidTerms` for stored blocks of
    another size than those of the view.
    """
    try:
        form = of(encoding=encoding)
    except Unsupported as error:
        _log.warning("encoding", "The blocks of group %d of layers stay raw. %s", number, error)
        return of()
    if form.block_size != view.block_size:
        raise InvalidTerms(
            f"Expected stored blocks of {view.block_size} tokens with the encoding {encoding!r}, "
            f"as the cache's blocks have, got {form.block_size}: a packed block moves only whole. "
            f"Leave block_size out, or give the cache blocks of {form.block_size} tokens."
        )
    return form


def with_raw(forms: Mapping[str, BlockForm]) -> dict[str, BlockForm]:
    """Return forms by their names, and the raw forms for blocks that do not fit into packed ones.

    The name of a raw form is that of the packed one, with `RAW`.
    """
    raw = {f"{name}{RAW}": form.raw for name, form in forms.items() if form.encoding}
    return {**forms, **raw}


def alike_in(tiers: Sequence[Tier], forms: Sequence[BlockForm]) -> list[BlockForm]:
    """Return the other forms of blocks in a store: the raw ones, for blocks that do not fit into
    packed slots, and those of packed blocks that tiers have. Leaves lossy forms out."""
    present = [x for form in forms for tier in tiers for x in tier.forms(form)]
    raw = {form.raw for form in forms}
    packed = [form for form in present if form.raw in raw and not form.lossy]
    return [x for x in dict.fromkeys([*raw, *packed]) if x not in forms]


def _warn_of_packed(
    groups: Sequence[GroupView], forms: Sequence[BlockForm], tiers: Sequence[Tier]
) -> None:
    """Log a line if tiers have packed blocks that the blocks of a cache are too small or too large
    for: they move only whole."""
    for (view, *_), form in zip(groups, forms, strict=True):
        if view.block_size != form.block_size and any(x.encoding for x in alike_in(tiers, [form])):
            _log.warning(
                "packed",
                "Packed blocks of %d tokens are in the store, which caches with blocks of %s "
                "tokens cannot read: the engine computes them. "
                "Give the caches blocks of %d tokens.",
                form.block_size,
                view.block_size,
                form.block_size,
            )


def open_store(
    forms: BlockForm | Mapping[str, BlockForm],
    terms: StoreTerms,
    tiers: Sequence[Tier],
    patience: float,
    **options: Any,
) -> BlockStore:
    """Open the store of terms, with their ``tiers``; wait for a folder that another process has,
    at most so many seconds. ``options``: of `BlockStore`."""
    until = time.monotonic() + patience
    while True:
        try:
            return BlockStore(forms, staging=terms.staging, host=terms.host, tiers=tiers, **options)
        except StoreBusy as error:
            if time.monotonic() >= until:
                raise StoreBusy(f"{error} {SHARE}") from None
            time.sleep(PAUSE)


class Stored(Protocol):
    """The blocks of one form that can be loaded, as far as is known here: a `FormStore`, or a copy
    of a server's index."""

    def has(self, key: bytes) -> bool:
        """Return whether a block can be loaded."""

    def has_each(self, keys: Sequence[bytes]) -> list[bool]:
        """Return which blocks can be loaded."""

    def leading(self, keys: Sequence[bytes]) -> int:
        """Return how many leading blocks can be loaded."""


class StoreIndex:
    """What a scheduler knows of the blocks of a store, an `Index` of a `SchedulerSide`. This base
    knows none.

    Attributes:
        validity: which prefixes the groups of layers can serve; None: those of which the store has
            all blocks of all groups.
        bucket: what is known of lookups in the store's bucket; None: it has none.
        block_bytes: of the rows of a block in all groups, without states.
    """

    def __init__(self) -> None:
        self.validity: Validity | None = None
        self.bucket: BucketAnswers | None = None
        self.block_bytes = 0
        self._losses = 0
        self._number = 0  # of the latest change
        self._events = deque[Change](maxlen=EVENTS)  # that wait for `take_events`
        self._recorded = 0  # of how many groups changes are kept

    @property
    def losses(self) -> int:
        """Return a number that changes if a block may have been lost."""
        self._follow()
        bucket = self.bucket
        return self._losses if bucket is None else self._losses + bucket.expired

    def leading(self, keys: Sequence[bytes], first: int = 0) -> int | None:
        """Return how many leading blocks can be loaded; None if a bucket has yet to answer.

        Waits for no bucket: others ask it for the blocks that are not known here. ``first``: the
        number of the first block in its request.
        """
        groups = self._stored()
        bucket = self.bucket
        if not groups:
            return 0
        try:
            known = self._rules(len(groups)).longest(
                first,
                len(keys),
                lambda number, count: min(x.leading(keys[:count]) for x in groups[number]),
                lambda number, count: _in_all(groups[number], keys[:count]),
            )
            return known if bucket is None else bucket.leading(keys, known, first)
        except PortaKVError:  # it was closed
            return 0

    def has(self, key: bytes, states: bool = True) -> bool:
        """Return whether a block can be loaded.

        ``states``: with those at its end, of groups that have states. Else only its rows.
        """
        groups = self._stored()
        if not groups:
            return False
        numbers = self._rules(len(groups)).numbers(states)
        try:
            return all(part.has(key) for number in numbers for part in groups[number])
        except PortaKVError:  # it was closed
            return False

    def _stored(self) -> Sequence[Sequence[Stored]]:
        """Return the blocks of the parts of each group; nothing without a store."""
        return ()

    def _rules(self, groups: int) -> Validity:
        """Return which prefixes so many groups of layers can serve."""
        if self.validity is None:
            self.validity = Validity.of_rows(groups)
        return self.validity

    def record(self) -> None:
        """Keep changes from now on for `take_events`."""
        self._recorded = 1

    def take_events(self) -> list[Change]:
        """Return the changes of the store since the last call, at most the latest `EVENTS`.

        Of a block of several groups, those of the first group, unless `record` says otherwise. Some
        are missing if changes were missed.
        """
        self._follow()
        with runtime().lock:
            made = [*self._events]
            self._events.clear()
        return made

    def _follow(self) -> None:
        """Take note of the changes of the store since the last call."""

    def bytes_of(self, counts: Mapping[str, int]) -> dict[str, int]:
        """Return the bytes of blocks that a scheduler side has counted; none without a store."""
        if not self.block_bytes:
            return {}
        return {
            "landed_bytes": counts.get("landed_blocks", 0) * self.block_bytes,
            "stored_bytes": counts.get("stored_blocks", 0) * self.block_bytes,
        }


class LocalIndex(StoreIndex):
    """The index of the blocks that a process can load; it knows none without a store.

    An engine makes its scheduler's side and its worker's side separately, in one process. They
    share the index of the engine's name.
    """

    def __init__(self) -> None:
        super().__init__()
        self._store: BlockStore | None = None
        self._groups: Sequence[Sequence[FormStore]] = ()

    @staticmethod
    def of(engine: str) -> LocalIndex:
        """Return the index of an engine."""
        return _indices.get_or_make(engine, LocalIndex)

    def open(
        self,
        groups: Sequence[GroupView],
        terms: StoreTerms,
        model: str,
        block_size: int | None,
        patience: float = PATIENCE,
    ) -> list[FormStore]:
        """Open the store of the blocks of views, and return its part for each view.

        Args:
            groups: the caches of each group of layers.
            model: the name of the model, which blocks of another model do not have.
            block_size: the tokens of a stored block; None: of each view's blocks.
            patience: seconds to wait for a folder that another process has, such as an engine that
                was killed a moment ago.

        Raises:
            InvalidTerms: a size that blocks of a view cannot have, a name that another engine of
                this process has.
            StoreError, StoreBusy: memory for no block; a folder that another process has; options
                of a bucket that are refused.

        A bucket that does not answer is no error: its blocks are misses until it does.
        """
        if self._store is not None:
            raise InvalidTerms(
                "Expected an engine_id that no other engine of this process has, got one that is "
                "in use. Leave it out, or pass another."
            )
        made = forms_of(groups, model, block_size, encoding=terms.encoding)
        terms.check_room([form.raw.image_bytes for form in made])
        terms.check_usable()
        tiers = terms.tiers()
        names = [f"group {number}" for number, _ in enumerate(made)]
        forms = with_raw(dict(zip(names, made, strict=True)))
        only = made[0] if len(forms) == 1 else None
        self._store = store = open_store(only or forms, terms, tiers, patience)
        _warn_of_packed(groups, made, tiers)
        store.listen()  # later changes are kept
        stored: list[FormStore] = [store] if only else [store.of(name) for name in names]
        numbers = numbers_of(each.group for each in groups)
        self._groups = [
            [part for part, own in zip(stored, numbers, strict=True) if own == number]
            for number in range(max(numbers) + 1)
        ]
        rows = zip(groups, made, strict=True)
        self.block_bytes = sum(form.payload_bytes for each, form in rows if each.row_tokens)
        if terms.bucket is not None:
            rules = self._rules(len(self._groups))
            self.bucket = BucketAnswers(self._look_up, partial=bool(rules.partial))
        self._losses += 1
        return stored

    def wait(self, timeout: float) -> bool:
        """Return whether blocks can be saved and loaded; waits for nothing."""
        return self._store is not None

    def close(self) -> None:
        """Close the store, and know no block any longer."""
        store = self._store
        self._store = None
        self._groups = ()
        bucket = self.bucket
        self.bucket = None
        if store is None:
            return
        try:
            store.close()
        except TransferTimeout as error:
            if bucket is None:
                raise
            # The request of a bucket ends by its own timeout, and the engine need not wait for it.
            _log.warning("close", "The store of an engine was left open: %s", error)

    def _look_up(self, keys: Sequence[bytes], first: int) -> None:
        """Begin a lookup in the bucket."""
        groups = self._groups
        bucket = self.bucket
        if groups and bucket is not None:
            rules = self._rules(len(groups))
            look_up(groups, keys, partial(bucket.ended, keys), rules, first)

    def _stored(self) -> Sequence[Sequence[FormStore]]:
        return self._groups

    def keep(self, keys: Sequence[bytes], first: int = 0) -> KeptPrefix:
        """Keep blocks in host memory; see `KeptPrefix`."""
        return KeptPrefix(self._groups, self._rules(len(self._groups)), keys, first)

    def statistics(self) -> Mapping[str, Sequence[Mapping[str, object]]]:
        """Return the store's statistics; none without a store."""
        store = self._store
        return {} if store is None else store.statistics()

    def _follow(self) -> None:
        store = self._store
        if store is None:
            return
        first = next(iter(store.forms))
        with suppress(PortaKVError):  # it was closed
            for change in store.listen():
                if not change.stored or change.number != self._number + 1:  # some may be missed
                    self._losses += 1
                self._number = change.number
                if self._recorded and change.form in (first, f"{first}{RAW}"):
                    self._events.append(change)


class KeptPrefix:
    """Leading blocks of a request that stay in host memory until `release`: no load misses them.

    Blocks of disks and buckets are read into host memory first.

    Args:
        groups: the parts of a store, of each group of layers.
        rules: which prefixes the groups can serve.
        keys: of the blocks.
        first: the number of the first one in its request.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[FormStore]],
        rules: Validity,
        keys: Sequence[bytes],
        first: int,
    ) -> None:
        self._groups = groups
        self._rules = rules
        self._keys = keys
        self._first = first
        self._reads: list[Handle] | None = None
        self._pins = list[Pins]()
        self._count: int | None = None

    def count(self) -> int | None:
        """Return how many leading blocks are kept; None while they are read."""
        if self._count is None:
            try:
                if all(read.done() for read in self._reads or ()):
                    self._count = self._keep()
            except PortaKVError:  # the store was closed, or has no host memory
                self._count = 0
        return self._count

    def release(self) -> None:
        """Keep the blocks no longer. A second call does nothing."""
        for pins in self._pins:
            pins.release()
        self._pins.clear()

    def _keep(self) -> int | None:
        """Pin what is in host memory, and begin to read the rest once; return as `count`."""
        many = len(self._keys)
        lacking = list[tuple[FormStore, list[bytes]]]()
        for group, parts in zip(self._rules.groups, self._groups, strict=True):
            needed = self._keys[self._rules.first_needed(group, self._first, many) :]
            for part in parts:
                here = self._pin(part, needed)
                if not all(here):
                    lacking.append((part, [*compress(needed, map(not_, here))]))
        if not lacking:
            return many
        if self._reads is None:
            self._reads = [part.prefetch(keys, "normal") for part, keys in lacking]
            return None
        every = [
            [
                all(each)
                for each in zip(*(self._pin(part, self._keys) for part in parts), strict=True)
            ]
            for parts in self._groups
        ]
        return self._rules.longest(
            self._first,
            many,
            lambda number, most: [*every[number][:most], False].index(False),
            lambda number, most: every[number][:most],
        )

    def _pin(self, part: FormStore, keys: Sequence[bytes]) -> list[bool]:
        """Pin blocks of a part; return which ones are in host memory."""
        pins = part.pin(keys)
        self._pins.append(pins)
        here: list[bool] = pins.here.tolist()
        return here


def _in_all(parts: Sequence[Stored], keys: Sequence[bytes]) -> list[bool]:
    """Return which blocks all parts of a group have."""
    return [all(each) for each in zip(*(part.has_each(keys) for part in parts), strict=True)]


_indices: Bounded[str, LocalIndex] = Bounded("indices of engines", 256)
