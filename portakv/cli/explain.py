# SPDX-License-Identifier: Apache-2.0
"""`portakv explain`: the plan of a copy between two layouts, its backend, and why that one."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch

from portakv.backends.base import Capabilities
from portakv.cli import explain_link
from portakv.cli.candidates import as_json, candidates_for_plan, forced_backend, print_candidates
from portakv.cli.console import Column, print_json, print_prose, print_table
from portakv.cli.sides import BLOCK_SIZE, TOKENS, Extents, Side, describe_tensors, make_sides
from portakv.plan.plan import CopyPlan, Nest
from portakv.plan.plan import Side as Units
from portakv.registry.prepared import prepare
from portakv.registry.registry import ENVIRONMENT, Choice, choose
from portakv.runtime.bounded import caches
from portakv.runtime.devices import usable_device, usual_device

_DESCRIPTION = """\
Prints the plan of a copy between two layouts: the loops a person would write,
the tokens moved for each index read (unit), the widest access (vector) and the
bytes of a token; then the backend that carries it out and what the others
answered. The plan is made for example tensors, contiguous or in the memory
order that a preset names; nothing is moved. With --host it explains instead
which engine copies between a device and host memory, and takes no layouts.
With --caches it lists what the library remembers.

What is not said is taken as 32 layers, keys and values, 32 heads, 128 elements
(576 where a side has no kv), float16. An axis that one side does not write has
extent 1 on both. Presets bring the extents that they fix, and those that fix a
width count bytes (uint8)."""


@dataclass(frozen=True, slots=True)
class Explained:
    """A plan between two sides, and what came of it."""

    src: Side
    dst: Side
    plan: CopyPlan
    taken: Choice
    why: str


def add_to(verbs: Any) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "explain",
        help="the plan between two layouts, and which backend carries it out",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name in ("src", "dst"):
        metavar = f"{name.upper()}_LAYOUT"
        parser.add_argument(name, nargs="?", metavar=metavar, help="a layout string or a preset")
    add_extents(parser.add_argument_group("extents"))
    _add_index(parser.add_argument_group("indices"))
    parser.add_argument("--device", help="a torch device (default: the accelerator, else cpu)")
    parser.add_argument("--backend", metavar="NAME", help=f"force it, unless {ENVIRONMENT} is set")
    parser.add_argument("--json", action="store_true", help="print one JSON value")
    parser.add_argument(
        "--caches", action="store_true",
        help="list instead everything in the library that remembers: its name, size and limit",
    )  # fmt: skip
    explain_link.add_options(parser, _positive)
    parser.set_defaults(run=run, misunderstood=parser.error)


def add_extents(group: Any) -> None:
    """Add the options that say the extents of two sides."""
    group.add_argument("--layers", type=_positive, metavar="N")
    group.add_argument("--kv", type=_positive, metavar="N", help="2 for keys and values")
    group.add_argument("--heads", type=_positive, metavar="N", help="KV heads")
    group.add_argument(
        "--dim", type=_positives, metavar="N[,N]", help="elements: of all kv, or for each kv"
    )
    group.add_argument(
        "--block-size",
        type=_pair,
        metavar="N[,N]",
        default=(BLOCK_SIZE, BLOCK_SIZE),
        help=f"tokens of a block: of both sides, or source, destination (default: {BLOCK_SIZE})",
    )
    group.add_argument(
        "--blocks",
        type=_positive,
        metavar="N",
        help="blocks of a paged side (default: for --tokens)",
    )
    group.add_argument(
        "--tokens", type=_positive, metavar="N", default=TOKENS, help=f"default: {TOKENS}"
    )
    group.add_argument("--dtype", type=_dtype, help="a torch dtype (default: float16)")


def _add_index(group: Any) -> None:
    group.add_argument(
        "--index",
        choices=("slots", "blocks"),
        default="slots",
        help="paged sides are addressed by a slot mapping or a block table (opaque pages: always "
        "blocks); chunks by consecutive tokens (default: slots)",
    )
    for side in ("src", "dst"):
        group.add_argument(
            f"--{side}-step", type=_step, metavar="N", help="tokens for each id; 0: no ids"
        )


def said_extents(asked: argparse.Namespace) -> Extents:
    """What the options of `add_extents` were given."""
    return Extents(
        asked.layers, asked.kv, asked.heads, asked.dim, asked.block_size, asked.blocks,
        asked.tokens, asked.dtype,
    )  # fmt: skip


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} was given, expected a number above 0")
    return int(text)


def _step(text: str) -> int:
    return 0 if text == "0" else _positive(text)


def _positives(text: str) -> tuple[int, ...]:
    return tuple(_positive(word.strip()) for word in text.split(","))


def _pair(text: str) -> tuple[int, int]:
    numbers = _positives(text)
    if len(numbers) > 2:
        raise argparse.ArgumentTypeError(f"{text!r} was given, expected one number or two")
    return numbers[0], numbers[-1]


def _dtype(text: str) -> torch.dtype:
    found = getattr(torch, text.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise argparse.ArgumentTypeError(f"{text!r} is no torch dtype; write float16, uint8, ...")
    return found


def run(asked: argparse.Namespace) -> int:
    """Print the plan and the candidates.

    Raises:
        LayoutError, Unsupported, BackendUnavailable, DeviceMismatch: what the copy would raise.
    """
    if asked.caches:
        return _caches(asked.json)
    why = explain_link.misplaced(asked)
    if why:
        asked.misunderstood(why)
    if asked.host:
        return explain_link.run(asked)
    explained = explain(asked)
    if asked.json:
        print_json(_as_json(explained))
    else:
        _print(explained)
    return 0


def explain(asked: argparse.Namespace) -> Explained:
    """Make the views and the plan, and let the registry choose, as a copy would."""
    device = usual_device() if asked.device is None else usable_device(asked.device)
    said = said_extents(asked)
    steps = (asked.src_step, asked.dst_step)
    src, dst = make_sides((asked.src, asked.dst), said, device, steps, asked.index == "blocks")
    plan = CopyPlan(src.view.form, dst.view.form, src.step, dst.step)
    choice = choose(src.view.device, asked.backend)
    _, taken = prepare(plan, choice.backend.device, choice)
    return Explained(src, dst, plan, taken, _why(taken))


def _caches(json: bool) -> int:
    """Print every bounded cache of this process, which has made no copy yet."""
    rows = [(cache.name, len(cache), cache.limit) for cache in caches()]
    if json:
        found = [dict(zip(("name", "size", "limit"), row, strict=True)) for row in rows]
        print_json({"caches": found})
        return 0
    columns = [Column("what is kept", whole=True), Column("now", right=True)]
    columns.append(Column("at most", right=True))
    print_table(columns, [[str(cell) for cell in row] for row in rows])
    print()
    print_prose("Of each the oldest entry goes first. In a process that copies: "
                "portakv.runtime.bounded.caches().")  # fmt: skip
    return 0


def _why(taken: Choice) -> str:
    if taken.forced:
        return f"forced by {ENVIRONMENT}" if forced_backend() else "forced by --backend"
    if len(taken.trace) > 1:
        return "the first candidate that takes this plan; those before it refused it"
    return "the first candidate that serves the device, and it takes this plan"


def _print(explained: Explained) -> None:
    src, dst, plan, taken = explained.src, explained.dst, explained.plan, explained.taken
    names = [name for name, _ in _facts(src)]
    rows = [
        [name, mine, theirs]
        for name, (_, mine), (_, theirs) in zip(names, _facts(src), _facts(dst), strict=True)
    ]
    columns = [Column("", whole=True), Column("source"), Column("destination")]
    print_table(columns, rows)
    print(f"\n{plan}\n")
    device = taken.backend.device
    print_prose(f"On {device}, {taken.name} carries it out: {explained.why}.")
    for note in _notes(explained):
        print_prose(note)
    print()
    print_candidates(candidates_for_plan(plan, taken), "")


def _facts(side: Side) -> list[tuple[str, str]]:
    """What a reader has to know of one side, by name."""
    view, text = side.view, side.layout.text
    wide = " + ".join(f"{width} B" for width in view.widths)
    return [
        ("layout", text if side.asked.strip() == text else f"{side.asked.strip()}: {text}"),
        ("tensors", describe_tensors(view.tensors)),
        ("dtype", str(view.owners[0].dtype).removeprefix("torch.")),
        ("layers", str(view.layers)),
        ("kv", str(view.kv)),
        ("heads", str(view.heads)),
        ("width", f"{wide} a page" if view.opaque else f"{wide} a head"),
        ("block size", f"{view.block_size} tokens" if view.block_size else "not paged"),
        ("index", _index_in_words(side)),
    ]


def _index_in_words(side: Side) -> str:
    if not side.step:
        return "none: consecutive tokens"
    if side.step == 1:
        return "slot mapping: an id for each token"
    if side.step == side.view.block_size:
        return f"block table: an id for {side.step} tokens"
    return f"an id for {side.step} tokens"


def _notes(explained: Explained) -> list[str]:
    """What the plan does not show but a caller may feel."""
    can: Capabilities = explained.taken.can
    ids = explained.src.step or explained.dst.step
    if ids and explained.taken.backend.device.type != "cpu" and not (
        can.guards and can.skips_negative
    ):  # fmt: skip
        return [
            "Ids on the device are checked before launch, with one synchronisation; ids on the "
            "host are not delayed."
        ]
    return []


def _as_json(explained: Explained) -> dict[str, Any]:
    plan, taken = explained.plan, explained.taken
    return {
        "source": _side_json(explained.src),
        "destination": _side_json(explained.dst),
        "plan": {
            "unit": plan.unit,
            "vector_bytes": plan.vector,
            "token_bytes": plan.token_bytes,
            "nests": [_nest_json(nest) for nest in plan.nests],
            "text": str(plan),
        },
        "device": str(taken.backend.device),
        "forced": taken.forced,
        "backend": taken.name,
        "why": explained.why,
        "notes": _notes(explained),
        "candidates": as_json(candidates_for_plan(plan, taken)),
    }


def _side_json(side: Side) -> dict[str, Any]:
    view = side.view
    return {
        "asked": side.asked,
        "layout": side.layout.text,
        "tensors": describe_tensors(view.tensors),
        "dtype": str(view.owners[0].dtype).removeprefix("torch."),
        "layers": view.layers,
        "kv": view.kv,
        "heads": view.heads,
        "width_bytes": list(view.widths),
        "block_size": view.block_size,
        "opaque": view.opaque,
        "step": side.step,
    }


def _nest_json(nest: Nest) -> dict[str, Any]:
    return {
        "source": _units_json(nest.src),
        "destination": _units_json(nest.dst),
        "loops": [
            {
                "axis": loop.name,
                "extent": loop.extent,
                "source": {"table": loop.src_table, "bytes": loop.src_stride},
                "destination": {"table": loop.dst_table, "bytes": loop.dst_stride},
            }
            for loop in nest.loops
        ],
        "run_bytes": nest.run,
        "vector_bytes": nest.vector,
    }


def _units_json(units: Units) -> dict[str, Any]:
    return {
        "table": units.table,
        "bytes": units.offset,
        "units": [
            {"extent": step.extent, "table": step.table, "bytes": step.stride}
            for step in units.units
        ],
    }
