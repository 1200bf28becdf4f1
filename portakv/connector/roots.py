# SPDX-License-Identifier: Apache-2.0
"""What a compiler is shown of registered caches: one tensor for each allocation.

Shown the layers of one allocation apart, it takes them for tensors that share memory, and works on
copies of them. Shown what they are views of, it works in place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from portakv.errors import LayoutError


class Roots:
    """Nested tensors as places in few.

    Attributes:
        leaves: the tensors, flat.
        tensors: what they lie in: a tensor that stands alone is itself.
        levels: the length of each level of the containers.
    """

    def __init__(self, nest: Any) -> None:
        self.leaves, self.levels = flatten(nest)
        groups: dict[int, list[torch.Tensor]] = {}
        for leaf in self.leaves:
            groups.setdefault(leaf.untyped_storage().data_ptr(), []).append(leaf)
        self._storages = [(group[0].untyped_storage(), at) for at, group in groups.items()]
        numbers = {storage: number for number, storage in enumerate(groups)}
        self.tensors = [_root(group) for group in groups.values()]
        self._addresses = [root.data_ptr() for root in self.tensors]
        self._places = []
        for leaf in self.leaves:
            number = numbers[leaf.untyped_storage().data_ptr()]
            self._places.append((number, leaf.data_ptr() - self._addresses[number]))

    def stand(self) -> bool:
        """Whether each allocation is where it was."""
        for storage, address in self._storages:  # noqa: SIM110 - a generator is twice as dear
            if storage.data_ptr() != address:
                return False
        return True

    def are(self, given: Sequence[torch.Tensor]) -> bool:
        """Whether these are the roots themselves, not a compiler's copies."""
        return self._addresses == [one.data_ptr() for one in given]

    def nested_in(self, given: Sequence[torch.Tensor]) -> Any:
        """The nested tensors as they lie in copies of the roots."""
        for root, copy in zip(self.tensors, given, strict=True):
            if (copy.shape, copy.stride()) != (root.shape, root.stride()):
                raise LayoutError(
                    f"A compiler handed over a copy of shape {tuple(copy.shape)} and strides "
                    f"{copy.stride()} of caches of {tuple(root.shape)} and {root.stride()}; keep "
                    f"the caches out of what it may lay out anew."
                )
        leaves = []
        for leaf, (number, behind) in zip(self.leaves, self._places, strict=True):
            storage = given[number].untyped_storage()
            start = given[number].data_ptr() - storage.data_ptr() + behind
            empty = torch.empty(0, dtype=leaf.dtype, device=leaf.device)
            at = start // leaf.element_size()
            leaves.append(empty.set_(storage, at, leaf.size(), leaf.stride()))
        return nested(leaves, self.levels)


def _root(group: list[torch.Tensor]) -> torch.Tensor:
    """What tensors of one storage lie in."""
    first = group[0]
    if len(group) == 1:
        return first
    base = first._base
    if base is not None and all(leaf._base is base for leaf in group):
        return base
    storage = first.untyped_storage()
    whole = torch.empty(0, dtype=first.dtype, device=first.device)
    return whole.set_(storage, 0, (storage.nbytes() // first.element_size(),), (1,))


def flatten(nest: Any) -> tuple[list[torch.Tensor], list[int]]:
    """The tensors of nested containers, and the length of each level."""
    level, levels = [nest], []
    while not isinstance(level[0], torch.Tensor):
        rows = []
        for one in level:
            if not isinstance(one, (list, tuple, Mapping)):
                raise LayoutError(
                    f"A {type(one).__name__} was found where tensors, lists, tuples or dicts were "
                    f"expected."
                )
            rows.append(list(one.values()) if isinstance(one, Mapping) else list(one))
        if not rows[0] or any(len(row) != len(rows[0]) for row in rows):
            raise LayoutError(
                f"Containers of {[len(row) for row in rows]} things were found in one level; all "
                f"hold the same number, and at least one."
            )
        levels.append(len(rows[0]))
        level = [item for row in rows for item in row]
    return level, levels


def nested(tensors: Sequence[torch.Tensor], levels: Sequence[int]) -> Any:
    """Lists in lists, as they were before `_flatten`."""
    level: list[Any] = list(tensors)
    for length in reversed(levels):
        level = [level[i : i + length] for i in range(0, len(level), length)]
    return level[0]
