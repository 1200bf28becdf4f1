# SPDX-License-Identifier: Apache-2.0
"""The encoding and the figures of rows that cross through staging buffers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from portakv.arguments import first_few
from portakv.copy.choose_encoding import EncodingChoice
from portakv.errors import InvalidTerms, PackOverflow, PortaKVError, Unsupported
from portakv.layout.encodings import FP8, PACK, Fp8
from portakv.layout.encodings import Pack as Pack
from portakv.runtime.transfer import Statistics

#: The owner of the rows chooses.
AUTO = "auto"
#: What callers pass: the usual parameters, the owner's choice, or other parameters.
Encoding: TypeAlias = Literal["pack", "auto"] | Pack


def pack_of(encoding: object) -> Pack | None:
    """Return the parameters of an encoding, for ``auto`` the usual ones until the owner has chosen;
    None for raw rows.

    Raises `Unsupported` for ``fp8``, and `InvalidTerms` for another value.
    """
    if encoding is None or isinstance(encoding, Pack):
        return encoding
    if encoding in (AUTO, PACK):
        return Pack()
    if isinstance(encoding, Fp8) or encoding == FP8:
        why = (
            f"mapped memory is copied bit by bit, so that the way of a pull would decide whether "
            f"rows are rounded. Pull with {PACK!r} or raw, and round by a copy into an {FP8!r} view"
        )
        raise Unsupported(f"A pull whose rows cross in {FP8!r}", why)
    raise InvalidTerms(
        f"Expected encoding to be {PACK!r}, {AUTO!r}, a Pack or None, got {encoding!r}. Pass one "
        f"of these."
    )


def joined_error(errors: Sequence[PortaKVError]) -> PortaKVError | None:
    """Return the error of a pull whose parts have these errors; None if there are none.

    Blocks that did not fit are named together, each once. Another error comes before them.
    """
    overflows = list[PackOverflow]()
    for error in errors:
        if not isinstance(error, PackOverflow):
            return error
        overflows.append(error)
    if not overflows:
        return None

    first = overflows[0]
    each = [zip(error.src_blocks, error.dst_blocks, strict=True) for error in overflows]
    pairs = dict.fromkeys(pair for named in each for pair in named)
    if pairs.keys() == {*zip(first.src_blocks, first.dst_blocks, strict=True)}:
        return first
    src = tuple([pair[0] for pair in pairs])
    dst = tuple([pair[1] for pair in pairs])
    return PackOverflow(
        f"Expected blocks that fit into slots of {PACK!r}, got {len(src)} that do not, blocks "
        f"{first_few(src)} of the owners. Pull these blocks from a raw view into a raw view.",
        src,
        dst,
    )


@dataclass(frozen=True, slots=True)
class PullStatistics(Statistics):
    """The progress of a pull.

    Attributes:
        wire_nbytes: bytes that have crossed through staging buffers; 0 for mapped memory, which is
            never packed.
        packed: some of these bytes were packed rows.
        blocks_raw: blocks that did not fit into slots and were sent raw afterwards, counted once
            for each slice of a pull that had them.
        raw_because: why rows crossed raw although an encoding was requested, as a clause; empty if
            none did for another reason than ``blocks_raw``.
        choices: with ``encoding="auto"``, the choices with their figures, one for each owner that
            sends rows that could be packed, and each group of its layers. Parts of a pull that
            follows a mark have a choice each.
    """

    wire_nbytes: int = 0
    packed: bool = False
    blocks_raw: int = 0
    raw_because: str = ""
    choices: tuple[EncodingChoice, ...] = ()
