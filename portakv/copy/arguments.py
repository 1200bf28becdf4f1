# SPDX-License-Identifier: Apache-2.0
"""The types of what callers hand over: ids, tensors in containers, memory objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from portakv.view.index import Index

#: Slots or blocks: int32 or int64, one dimension, on host or device.
Ids: TypeAlias = "Index | torch.Tensor | npt.NDArray[np.signedinteger[Any]] | Sequence[int]"
#: A tensor, or the containers that a layout names, outermost first.
Tensors: TypeAlias = "torch.Tensor | Sequence[Tensors] | Mapping[Any, Tensors]"


class HasTensor(Protocol):
    """A memory object of an engine: it has its tensors as ``.tensor``."""

    @property
    def tensor(self) -> Any:
        """`Tensors`; None or anything else is refused when it is used."""


#: A chunk.
MemoryObject: TypeAlias = "Tensors | HasTensor"
