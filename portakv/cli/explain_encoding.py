# SPDX-License-Identifier: Apache-2.0
"""`portakv explain SRC DST --encoding pack`: the rate, the backend that packs, its kernels, and
what stays raw."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import torch

from portakv.backends.pack_kernel import PackKernel, refusal
from portakv.cli.console import Column, Report, print_json, print_prose, print_table
from portakv.cli.sides import Side, extents_of, make_sides
from portakv.errors import InvalidTerms
from portakv.layout.packing import PACK, Pack, PackedPlane
from portakv.layout.presets import resolve
from portakv.plan.packing import PackPlan
from portakv.registry import choose, prepared_pack
from portakv.runtime.devices import usable_device, usual_device
from portakv.view.example import example_tensors
from portakv.view.packed import PackedExtents
from portakv.view.view import KVView


def explain_encoding(args: argparse.Namespace) -> int:
    """Print how rows of one layout are packed into an image of the other one.

    The image is the second layout, or the first one if that alone has pages. Raises the errors that
    the copy would raise.
    """
    device = usual_device() if args.device is None else usable_device(args.device)
    pack = _pack_of(args.encoding)
    extents = replace(extents_of(args), dtype=args.dtype or torch.bfloat16)
    rows, image = _rows_and_image(args.src, args.dst)
    raw, _ = make_sides((rows, rows), extents, device, (None, None), True)
    packed = _packed_view(image, raw.view, pack)
    choice = choose(device, args.backend)
    ways = [
        _way("packs", raw, packed, choice, True),
        _way("unpacks", raw, packed, choice, False),
    ]
    if image == args.src:  # the requested direction comes first
        ways.reverse()
    planes = packed.form.encoding
    report: Report = {
        "source": args.src,
        "destination": args.dst,
        "encoding": pack.text,
        "planes": [_plane_json(plane) for plane in planes],
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
        _print(report)
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


def _rows_and_image(src: str, dst: str) -> tuple[str, str]:
    """Return the layout of raw rows, and that of the image; raise `InvalidTerms` for two images."""
    pages = ["page" in resolve(text)[0].split() for text in (src, dst)]
    if all(pages):
        raise InvalidTerms(
            f"Expected a layout of raw rows and one of packed blocks, got {src!r} and {dst!r}, "
            f"which both have pages. Pass one of raw rows; packed blocks are copied as they are."
        )
    return (dst, src) if pages[0] else (src, dst)


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


def _way(verb: str, raw: Side, packed: KVView, choice: Any, packs: bool) -> Report:
    """Return the plan of one direction, and the backend that executes it with each answer."""
    size = packed.form.block_size
    forms = (raw.view.form, packed.form) if packs else (packed.form, raw.view.form)
    step = size if raw.view.block_size else 0
    steps = (step, size) if packs else (size, step)
    ready = prepared_pack(*forms, *steps, choice)
    plan = PackPlan(*forms, *steps)
    kernels = [PackKernel(nest, plan) for nest in plan.nests if refusal(nest) is None]
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


def _plane_json(plane: PackedPlane) -> Report:
    return {
        "values": plane.values,
        "raw_bytes": plane.raw_bytes,
        "slot_bytes": plane.slot_bytes,
        "ratio": round(plane.ratio, 4),
        "code_bits": plane.code_bits,
        "most_escapes": plane.most_escapes,
        "sample": plane.sample,
    }


def _print(report: Report) -> None:
    columns = [Column("a plane of", whole=True), Column("raw", right=True)]
    columns += [Column(name, right=True) for name in ("slot", "ratio", "codes", "escapes")]
    rows = [
        [
            f"{plane['values']} values",
            f"{plane['raw_bytes']} B",
            f"{plane['slot_bytes']} B",
            f"{plane['ratio']:.3f}",
            f"{plane['code_bits']} bits",
            f"{plane['most_escapes']} at most",
        ]
        for plane in report["planes"]
    ]
    print_table(columns, list(dict.fromkeys(map(tuple, rows))))
    sizes = report["block_bytes"]
    print(f"\nA block has {sizes['raw']} B raw and {sizes['packed']} B packed.\n")
    print(report["ways"][0]["plan"])
    print()
    columns = [Column("", whole=True), Column("backend", whole=True)]
    columns += [Column("answer", whole=True), Column("reason")]
    answers = [
        [way["does"], x["backend"], "chosen" if x["accepted"] else "rejected", x["reason"]]
        for way in report["ways"]
        for x in way["answers"]
    ]
    print_table(columns, answers, f"On {report['device']}")
    kernels = [kernel for way in report["ways"] for kernel in way["kernels"]]
    if kernels:
        names = [f"{x['name']} with thread blocks of {x['threads']}" for x in kernels]
        print(f"\nKernels of cuda and hip: {', '.join(dict.fromkeys(names))}.")
    print()
    print_prose(report["stays_raw"])
