# SPDX-License-Identifier: Apache-2.0
"""`portakv explain`: print the plan of a copy between two layouts, its backend and the reason."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping

import torch

from portakv.cli import explain_link, store
from portakv.cli.backends import candidates_for_plan, forced_backend, print_candidates
from portakv.cli.console import Column, Report, print_json, print_prose, print_table
from portakv.cli.sides import Side, add_extents, extents_of, make_sides, positive
from portakv.cli.store_serve import check_installed
from portakv.plan.plan import CopyPlan, Nest
from portakv.plan.plan import Side as Units
from portakv.registry.prepared import prepare
from portakv.registry.registry import ENVIRONMENT, Choice, choose
from portakv.runtime.bounded import caches
from portakv.runtime.devices import usable_device, usual_device

HELP = "print the plan between two layouts, and the backend that executes it"
DESCRIPTION = """\
Prints the plan of a copy between two layouts: the loops a person would write,
the tokens moved for each index read (unit), the widest access (vector) and the
bytes of a token; then the backend that executes it and the answers of all other
candidates. The plan is made for example tensors, contiguous or in the memory
order that a preset names; no data is moved. Other questions:

  --host         which strategy copies between a device and host memory (no layouts)
  --src-device D how the rows of another device cross to --device
  --caches       the limits of the library's caches
  --storage DIR  how a block store reads and writes that folder
  --peer         how this process pulls rows of other processes
  --hooks URL    what the hooks of PortaKVConnector cost a running vLLM server

Defaults: 32 layers, keys and values, 32 heads, 128 elements (576 if a side has
no kv), float16. An axis that one side does not write has extent 1 on both sides.
Presets bring the extents that they fix. Presets that fix a width count bytes
(uint8)."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    for name in ("src", "dst"):
        metavar = f"{name.upper()}_LAYOUT"
        parser.add_argument(name, nargs="?", metavar=metavar, help="a layout string or a preset")
    blocks = "blocks of a paged side (default: for --tokens); with --host, runs (default: 1)"
    add_extents(parser.add_argument_group("extents"), blocks)
    group = parser.add_argument_group("indices")
    packed = "one layout holds bf16 rows, the other packed slots: pack, or pack/1:3 (3 bits)"
    parser.add_argument("--encoding", metavar="NAME", help=packed)
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
        help="list instead the limits of the library's caches",
    )
    parser.add_argument("--storage", metavar="DIR", help="explain instead a block store's folder")
    hooks = "explain instead what the hooks cost the engine of a server, from its /metrics"
    parser.add_argument("--hooks", metavar="URL", help=hooks)
    explain_link.add_options(parser)


def _step(text: str) -> int:
    return 0 if text == "0" else positive(text)


def run(args: argparse.Namespace) -> int:
    """Print the plan and the candidates. Raise the errors that the copy would raise."""
    if args.caches:
        return _print_caches(args.json)
    if args.storage is not None:
        return store.explain_folder(args.storage, args.json)
    if args.hooks is not None:
        check_installed("portakv explain --hooks")
        # Imported here: it needs the extra `serving`, and no other answer does.
        from portakv.cli import explain_hooks

        return explain_hooks.print_hooks(args.hooks, args.json)
    why = explain_link.misplaced(args)
    if why:
        args.misunderstood(why)
    if args.host or args.peer or args.encoding is not None:
        return explain_link.run(args)
    device = usual_device() if args.device is None else usable_device(args.device)
    layouts = (args.src, args.dst)
    steps = (args.src_step, args.dst_step)
    extents = extents_of(args)
    by_blocks = args.index == "blocks"
    src, dst = make_sides(layouts, extents, device, steps, by_blocks)
    choice = choose(dst.view.device, args.backend)
    if args.src_device is not None:
        there = usable_device(args.src_device)
        src, _ = make_sides(layouts, extents, there, steps, by_blocks)

    peer = src.view.device != dst.view.device
    if peer:
        src = src._replace(view=src.view.as_peer(dst.view.device))
        choice = explain_link.between(args, src.view, dst.view, choice)
    plan = CopyPlan(src.view.form, dst.view.form, src.step, dst.step)
    _, taken = prepare(plan, choice)  # the same as a copy does
    why = taken.trace[-1].reason if peer else _why(taken)
    report: Report = {
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
    if args.json:
        print_json(report)
    else:
        _print(report, src, dst)
    return 0


def _print_caches(json: bool) -> int:
    # This process has made no copy: the sizes are those after import.
    kinds = Counter((c.name, c.limit) for c in caches())
    sizes = Counter[tuple[str, int]]()
    for each in caches():
        sizes[each.name, each.limit] += len(each)
    if json:
        rows = [
            {"name": name, "size": sizes[name, limit], "limit": limit, "caches": count}
            for (name, limit), count in kinds.items()
        ]
        print_json({"caches": rows})
        return 0
    columns = [Column("cache", whole=True), Column("entries at most", right=True)]
    print_table(
        columns,
        [
            [name, f"{limit}" if count == 1 else f"{limit} in each of {count}"]
            for (name, limit), count in kinds.items()
        ],
    )
    print()
    print_prose(
        "A full cache drops its oldest entry. These are the limits alone: this command has copied "
        "nothing, so that its caches are empty. In a process that copies, "
        "portakv.runtime.bounded.caches() lists them with their sizes."
    )
    return 0


def _why(taken: Choice) -> str:
    if taken.forced:
        return f"forced by {ENVIRONMENT}" if forced_backend() else "forced by --backend"
    if len(taken.trace) > 1:
        return "the first candidate that accepts this plan; the candidates before it rejected it"
    return "the first candidate that serves the device, and it accepts this plan"


def _print(report: Report, src: Side, dst: Side) -> None:
    columns = [Column("", whole=True), Column("source"), Column("destination")]
    first = _facts(src, report["source"])
    second = _facts(dst, report["destination"])
    print_table(columns, [[name, first[name], second[name]] for name in first])
    print(f"\n{report['plan']['text']}\n")
    print_prose(f"On {report['device']}, {report['backend']} executes it: {report['why']}.")
    for note in report["notes"]:
        print_prose(note)
    print()
    print_candidates(report["candidates"], "")


def _facts(side: Side, report: Report) -> dict[str, str]:
    text = report["layout"]
    requested = report["asked"].strip()
    wide = " + ".join(f"{width} B" for width in report["width_bytes"])
    return {
        "layout": text if requested == text else f"{requested}: {text}",
        **{name: str(report[name]) for name in ("tensors", "dtype", "layers", "kv", "heads")},
        "width": f"{wide} a {'page' if report['opaque'] else 'head'}",
        "block size": f"{report['block_size']} tokens" if report["block_size"] else "not paged",
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
        "host need none."
    ]


def _side_json(side: Side) -> Report:
    """Return one side as JSON.

    Tensors in a list become ``list of 32, each (2, 8, 16, 32, 128)``, with the shape of the first.
    """
    view = side.view
    tensors = side.view.tensors
    lists = ""
    while not isinstance(tensors, torch.Tensor):
        level = tensors.values() if isinstance(tensors, Mapping) else tensors
        lists = f"{lists}list of {len(level)}, each "
        tensors = next(iter(level))
    return {
        "asked": side.requested,
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


def _nest_json(nest: Nest) -> Report:
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


def _units_json(side: Units) -> Report:
    units = [{"extent": u.extent, "table": u.table, "bytes": u.stride} for u in side.units]
    return {"table": side.table, "bytes": side.offset, "units": units}
