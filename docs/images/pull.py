# SPDX-License-Identifier: Apache-2.0
"""The picture of a pull in docs/migration.md: ``python docs/images/pull.py`` writes pull.svg."""

from __future__ import annotations

from pathlib import Path

PICTURE = Path(__file__).resolve().with_suffix(".svg")
HEAD = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 960 500" role="img" aria-labelledby="t d"
  font-family="ui-sans-serif, system-ui, Segoe UI, Helvetica, Arial, sans-serif">
<title id="t">A pull, and its order</title>
<desc id="d">Two ranks of an owner hold a model's rows in blocks of 16 tokens; three ranks of a
reader want them in blocks of 64. If the owner's memory can be mapped, one launch of the reader
reads it; else a transport carries rows through staging buffers. Below, in order: the owner
offers rows, the ticket travels with the request, the reader pulls, and checks that the
offer still held: only then the rows are committed.</desc>
<style>
  .ink { fill: #1f2733 } .soft { fill: #5b6675 } .white { fill: #ffffff }
  .card { fill: #ffffff; stroke: #c9d1db } .cell { fill: #eef1f5; stroke: #c9d1db }
  .a { fill: #2f6fde } .b { fill: #0f9d8f } .c { fill: #d97706 }
  .load { stroke: #2f6fde; stroke-width: 2 } .move { stroke: #d97706; stroke-width: 2 }
  .next { stroke: #5b6675; stroke-width: 1.5 }
  @media (prefers-color-scheme: dark) {
    .ink { fill: #e8edf3 } .soft { fill: #a5b0bf } .next { stroke: #a5b0bf }
    .card { fill: #161b22; stroke: #39424e } .cell { fill: #222933; stroke: #39424e }
  }
</style>
<rect class="card" x="1" y="1" width="958" height="498" rx="14"/>
"""
STEPS = (
    ("1", "Offer", "the owner keeps its rows", "as they are, for a lease"),
    ("2", "Ticket", "bytes that travel", "with the request"),
    ("3", "Pull", "it reads, and writes", "only its own memory"),
    ("4", "Check", "did the offer still hold?", "the owner answers"),
)


def box(kind: str, x: float, y: float, width: float, height: float, radius: float = 10) -> str:
    return f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="{radius}"/>'


def text(
    x: float, y: float, words: str, size: float = 12, kind: str = "soft", at: str = "middle"
) -> str:
    weight = 600 if kind == "ink" else 400
    return (
        f'<text class="{kind}" x="{x}" y="{y}" font-size="{size}" text-anchor="{at}" '
        f'font-weight="{weight}">{words}</text>'
    )


def arrow(kind: str, fill: str, x: float, y: float, past: float) -> list[str]:
    """A line to the right, with a head."""
    head = f"M{past - 12} {y - 5.5} L{past} {y} L{past - 12} {y + 5.5} z"
    return [
        f'<path class="{kind}" d="M{x} {y} L{past - 12} {y}"/>',
        f'<path class="{fill}" d="{head}"/>',
    ]


def owner() -> list[str]:
    """Two ranks, whose offered blocks of 16 tokens lie anywhere."""
    shapes = [box("cell", 28, 28, 232, 276), text(144, 54, "Owner", 15, "ink")]
    shapes.append(text(144, 73, "2 ranks, blocks of 16 tokens"))
    for rank, kind, offered in ((0, "a", (1, 4, 8, 10)), (1, "b", (1, 4, 8, 10))):
        top = 88 + rank * 106
        shapes.append(text(46, top + 52, f"{rank}", 13, "ink"))
        for n in range(12):
            x, y = 62 + n % 4 * 46, top + n // 4 * 31
            shapes.append(box(kind if n in offered else "card", x, y, 41, 26, 5))
    return shapes


def reader() -> list[str]:
    """Three ranks; the heads of the one in the middle come from both ranks of the owner."""
    shapes = [box("cell", 700, 28, 232, 276), text(816, 54, "Reader", 15, "ink")]
    shapes.append(text(816, 73, "3 ranks, blocks of 64 tokens"))
    for rank, kinds in enumerate(("aa", "ab", "bb")):
        top = 88 + rank * 70
        shapes.append(text(718, top + 32, f"{rank}", 13, "ink"))
        shapes.append(box("card", 734, top, 88, 54, 5))
        shapes.append(box("card", 828, top, 88, 54, 5))
        for n, kind in enumerate(kinds):
            shapes.append(box(kind, 828, top + 27 * n, 88, 27, 5))
    return shapes


def transports() -> list[str]:
    """Mapped, and moved."""
    shapes = [text(480, 92, "mapped, on one host", 14, "ink")]
    shapes += arrow("load", "a", 264, 112, 696)
    shapes.append(text(480, 134, "one launch reads the rows where they lie"))
    shapes.append(text(480, 151, "and writes the final layout"))
    shapes.append(text(480, 206, "moved, from anywhere", 14, "ink"))
    shapes += [box("c", 348, 222, 70, 30, 6), text(383, 241, "buffer", 11.5, "white")]
    shapes += [box("c", 542, 222, 70, 30, 6), text(577, 241, "buffer", 11.5, "white")]
    for x, past in ((264, 344), (422, 538), (616, 696)):
        shapes += arrow("move", "c", x, 237, past)
    shapes += [text(304, 268, "gather"), text(656, 268, "scatter"), text(480, 268, "a transport")]
    shapes.append(text(480, 286, "torch.distributed, NIXL or Mooncake"))
    return shapes


def order() -> list[str]:
    """Return the steps in their order."""
    shapes = list[str]()
    for n, (number, name, *words) in enumerate(STEPS):
        x = 28 + n * 176
        shapes += [box("cell", x, 340, 158, 104), text(x + 79, 366, f"{number}  {name}", 14, "ink")]
        shapes += [text(x + 79, 392 + 18 * i, line, 11.5) for i, line in enumerate(words)]
        if n:
            shapes += arrow("next", "soft", x - 17, 392, x - 2)
    for y, kind, name, why in (
        (340, "b", "held", "committed"),
        (396, "c", "ended", "not committed: OfferGone"),
    ):
        shapes += [box(kind, 756, y, 176, 48, 10), text(844, y + 20, name, 13, "white")]
        shapes.append(text(844, y + 38, why, 11.5, "white"))
        shapes += arrow("next", "soft", 715, y + 24, 753)
    shapes.append(
        text(
            480,
            476,
            "The offers of all owners must have held. A stale row is never committed.",
        )
    )
    return shapes


def picture() -> str:
    """The whole file."""
    return HEAD + "\n".join((*owner(), *reader(), *transports(), *order())) + "\n</svg>\n"


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
