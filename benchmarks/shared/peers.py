# SPDX-License-Identifier: Apache-2.0
"""Peers: other projects' released copies, called as their own integrations call them.

A peer is installed for the benchmark only (`pip install --no-deps lmcache==0.5.3`); nothing of
PortaKV needs it. Its bytes are checked like ours, and what it cannot carry out is listed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from portakv.cli.sides import Shape
from portakv.errors import PortaKVError

#: Takes a chunk, and whether the cache's rows go there (or come from there).
Move = Callable[[torch.Tensor, bool], object]

#: What `--peer` takes, and the release that figures are quoted for.
PEERS: Mapping[str, str] = {"lmcache": "0.5.3"}

# LMCache's name of each cache layout that occurs in shapes.toml.
FORMATS = {
    "layer | kv block token head dim": "NL_X_TWO_NB_BS_NH_HS",
    "layer | block kv token head dim": "NL_X_NB_TWO_BS_NH_HS",
    "layer | kv block head token dim": "NL_X_TWO_NB_NH_BS_HS",
    "layer | block token dim": "NL_X_NB_BS_HS",
    "block layer kv token head dim": "NB_NL_TWO_BS_NH_HS",
}
# Its slot kernel reads outside of a cache in which the layers of a block lie together, given the
# one address that its connector passes; with an address for each layer its bytes are wrong (0.5.3).
_BLOCKS_ONLY = ("block layer kv token head dim",)
_CHUNK = "kv layer token (head dim)"


class PeerMissing(PortaKVError):
    """A requested peer cannot be called here."""


class LMCache:
    """LMCache's compiled operations, without the rest of its package.

    Its slot kernel takes a slot for each token (``multi_layer_kv_transfer``, as the connectors of
    `lmcache/v1/gpu_connector/gpu_connectors.py` call it); its block kernel takes block ids
    (``multi_layer_block_kv_transfer``, as `lmcache/v1/multiprocess/transfer_context/base.py`
    calls it). Both read pointers of the layers from a tensor on the device, made beforehand.
    """

    name = "lmcache"  # what its rows are called

    def __init__(self) -> None:
        self._ops, self.release = load("lmcache", "c_ops")
        self._methods = (self._ops.TransferDirection.H2D, self._ops.TransferDirection.D2H)

    def kernels(self, shape: Shape, by_blocks: bool) -> list[str]:
        """Return the kernels that carry such a shape out.

        These are ``slot kernel``, and with block ids ``block kernel``. Raises `PeerMissing` if
        there is none.
        """
        if shape.cache not in FORMATS or shape.chunk != _CHUNK:
            raise PeerMissing(
                f"Expected a shape that LMCache has a format for, got a cache {shape.cache!r} with "
                f"chunks {shape.chunk!r}. Choose another --shape."
            )
        if shape.cache not in _BLOCKS_ONLY:
            return ["slot kernel", "block kernel"] if by_blocks else ["slot kernel"]
        if not by_blocks:
            raise PeerMissing(
                f"Expected a cache that LMCache's slot kernel can read, got {shape.cache!r}, "
                f"outside of which it reads. Measure the block kernel instead."
            )
        return ["block kernel"]

    def move_by(self, kernel: str, shape: Shape, slots: torch.Tensor, caches: Any) -> Move:
        """Return a call of one of its kernels, with everything that can be made beforehand.

        It moves from caches on a device to a chunk or back, by the slot of each token, int64 on
        the host.
        """
        tensors = caches if isinstance(caches, list) else [caches]
        form = getattr(self._ops.EngineKVFormat, FORMATS[shape.cache])
        device = tensors[0].device
        addresses = [tensor.data_ptr() for tensor in tensors]
        pointers = torch.tensor(addresses, dtype=torch.int64).to(device)
        if kernel == "slot kernel":
            placed = slots.to(device)
            return lambda chunk, store: self._ops.multi_layer_kv_transfer(
                chunk,
                pointers,
                placed,
                device,
                shape.slots,
                self._methods[store],
                form,
                block_size=shape.block_size,
                head_size=shape.dim,
            )
        blocks = (slots[:: shape.block_size] // shape.block_size).to(device)
        description = self._ops.PageBufferShapeDesc()
        description.kv_size = shape.kv
        description.nl = shape.layers
        description.nb = shape.blocks
        description.bs = shape.block_size
        latent = shape.cache == "layer | block token dim"
        description.nh = 1 if latent else shape.heads
        description.hs = shape.dim
        description.element_size = shape.torch_dtype.itemsize
        description.block_stride_elems = 0  # blocks without padding
        return lambda chunk, store: self._ops.multi_layer_block_kv_transfer(
            pointers,
            [chunk.data_ptr()],
            blocks,
            device,
            self._methods[store],
            description,
            shape.tokens,
            form,
            0,
        )


def load_peer(name: str) -> LMCache:
    """Return the peer of a name.

    Raises `PeerMissing` if it is unknown, not installed or does not load.
    """
    if name not in PEERS:
        raise PeerMissing(
            f"Expected --peer to be one of {', '.join(PEERS)}, got {name!r}. Correct the name."
        )
    return LMCache()


def load(package: str, module: str) -> tuple[ModuleType, str]:
    """Return a compiled module of a package whose own ``__init__`` is not run, and its release."""
    install = f"pip install --no-deps {package}=={PEERS[package]}"
    try:
        package_spec = find_spec(package)
        release = version(package)
    except (PackageNotFoundError, ValueError):
        package_spec = None
    if package_spec is None or not package_spec.submodule_search_locations:
        raise PeerMissing(
            f"Expected the peer {package!r}, but it is not installed. Install it for the benchmark "
            f"with: {install}"
        )
    folders = product(package_spec.submodule_search_locations, EXTENSION_SUFFIXES)
    paths = [Path(folder, module + suffix) for folder, suffix in folders]
    path = next(filter(Path.exists, paths), None)
    if path is None:
        raise PeerMissing(
            f"Expected a compiled {module} for Python "
            f"{sys.version_info.major}.{sys.version_info.minor}, but {package} {release} has none. "
            f"Install a wheel for it: {install}"
        )
    try:
        spec: Any = spec_from_file_location(f"{package}.{module}", path)
        loaded = module_from_spec(spec)
        spec.loader.exec_module(loaded)
    except ImportError as error:
        raise PeerMissing(
            f"Expected {package} {release} to load with torch {torch.__version__}, but it does "
            f"not: {error}. Install the release that fits this torch: {install}"
        ) from error
    return loaded, release
