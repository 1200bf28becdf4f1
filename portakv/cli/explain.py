# SPDX-License-Identifier: Apache-2.0
"""`portakv explain`: the plan of a copy between two layouts, its backend, and why that one."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import torch

from portakv.cli import explain_link, store
from portakv.cli.backends import candidates_for_plan, forced_backend, print_candidates
from portakv.cli.console import Column, print_json, print_prose, print_table
from portakv.cli.sides import Side, add_extents, make_sides, positive, said_extents
from portakv.plan.plan import CopyPlan, Nest
from portakv.plan.plan import Side as Units
from portakv.registry.prepared import prepare
from portakv.registry.registry import ENVIRONMENT, Choice, choose
from portakv.runtime.bounded import caches
from portakv.runtime.devices import usable_device, usual_device

HELP = "the plan between two layouts, and which backend carries it out"
DESCRIPTION = """\
Prints the plan of a copy between two layouts: the loops a person would write,
the tokens moved for each index read (unit), the widest access (vector) and the
bytes of a token; then the backend that carries it out and what the others
answered. The plan is made for example tensors, contiguous or in the memory
order that a preset names; nothing is moved. With --host it explains instead
which engine copies between a device and host memory, and takes no layouts.
With --src-device it says how the rows of another device cross to --device.
With --caches it lists what the library remembers; with --storage DIR it says
how a block store in that folder would be read and written; with --peer how rows
of other processes would be pulled here.

What is not said is taken as 32 layers, keys and values, 32 heads, 128 elements
(576 where a side has no kv), float16. An axis that one side does not write has
extent 1 on both. Presets bring the extents that they fix, and those that fix a
width count bytes (uint8)."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what the verb takes."""
    for name in ("src", "dst"):
        metavar = f"{name.upper()}_LAYOUT"
        parser.add_argument(name, nargs="?", metavar=metavar, help="a layout string or a preset")
    blocks = "blocks of a paged side (default: for --tokens); with --host, runs (default: 1)"
    add_extents(parser.add_argument_group("extents"), blocks)
    group = parser.add_argument_group("indices")
    group.add_argument(
        "--index",
        choices=("slots", "blocks"),
        default="slots",
        help="paged sides are addressed by a slot mapping or a block table (opaque pages: always "
        "blocks); chunks by consecutive tokens (default: slots)",
    )
    for side in ("src", "dst"):
        tokens = "tokens for each id; 0: no ids"
        group.add_argument(f"--{side}-step", type=_step, metavar="N", help=tokens)
    parser.add_argument("--device", help="a torch device (default: the accelerator, else cpu)")
    parser.add_argument("--backend", metavar="NAME", help=f"force it, unless {ENVIRONMENT} is set")
    parser.add_argument("--src-device", metavar="D", help="the source's (default: as --device)")
    parser.add_argument(
        "--caches",
        action="store_true",
        help="list instead everything in the library that remembers: its name, size and limit",
    )
    parser.add_argument("--storage", metavar="DIR", help="explain instead a block store's folder")
    explain_link.add_options(parser)


def _step(text: str) -> int:
    return 0 if text == "0" else positive(text)


def run(asked: argparse.Namespace) -> int:
    """Print the plan and the candidates; raises what the copy would raise."""
    if asked.caches:
        return _caches(asked.json)
    if asked.storage is not None:
        return store.explain_folder(asked.storage, asked.json)
    why = explain_link.misplaced(asked)
    if why:
        asked.misunderstood(why)
    if asked.host or asked.peer:
        return explain_link.run(asked)
    device = usual_device() if asked.device is None else usable_device(asked.device)
    layouts = (asked.src, asked.dst)
    steps = (asked.src_step, asked.dst_step)
    src, dst = make_sides(layouts, said_extents(asked), device, steps, asked.index == "blocks")
    choice = choose(dst.view.device, asked.backend)
    if asked.src_device is not None:
        there = usable_device(asked.src_device)
        src, _ = make_sides(layouts, said_extents(asked), there, steps, asked.index == "blocks")
    peer = src.view.device != dst.view.device
    if peer:
        src = src._replace(view=src.view.as_peer(dst.view.device))
        choice = explain_link.between(asked, src.view, dst.view, choice)
    plan = CopyPlan(src.view.form, dst.view.form, src.step, dst.step)
    _, taken = prepare(plan, choice)  # as a copy would
    why = taken.trace[-1].reason if peer else _why(taken)
    found = {
        "source": _side_json(src),
        "destination": _side_json(dst),
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
        "why": why,
        "notes": _notes(taken, ids=bool(src.step or dst.step)),
        "candidates": candidates_for_plan(plan, taken),
    }
    if asked.json:
        print_json(found)
    else:
        _print(found, src, dst)
    return 0


def _caches(json: bool) -> int:
    # Of a process that has made no copy yet.
    found = [{"name": c.name, "size": len(c), "limit": c.limit} for c in caches()]
    if json:
        print_json({"caches": found})
        return 0
    columns = [Column("what is kept", whole=True), Column("now", right=True)]
    columns.append(Column("at most", right=True))
    print_table(columns, [[str(cell) for cell in cache.values()] for cache in found])
    print()
    print_prose(
        "Of each the oldest entry goes first. In a process that copies: "
        "portakv.runtime.bounded.caches()."
    )
    return 0


def _why(taken: Choice) -> str:
    if taken.forced:
        return f"forced by {ENVIRONMENT}" if forced_backend() else "forced by --backend"
    if len(taken.trace) > 1:
        return "the first candidate that takes this plan; those before it refused it"
    return "the first candidate that serves the device, and it takes this plan"


def _print(found: Mapping[str, Any], src: Side, dst: Side) -> None:
    columns = [Column("", whole=True), Column("source"), Column("destination")]
    first = _facts(src, found["source"])
    second = _facts(dst, found["destination"])
    print_table(columns, [[name, first[name], second[name]] for name in first])
    print(f"\n{found['plan']['text']}\n")
    print_prose(f"On {found['device']}, {found['backend']} carries it out: {found['why']}.")
    for note in found["notes"]:
        print_prose(note)
    print()
    print_candidates(found["candidates"], "")


def _facts(side: Side, told: Mapping[str, Any]) -> dict[str, str]:
    text = told["layout"]
    asked = told["asked"].strip()
    wide = " + ".join(f"{width} B" for width in told["width_bytes"])
    return {
        "layout": text if asked == text else f"{asked}: {text}",
        **{name: str(told[name]) for name in ("tensors", "dtype", "layers", "kv", "heads")},
        "width": f"{wide} a {'page' if told['opaque'] else 'head'}",
        "block size": f"{told['block_size']} tokens" if told["block_size"] else "not paged",
        "index": _index_in_words(side),
    }


def _index_in_words(side: Side) -> str:
    if side.step < 2:
        return "slot mapping: an id for each token" if side.step else "none: consecutive tokens"
    table = "block table: " if side.step == side.view.block_size else ""
    return f"{table}an id for {side.step} tokens"


def _notes(taken: Choice, ids: bool) -> list[str]:
    guarded = taken.can.guards and taken.can.skips_negative
    if not ids or guarded or taken.backend.device.type == "cpu":
        return []
    return [
        "Ids on the device are checked before launch, with one synchronisation; ids on the "
        "host are not delayed."
    ]


def _side_json(side: Side) -> dict[str, Any]:
    """One side; of tensors in a list ``list of 32, each (2, 8, 16, 32, 128)``: the first one's
    shape, if they differ."""
    view = side.view
    tensors = side.view.tensors
    lists = ""
    while not isinstance(tensors, torch.Tensor):
        lists = f"{lists}list of {len(tensors)}, each "
        tensors = tensors[0]
    return {
        "asked": side.asked,
        "layout": side.layout.text,
        "tensors": lists + str((*tensors.shape,)),
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
    loops = [
        {
            "axis": loop.name,
            "extent": loop.extent,
            "source": {"table": loop.src_table, "bytes": loop.src_stride},
            "destination": {"table": loop.dst_table, "bytes": loop.dst_stride},
        }
        for loop in nest.loops
    ]
    return {
        "source": _units_json(nest.src),
        "destination": _units_json(nest.dst),
        "loops": loops,
        "run_bytes": nest.run,
        "vector_bytes": nest.vector,
    }


def _units_json(side: Units) -> dict[str, Any]:
    units = [{"extent": u.extent, "table": u.table, "bytes": u.stride} for u in side.units]
    return {"table": side.table, "bytes": side.offset, "units": units}
