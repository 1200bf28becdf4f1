# SPDX-License-Identifier: Apache-2.0
"""`portakv explain`: print the plan of a copy between two layouts, its backend and the reason.

Other questions: how `pack` packs rows, the transfer strategy between a device and the host, how
this process pulls rows of peers, a block store's folder, the hooks of a running engine, and the
caches.
"""

from __future__ import annotations

import argparse
import importlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import torch

from portakv.backends.base import Decision
from portakv.backends.pack_kernel import PackKernel, refusal
from portakv.cli.backends import candidates_for_plan, forced_backend, print_candidates
from portakv.cli.console import Report, installing, print_json, print_prose, print_rows
from portakv.cli.sides import (
    Side,
    add_extents,
    device_of,
    extents_of,
    in_bytes,
    in_time,
    make_sides,
    positive,
    read_above_zero,
    read_bytes,
    requested_accelerator,
)
from portakv.cli.store import check_installed, explain_folder
from portakv.cli.top import read_page, sums_of, values_in
from portakv.copy.call import executor_of
from portakv.core.pick import ORDER
from portakv.errors import BackendUnavailable, InvalidTerms, PortaKVError, Unsupported
from portakv.interconnect.choose import Host, Shape, pick
from portakv.interconnect.costs import (
    DIRECTIONS,
    Columns,
    Table,
    TableError,
    cost,
    costs_of,
    read,
    unmeasured,
)
from portakv.interconnect.strategy import OVERLAPS, Terms
from portakv.layout.encodings import PACK, Pack
from portakv.layout.presets import resolve
from portakv.plan.packing import PackPlan
from portakv.plan.plan import CopyPlan, Nest
from portakv.plan.plan import Side as Units
from portakv.registry.prepared import prepare, prepared
from portakv.registry.registry import ENVIRONMENT, choose
from portakv.runtime.bounded import caches
from portakv.runtime.devices import (
    device_name,
    devices_present,
    inside,
    usable_device,
    version_of,
)
from portakv.view.bound import PackedExtents
from portakv.view.example import example_tensors
from portakv.view.view import KVView

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
    add_extents(
        parser.add_argument_group("extents"),
        "blocks of a paged side (default: for --tokens); with --host, runs (default: 1)",
    )
    group = parser.add_argument_group("indices")
    add = parser.add_argument
    add(
        "--encoding",
        metavar="NAME",
        help="one layout holds bf16 rows, the other packed slots: pack, or pack/1:3 (3 bits)",
    )
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
    add("--device", help="a torch device (default: the accelerator, else cpu)")
    add("--backend", metavar="NAME", help=f"force it, unless {ENVIRONMENT} is set")
    add("--src-device", metavar="D", help="the source's (default: as --device)")
    add("--caches", action="store_true", help="list instead the limits of the library's caches")
    add("--storage", metavar="DIR", help="explain instead a block store's folder")
    add(
        "--hooks",
        metavar="URL",
        help="explain instead what the hooks cost the engine of a server, from its /metrics",
    )
    add(
        "--peer",
        action="store_true",
        help="explain instead how rows of other processes would be pulled here",
    )
    _add_host_options(parser)


def _step(text: str) -> int:
    return 0 if text == "0" else positive(text)


def run(args: argparse.Namespace) -> int:
    """Print the plan, or the answer to another question. Raise the errors of the copy."""
    if args.caches:
        return _print_caches(args.json)
    if args.storage is not None:
        return explain_folder(args.storage, args.json)
    if args.hooks is not None:
        check_installed("portakv explain --hooks")
        return _explain_hooks(args.hooks, args.json)
    why = _excluded(args) or _host_only(args)
    if why:
        args.misunderstood(why)
    if args.encoding is not None:
        return _explain_encoding(args)
    if args.peer:
        return _explain_peer(args.device, args.json)
    if args.host:
        return _explain_host(args)
    return _explain_plan(args)


def _explain_plan(args: argparse.Namespace) -> int:
    """Print the plan of a copy between two layouts, and the answer of each candidate."""
    device = device_of(args.device)
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
        terms = Terms(args.overlap or "compute", args.max_thread_blocks)
        choice = executor_of(src.view, dst.view, choice, terms)  # tests whether it can read there
    plan = CopyPlan(src.view.form, dst.view.form, src.step, dst.step)
    _, taken = prepare(plan, choice)  # the same as a copy does
    why = "the first candidate that serves the device, and it accepts this plan"
    if peer:
        why = taken.trace[-1].reason
    elif taken.forced:
        why = f"forced by {ENVIRONMENT}" if forced_backend() else "forced by --backend"
    elif len(taken.trace) > 1:
        why = "the first candidate that accepts this plan; the candidates before it rejected it"
    notes = []
    guarded = taken.can.guards and taken.can.skips_negative
    if (src.step or dst.step) and not guarded and taken.backend.device.type != "cpu":
        notes.append(
            "Ids on the device are checked before launch, with one synchronisation; ids on the "
            "host need none."
        )
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
        "notes": notes,
        "candidates": candidates_for_plan(plan, taken),
    }
    if args.json:
        print_json(report)
    else:
        _print_plan(report, src, dst)
    return 0


def _print_caches(json: bool) -> int:
    # This process has made no copy: the sizes are those after import.
    sizes = defaultdict[tuple[str, int], list[int]](list)
    for each in caches():
        sizes[each.name, each.limit].append(len(each))
    if json:
        rows = [
            {"name": name, "size": sum(own), "limit": limit, "caches": len(own)}
            for (name, limit), own in sizes.items()
        ]
        print_json({"caches": rows})
        return 0
    titles = ["cache", "entries at most"]
    print_rows(
        titles,
        [
            [name, f"{limit}" if len(own) == 1 else f"{limit} in each of {len(own)}"]
            for (name, limit), own in sizes.items()
        ],
        prose=titles[1:],
        right=titles[1:],
    )
    print()
    print_prose(
        "A full cache drops its oldest entry. These are the limits alone: this command has copied "
        "nothing, so that its caches are empty. In a process that copies, "
        "portakv.runtime.bounded.caches() lists them with their sizes."
    )
    return 0


def _print_plan(report: Report, src: Side, dst: Side) -> None:
    first = _facts(src, report["source"])
    second = _facts(dst, report["destination"])
    print_rows(
        ["", "source", "destination"],
        [[name, first[name], second[name]] for name in first],
        prose=["source", "destination"],
    )
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
    index = "none: consecutive tokens"
    if side.step == 1:
        index = "slot mapping: an id for each token"
    elif side.step:
        table = "block table: " if side.step == side.view.block_size else ""
        index = f"{table}an id for {side.step} tokens"
    return {
        "layout": text if requested == text else f"{requested}: {text}",
        **{name: str(report[name]) for name in ("tensors", "dtype", "layers", "kv", "heads")},
        "width": f"{wide} a {'page' if report['opaque'] else 'head'}",
        "block size": f"{report['block_size']} tokens" if report["block_size"] else "not paged",
        "index": index,
    }


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


def _explain_encoding(args: argparse.Namespace) -> int:
    """Print how rows of one layout are packed into an image of the other one.

    The image is the second layout, or the first one if that alone has pages. Raises the errors that
    the copy would raise.
    """
    device = device_of(args.device)
    pack = _pack_of(args.encoding)
    extents = replace(extents_of(args), dtype=args.dtype or torch.bfloat16)
    pages = ["page" in resolve(text)[0].split() for text in (args.src, args.dst)]
    if all(pages):
        raise InvalidTerms(
            f"Expected a layout of raw rows and one of packed blocks, got {args.src!r} and "
            f"{args.dst!r}, which both have pages. Pass one of raw rows; packed blocks are copied "
            f"as they are."
        )
    rows, image = (args.dst, args.src) if pages[0] else (args.src, args.dst)
    raw, _ = make_sides((rows, rows), extents, device, (None, None), True)
    packed = _packed_view(image, raw.view, pack)
    choice = choose(device, args.backend)
    ways = [_way(verb, raw, packed, choice) for verb in ("packs", "unpacks")]
    if image == args.src:  # the requested direction comes first
        ways.reverse()
    report: Report = {
        "source": args.src,
        "destination": args.dst,
        "encoding": pack.text,
        "planes": [
            {name: getattr(plane, name) for name in _OF_PLANE} | {"ratio": round(plane.ratio, 4)}
            for plane in packed.form.encoding
        ],
        "block_bytes": {
            "raw": raw.view.form.token_bytes * packed.form.block_size,
            "packed": packed.form.token_bytes,
        },
        "device": str(device),
        "ways": ways,
        "stays_raw": _STAYS_RAW,
    }
    if args.json:
        print_json(report)
    else:
        _print_encoding(report)
    return 0


def _pack_of(text: str) -> Pack:
    """Return the parameters that ``--encoding`` requests.

    Raises:
        InvalidTerms: another encoding.
    """
    if text == PACK:
        return Pack()
    if text.startswith(f"{PACK}/"):
        return Pack.of_text(text)
    raise InvalidTerms(
        f"Expected --encoding to be {PACK!r}, or a text such as {Pack().text!r}, got {text!r}. "
        f"Pass one of these; there is no plan of 'fp8', which operations of torch convert between "
        f"two plain copies."
    )


_STAYS_RAW = (
    "A block stays raw if one of its planes has more escapes than a slot holds: a copy raises "
    "PackOverflow with the numbers of these blocks, and a store that has the raw form too keeps "
    "them in it. Rows of other types than bfloat16, and parts of a block, are not packed."
)


def _packed_view(text: str, raw: KVView, pack: Pack) -> KVView:
    """Return an example view of packed blocks with the extents of a raw view."""
    size = raw.block_size or 1
    dims = tuple(width // 2 for width in raw.widths)
    dim: Any = dims if len(set(dims)) > 1 else dims[0]
    layout, fixed = resolve(text)
    named: dict[str, Any] = {
        "layers": raw.layers,
        "kv": raw.kv,
        "heads": raw.heads,
        "block_size": size,
        "dim": dim,
    }
    read = PackedExtents.of(layout, {**named, **fixed}, pack)
    rows = {name: read.extents[name] for name in ("layers", "kv", "heads", "dim")}
    tensors = example_tensors(
        read.text,
        **rows,  # type: ignore[arg-type]
        blocks=max(2, raw.slots // size),
        tokens=1,
        dtype=torch.uint8,
        device=raw.device,
    )
    return KVView(tensors, layout, encoding=pack, **named)


def _way(verb: str, raw: Side, packed: KVView, choice: Any) -> Report:
    """Return the plan of one direction, and the backend that executes it with each answer."""
    size = packed.form.block_size
    sides = [(raw.view.form, size if raw.view.block_size else 0), (packed.form, size)]
    if verb == "unpacks":
        sides.reverse()
    (src, src_step), (dst, dst_step) = sides
    ready = prepared(src, dst, src_step, dst_step, None, choice, PackPlan)
    plan = PackPlan(src, dst, src_step, dst_step)
    taken = [nest for nest in range(len(plan.nests)) if refusal(plan, nest) is None]
    kernels = [PackKernel(plan, nest) for nest in taken]
    return {
        "does": verb,
        "plan": str(plan),
        "backend": ready.choice.name,
        "kernels": [{"name": each.name, "threads": each.threads} for each in kernels],
        "answers": [
            {"backend": x.name, "accepted": x.accepted, "reason": x.reason}
            for x in ready.choice.trace
        ],
    }


#: What a report has of a plane, in this order.
_OF_PLANE = (
    "values",
    "raw_bytes",
    "slot_bytes",
    "ratio",
    "code_bits",
    "most_escapes",
    "sample",
)


def _print_encoding(report: Report) -> None:
    numbers = ["raw", "slot", "ratio", "codes", "escapes"]
    cells = (
        "{values} values",
        "{raw_bytes} B",
        "{slot_bytes} B",
        "{ratio:.3f}",
        "{code_bits} bits",
        "{most_escapes} at most",
    )
    rows = [tuple(cell.format_map(plane) for cell in cells) for plane in report["planes"]]
    print_rows(["a plane of", *numbers], list(dict.fromkeys(rows)), prose=numbers, right=numbers)
    sizes = report["block_bytes"]
    print(f"\nA block has {sizes['raw']} B raw and {sizes['packed']} B packed.\n")
    print(report["ways"][0]["plan"])
    print()
    answers = [
        [way["does"], x["backend"], "chosen" if x["accepted"] else "rejected", x["reason"]]
        for way in report["ways"]
        for x in way["answers"]
    ]
    print_rows(
        ["", "backend", "answer", "reason"],
        answers,
        prose=["reason"],
        title=f"On {report['device']}",
    )
    kernels = [kernel for way in report["ways"] for kernel in way["kernels"]]
    if kernels:
        names = [f"{x['name']} with thread blocks of {x['threads']}" for x in kernels]
        print(f"\nKernels of cuda and hip: {', '.join(dict.fromkeys(names))}.")
    print()
    print_prose(report["stays_raw"])


#: Options that only `--host` reads, by their names in argparse's namespace.
_ONLY = (
    "run_bytes",
    "payload",
    "direction",
    "host_runs",
    "pageable",
    "overlap",
    "max_gbps",
    "max_thread_blocks",
    "table",
)
_RUN_BYTES = 32 << 10


def _add_host_options(parser: argparse.ArgumentParser) -> None:
    """Add `--host` with its options."""
    group = parser.add_argument_group(
        "copies between a device and the host",
        "The transfer strategy for --blocks runs of --run-bytes. The runs are not contiguous on "
        "either side.",
    )
    add = group.add_argument
    add("--host", action="store_true", help="explain the choice of a strategy, instead of a plan")
    add(
        "--run-bytes",
        type=read_bytes,
        metavar="N",
        help=f"bytes of a run on the device, such as 32768 or 32K (default: {_RUN_BYTES >> 10}K)",
    )
    add("--payload", type=read_bytes, metavar="N", help="all bytes, instead of --blocks")
    add("--direction", choices=DIRECTIONS, help="default: d2h")
    add(
        "--host-runs",
        type=positive,
        metavar="N",
        help="runs in host memory, 1 if it is dense (default: as many as on the device)",
    )
    add("--pageable", action="store_true", default=None, help="host memory that is not pinned")
    add("--overlap", choices=OVERLAPS, help="other work of the device (default: compute)")
    rate = partial(read_above_zero, what="10^9 bytes in a second, above 0")
    add("--max-gbps", type=rate, metavar="R", help="the most 10^9 bytes in a second")
    add(
        "--max-thread-blocks",
        type=positive,
        metavar="N",
        help="the most thread blocks of a kernel that reads or writes host memory",
    )
    add(
        "--table",
        type=_table_in,
        metavar="FILE",
        help="a table that `portakv calibrate` wrote, also for another device",
    )


def _table_in(file: str) -> Table:
    try:
        return read(Path(file))
    except TableError as error:
        message = f"expected a table in {file}, but {error}; pass a file of `portakv calibrate`"
        raise argparse.ArgumentTypeError(message) from error


def _excluded(args: argparse.Namespace) -> str:
    if args.encoding is not None and (args.host or args.peer or args.src_device is not None):
        return "--encoding goes with two layouts and one device"
    if args.peer and (args.host or args.src is not None):
        return "--peer goes with --device and --json alone"
    if args.host and args.src is not None:
        return "--host takes no layouts, but --blocks, --run-bytes and --direction"
    if args.host and args.payload is not None and args.blocks is not None:
        return "--payload goes without --blocks"
    if (args.host or args.peer) and args.src_device is not None:
        return "--src-device goes with two layouts"
    return ""


def _host_only(args: argparse.Namespace) -> str:
    if args.host:
        return ""

    # Copies between two devices have terms, too.
    shared = () if args.src_device is None else ("overlap", "max_thread_blocks")
    for name in _ONLY:
        if name not in shared and getattr(args, name) is not None:
            return f"--{name.replace('_', '-')} goes with --host"
    if not args.peer and (args.src is None or args.dst is None):
        return "the following arguments are required: SRC_LAYOUT, DST_LAYOUT (or --host)"
    return ""


def _explain_host(args: argparse.Namespace) -> int:
    """Print the strategy, the time of each strategy, the terms, and the origin of the times.

    Raises:
        DeviceMismatch: torch cannot use the device.
        Unsupported: no strategy accepts the copy.
    """
    run_bytes = args.run_bytes or _RUN_BYTES
    runs = args.blocks or (-(-args.payload // run_bytes) if args.payload else 1)
    nbytes = args.payload or runs * run_bytes
    host_runs = min(args.host_runs or runs, nbytes)
    terms = Terms(args.overlap or "compute", args.max_thread_blocks, args.max_gbps)
    direction = args.direction or "d2h"
    memory = "pageable" if args.pageable else "pinned"
    device = requested_accelerator(args.device)
    if device is None:
        costs = args.table or unmeasured("there is no accelerator to measure")
        out = dict[str, str]()
        note = "There is no accelerator here; the answers assume that every strategy serves one."
    else:
        costs = args.table or costs_of(device)
        out = dict(Host(device).out)
        note = f"On {device}."
    for name in ORDER:
        if (name == "pageable") != (memory == "pageable"):
            out.setdefault(name, f"it does not copy {memory} memory")

    apart = Shape(nbytes, runs, runs)
    dense = Shape(nbytes, host_runs, host_runs)
    shapes = {"staged": dense, "batched_memcpy": apart, "zero_copy": apart, "pageable": dense}
    picked, refused = pick(shapes, direction, out, terms, costs)  # the same as a transfer does

    report: Report = {
        "direction": direction,
        "bytes": nbytes,
        "runs": runs,
        "host_runs": host_runs,
        "host_memory": memory,
        "engine": picked.strategy,
        "why": picked.why,
        "terms": {**asdict(terms), "text": _in_words(terms)},
        "measured": costs.measured,
        "origin": costs.origin,
        "note": note,
        "engines": [
            _strategy_json(
                name,
                shapes[name],
                costs.points.get((name, direction)),
                refused.get(name, ""),
                name == picked.strategy,
            )
            for name in ORDER
        ],
    }
    if args.json:
        print_json(report)
    else:
        _print_host(report)
    return 0


def _strategy_json(
    name: str, shape: Shape, columns: Columns | None, refused: str, chosen: bool
) -> Report:
    """Return the cost of a copy by one strategy; ``columns``: its measurements."""
    run_bytes = max(1, shape.nbytes // shape.pieces)
    seconds, host_seconds = cost(columns, run_bytes, shape.pieces) if columns else (None, None)
    answer = "rejected" if refused else "accepted"
    return {
        "engine": name,
        "run_bytes": run_bytes,
        "runs": shape.pieces,
        "seconds": seconds,
        "host_seconds": host_seconds,
        "refused": refused,
        "measured": seconds is not None,
        "answer": "chosen" if chosen else answer,
        "gbps": shape.nbytes / seconds / 1e9 if seconds else None,
    }


def _in_words(terms: Terms) -> str:
    work = {"compute": "runs a model meanwhile", "idle": "does nothing else"}[terms.overlap]
    text = f"overlap={terms.overlap!r}: assume that the device {work}"
    for name in ("max_gbps", "max_thread_blocks"):
        limit = getattr(terms, name)
        if limit is not None:
            text += f"; {name}={limit:g}"
    return text


def _print_host(report: Report) -> None:
    ends = ["the device", f"{report['host_memory']} host memory"]
    first, last = ends if report["direction"] == "d2h" else ends[::-1]
    runs = f"Runs: {report['runs']} on the device, {report['host_runs']} on the host."
    size = in_bytes(report["bytes"])
    print_prose(f"{size} from {first} to {last}. {runs} {report['note']}")
    print_prose(f"{report['engine']} executes it: {report['why']}.")
    print()
    numbers = ("takes", "GB/s", "host")
    names = ("strategy", "answer", *numbers, "cost of", "why not")
    rows = []
    for one in report["engines"]:
        times = [in_time(one[x]) if one[x] else "" for x in ("seconds", "host_seconds")]
        rate = f"{one['gbps']:.1f}" if one["gbps"] else ""
        size = f"{one['runs']} x {in_bytes(one['run_bytes'])}"
        answers = [one["engine"], one["answer"], times[0] or "unknown", rate, times[1]]
        rows.append([*answers, size, one["refused"]])
    print_rows(names, rows, prose=["why not"], right=numbers)
    print()
    print_prose(f"Terms: {report['terms']['text']}.")
    print_prose(f"Times: {report['origin']}.")


def _explain_peer(device: str | None, as_json: bool) -> int:
    """Print which memory a peer can map, the links between devices, the transports and the channel.

    Raises `Unsupported` if a package that migration needs is not installed.
    """
    try:
        importlib.import_module("portakv.migrate")
    except ImportError as error:
        why = f"{error.__cause__ or error}; {installing('migrate')} brings it"
        raise Unsupported("Expected the packages that migration needs", why) from error
    import msgspec
    import zmq

    from portakv.migrate.shared_memory import host_id
    from portakv.migrate.transports import forced

    where = device_of(device)
    versions = {"msgspec": version_of(msgspec), "pyzmq": version_of(zmq)}
    versions["libzmq"] = zmq.zmq_version()
    report: Report = {
        "device": str(where),
        "mapped": [asdict(one) for one in _mapped_memory(where)],
        "links": [asdict(one) for one in _links_of(where)],
        "movers": [
            asdict(one) | {"slots": str(buffers_on)}
            for buffers_on in dict.fromkeys((where, torch.device("cpu")))
            for one in _transports_for(buffers_on)
        ],
        "forced": forced(),
        "channel": {"host": host_id(), "curve": bool(zmq.has("curve")), "versions": versions},
    }
    if as_json:
        print_json(report)
    else:
        _print_peers(report)
    return 0


def _mapped_memory(device: torch.device) -> Iterator[Decision]:
    """Yield whether another process of this host can map each kind of memory."""
    from portakv.migrate import shared_memory

    try:
        written = shared_memory.shared_empty(64, torch.uint8).fill_(7)
        same = torch.equal(shared_memory.open_shared(shared_memory.share(written)), written)
        why = "" if same else "the bytes read differ from the bytes written"
    except PortaKVError as error:
        why = str(error)
    good = "a process of this user maps it; views lie in `shared_empty` or share_memory_()"
    yield Decision("host memory", not why, why or good)
    if device.type == "cpu":
        return
    refused = shared_memory.why_not(torch.zeros(64, dtype=torch.uint8, device=device))
    yield Decision(f"memory of {device}", not refused, refused or "a process of this host maps it")
    try:
        event = torch.get_device_module(device).Event
        with inside(device):
            shared_memory.export_event(event(interprocess=True))
        yield Decision(f"events of {device}", True, "a peer's stream waits for an offer's rows")
    except (PortaKVError, AttributeError, RuntimeError, TypeError) as error:
        why = f"the owner's host waits instead: {getattr(error, 'why', error)}"
        yield Decision(f"events of {device}", False, why)


def _links_of(device: torch.device) -> Iterator[Decision]:
    """Yield whether the device reads the memory of each other device of its type."""
    can_access = getattr(torch.get_device_module(device), "can_device_access_peer", None)
    for other in devices_present():
        if other.type != device.type or other == device or device.type == "cpu":
            continue
        name = f"{device} reads {other}"
        if can_access is None:
            yield Decision(
                name, False, f"torch does not report {device.type} links; pulls try them"
            )
        elif can_access(device, other):
            yield Decision(name, True, "rows are read over the link, if the peer's check passes")
        else:
            yield Decision(name, False, "the driver gives no access; a transport moves the rows")


def _transports_for(device: torch.device) -> Iterator[Decision]:
    """Yield the answer of each transport for staging buffers on the device."""
    from portakv.migrate.transports import ONLY_BY_NAME, TRANSPORTS, load

    for name in TRANSPORTS.names():
        try:
            decision = load(name).probe(device)
        except BackendUnavailable as error:  # of another package: not a transport, or misnamed
            decision = Decision(name, False, str(error))
        if decision.accepted and name in ONLY_BY_NAME:
            decision = Decision(name, True, f"{decision.reason}; only if it is requested by name")
        yield decision


def _print_peers(report: Report) -> None:
    name = device_name(torch.device(report["device"]))
    print_prose(f"How a reader on {report['device']} ({name}) would pull rows of its peers:")

    tables = {"mapped, on this host": report["mapped"], "between devices": report["links"]}
    for transport in report["movers"]:
        title = f"moved, through staging buffers on {transport['slots']}"
        tables.setdefault(title, []).append(transport)
    for title, decisions in tables.items():
        rows = []
        for decision in decisions:
            answer = "accepted" if decision["accepted"] else "rejected"
            rows.append([decision["name"], answer, decision["reason"]])
        if rows:
            print()
            print_rows(["subject", "answer", "why"], rows, prose=["answer", "why"], title=title)

    print()
    taken = "If memory cannot be mapped, a pull uses the first transport that serves, or the "
    taken += "transport that a side names."
    forced = report["forced"]
    if forced:
        serves = any(one["accepted"] for one in report["movers"] if one["name"] == forced)
        taken = f"PORTAKV_MOVER={forced} forces that transport, if memory cannot be mapped"
        taken += "." if serves else ". It does not serve here: a pull is then rejected."
    buffers = "Staging buffers are on the host unless rows are on two devices of one type."
    print_prose(f"{taken} {buffers}")

    channel = report["channel"]
    tcp = "TCP with CURVE from a secret" if channel["curve"] else "no TCP, as libzmq has no CURVE"
    names = ", ".join(f"{name} {version}" for name, version in channel["versions"].items())
    print_prose(f"Channel: a Unix socket on this host, {tcp} ({names}).")
    print_prose(f"This host is {channel['host']}; peers with the same identity map its memory.")


class HookCost(NamedTuple):
    """What a hook costs a step, in seconds.

    Attributes:
        side: that calls it, the scheduler or a worker.
        idle: mean of the steps without work; None: there was none.
        mean: of all steps.
    """

    hook: str
    side: str
    idle: float | None
    mean: float


def _explain_hooks(url: str, as_json: bool) -> int:
    """Print what each hook costs a step of the engine of a server.

    Args:
        url: of the server, or of its metrics.
        as_json: print one JSON value.

    Raises `InvalidTerms` for a text that is not an address, and `PortaKVError` for a server that
    does not answer, or whose engine has no connector of PortaKV.
    """
    # Imported here: it needs the extra `serving`, and no other answer does.
    from portakv.serving.scheduler import LIMIT

    url = _metrics_of(url)
    try:
        text = read_page(url)
    except (OSError, HTTPException) as error:
        raise PortaKVError(
            f"Expected the metrics of an engine at {url}, got an error: {error}. Start the server, "
            f"or correct the address."
        ) from None
    steps, costs = costs_in(text)
    if not costs:
        raise PortaKVError(
            f"Expected an engine with PortaKVConnector at {url}, got metrics without its counters. "
            f"They come with the first step of the engine: send it a request, or start it with "
            f"--kv-transfer-config."
        )
    idle = sum(cost.idle or 0.0 for cost in costs)
    measured = any(cost.idle is not None for cost in costs)
    if as_json:
        hooks = [cost._asdict() for cost in costs]
        about = {"url": url, "limit": LIMIT, "idle": idle if measured else None}
        print_json({**about, "steps": steps, "hooks": hooks})
        return 0
    numbers = ["a step without work", "a step"]
    rows = [[cost.hook, cost.side, _time(cost.idle), _time(cost.mean)] for cost in costs]
    total = _time(idle if measured else None)
    print_rows(
        ["hook", "side", *numbers],
        [*rows, ["all", "", total, _time(sum(cost.mean for cost in costs))]],
        prose=["side", *numbers],
        right=numbers,
    )
    print()
    if not measured:
        print_prose("The engine has had no step without work for the connector.")
    else:
        verdict = "within" if idle <= LIMIT else "more than"
        limit = in_time(LIMIT)
        print_prose(f"A step without work costs {total}, {verdict} the limit of {limit}.")
    print_prose(
        "Means since the engine has started: of its scheduler, and of a worker. They include the "
        "time in which other processes had the core, so a busy machine has longer ones."
    )
    return 0


def _time(seconds: float | None) -> str:
    return "-" if seconds is None else in_time(seconds)


def _metrics_of(url: str) -> str:
    """Return the address of the metrics of a server."""
    try:
        parts = urlsplit(url)
    except ValueError:  # half an IPv6 address
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise InvalidTerms(
            f"Expected --hooks to be the address of a server, such as http://localhost:8000, got "
            f"{url!r}. Correct it."
        )
    return parts._replace(path=parts.path if parts.path.strip("/") else "/metrics").geturl()


def costs_in(text: str) -> tuple[dict[str, dict[str, float]], list[HookCost]]:
    """Return the steps of each side, and what each hook costs: of all engines of a server."""
    values = values_in(text)
    steps_of = sums_of(values, ["side"], "engine_steps_total")
    idle_of = sums_of(values, ["side"], "engine_idle_steps_total")
    idle_seconds = sums_of(values, ["side", "hook"], "engine_idle_hook_seconds_total")
    steps = {
        side: {"steps": many, "idle_steps": idle_of.get(side, 0.0)}
        for side, many in steps_of.items()
    }
    costs = list[HookCost]()
    seconds = sums_of(values, ["side", "hook"], "engine_hook_seconds_total")
    for name, spent in sorted(seconds.items()):
        side, _, hook = name.partition(" ")
        if steps_of.get(side):
            many = idle_of.get(side)
            idle = idle_seconds.get(name, 0.0) / many if many else None
            costs.append(HookCost(hook, side, idle, spent / steps_of[side]))
    return steps, costs
