# SPDX-License-Identifier: Apache-2.0
"""Pictures of docs/copies.md, docs/storage.md and docs/migration.md, drawn from the data below.

``python docs/images/diagrams.py`` writes timeline.svg, touched.svg and pull-states.svg.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parent
_STYLE = """\
<style>
  .ink { fill: #1f2733 } .soft { fill: #5b6675 } .white { fill: #ffffff }
  .mono { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace }
  .card { fill: #ffffff; stroke: #c9d1db } .cell { fill: #eef1f5; stroke: #c9d1db }
  .blue { fill: #2f6fde } .green { fill: #0f7f74 } .orange { fill: #b45309 } .red { fill: #b42318 }
  .line { stroke: #5b6675; stroke-width: 1.5; fill: none } .rule { stroke: #c9d1db }
  .blue-line { stroke: #2f6fde; stroke-width: 2.5; fill: none }
  .green-line { stroke: #0f7f74; stroke-width: 2.5; fill: none }
  .red-line { stroke: #b42318; stroke-width: 1.5; fill: none }
  .wait { stroke: #b45309; stroke-width: 1.5; fill: none; stroke-dasharray: 4 3 }
  @media (prefers-color-scheme: dark) {
    .ink { fill: #e8edf3 } .soft { fill: #a5b0bf } .line { stroke: #a5b0bf }
    .card { fill: #161b22; stroke: #39424e } .cell { fill: #222933; stroke: #39424e }
    .rule { stroke: #39424e } .red-line { stroke: #f97066 } .wait { stroke: #f0a85a }
  }
</style>
"""


def sheet(title: str, description: str, width: int, height: int, shapes: list[str]) -> str:
    """Return a whole file: a card with a title and a description for readers who do not see it."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        'aria-labelledby="t d" font-family="ui-sans-serif, system-ui, Segoe UI, Helvetica, Arial, '
        f'sans-serif">\n<title id="t">{title}</title>\n<desc id="d">{description}</desc>\n{_STYLE}'
        f"{box('card', 1, 1, width - 2, height - 2, 14)}\n" + "\n".join(shapes) + "\n</svg>\n"
    )


def box(kind: str, x: float, y: float, width: float, height: float, radius: float = 6) -> str:
    """Return a rectangle with round corners."""
    return (
        f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" '
        f'rx="{radius:g}"/>'
    )


def text(
    x: float, y: float, words: str, kind: str = "soft", size: float = 14, at: str = "start"
) -> str:
    """Return a line of text; the kind `ink` is bold."""
    weight = 600 if kind.startswith("ink") else 400
    return (
        f'<text class="{kind}" x="{x:g}" y="{y:g}" font-size="{size:g}" text-anchor="{at}" '
        f'font-weight="{weight}">{words}</text>'
    )


def labelled(kind: str, x: float, y: float, width: float, height: float, words: str) -> list[str]:
    """Return a filled box with a label in its middle."""
    ink = "ink" if kind in ("cell", "card") else "white"
    label = text(x + width / 2, y + height / 2 + 5, words, ink, 13.5, "middle")
    return [box(kind, x, y, width, height), label]


def arrow(kind: str, points: list[tuple[float, float]], head: str = "soft") -> list[str]:
    """Return a line through points, with a head in the direction of its last part."""
    (x0, y0), (x, y) = points[-2:]
    path = " L".join(f"{a:g} {b:g}" for a, b in points)
    shapes = [f'<path class="{kind}" d="M{path}"/>']
    if x0 == x:
        step = 9 if y > y0 else -9
        shapes.append(
            f'<path class="{head}" d="M{x - 5:g} {y - step:g} L{x:g} {y:g} '
            f'L{x + 5:g} {y - step:g} z"/>'
        )
    else:
        step = 9 if x > x0 else -9
        shapes.append(
            f'<path class="{head}" d="M{x - step:g} {y - 5:g} L{x:g} {y:g} '
            f'L{x - step:g} {y + 5:g} z"/>'
        )
    return shapes


class Bar(NamedTuple):
    """Work on a line of time: from and to in units, its label and its colour."""

    begin: float
    end: float
    words: str
    kind: str


class Panel(NamedTuple):
    """A call, what holds of it, and the work on its two lines of time."""

    call: str
    holds: str
    names: tuple[str, str]
    model: list[Bar]
    copies: list[Bar]
    #: Places where the model's stream waits for a copy.
    waits: list[tuple[float, float]]


_STREAMS = ("current stream", "the link")
_TIMELINE = (
    Panel(
        "copy_blocks(src, dst, ...)",
        "The copy is in order on the current stream: later work waits for its end.",
        _STREAMS,
        [Bar(0, 2.4, "step 1", "blue"), Bar(4.4, 6.8, "step 2", "blue")],
        [Bar(2.4, 4.4, "copy", "green")],
        [(2.4, 4.4)],
    ),
    Panel(
        "copy_blocks(src, dst, ..., stream=side)",
        "The copy follows step 1. Only work on the stream “side” waits for its end.",
        _STREAMS,
        [
            Bar(0, 2.4, "step 1", "blue"),
            Bar(2.4, 4.8, "step 2", "blue"),
            Bar(4.8, 7.2, "step 3", "blue"),
        ],
        [Bar(2.4, 4.4, "copy", "green")],
        [],
    ),
    Panel(
        "copy_blocks(src, dst, ..., detached=True), three times during step 2",
        "No stream waits, so copies fill the link. handle.wait() makes a stream wait.",
        _STREAMS,
        [
            Bar(0, 2.4, "step 1", "blue"),
            Bar(2.4, 6.4, "step 2", "blue"),
            Bar(8.4, 9.8, "step 3", "blue"),
        ],
        [
            Bar(2.4, 4.4, "copy 1", "green"),
            Bar(4.4, 6.4, "copy 2", "green"),
            Bar(6.4, 8.4, "copy 3", "green"),
        ],
        [(6.4, 8.4)],
    ),
    Panel(
        'overlap="compute", the default: a model runs meanwhile',
        "The copy uses a copy engine or a few thread blocks, and slows the model little.",
        ("model", "the copy"),
        [Bar(0, 4.8, "kernels of the model", "blue")],
        [Bar(0, 3.2, "copy", "green")],
        [],
    ),
    Panel(
        'overlap="idle": the device has nothing else to do',
        "The copy may use the whole device and ends sooner. A model that ran then would be slower.",
        ("model", "the copy"),
        [Bar(2.7, 7.5, "kernels of the model", "blue")],
        [Bar(0, 2.7, "copy", "green")],
        [],
    ),
)


def timeline() -> str:
    """Return the picture of the work that waits for a copy."""
    shapes = list[str]()
    left = 150.0
    unit = 62.0
    top = 30.0
    for number, panel in enumerate(_TIMELINE):
        y = top + number * 138
        if number:
            shapes.append(f'<path class="rule" d="M24 {y - 16:g} L776 {y - 16:g}"/>')
        shapes.append(text(24, y + 12, panel.call, "ink mono", 14))
        shapes.append(text(24, y + 33, panel.holds, "soft", 13.5))
        for row, (name, work) in enumerate(
            zip(panel.names, (panel.model, panel.copies), strict=True)
        ):
            at = y + 46 + row * 34
            shapes.append(text(left - 14, at + 19, name, "soft", 13, "end"))
            for bar in work:
                width = (bar.end - bar.begin) * unit - 2
                shapes += labelled(bar.kind, left + bar.begin * unit, at, width, 28, bar.words)
            for begin, end in panel.waits if row == 0 else ():
                x = left + begin * unit
                wide = (end - begin) * unit
                shapes.append(
                    f'<path class="wait" d="M{x + 2:g} {at + 14:g} L{x + wide - 4:g} {at + 14:g}"/>'
                )
                shapes.append(text(x + wide / 2, at + 9, "waits", "soft", 12, "middle"))
    description = " ".join(f"{panel.call}: {panel.holds}" for panel in _TIMELINE)
    return sheet("Which work waits for a copy", description, 800, 710, shapes)


class Touch(NamedTuple):
    """A call of a store, and what it does in each place."""

    call: str
    caller: str
    host: str
    disk: str
    bucket: str
    #: Where blocks move: from and to, as columns.
    moves: list[tuple[int, int]]


_COLUMNS = ("your blocks", "host tier", "disks", "bucket")
_TOUCHED = (
    Touch("has(key)", "-", "index", "index", "past answers", []),
    Touch("lookup(keys)", "-", "index", "index", "asks, 1 s", []),
    Touch("prefetch(keys)", "-", "keeps", "reads", "reads", [(2, 1), (3, 1)]),
    Touch("load(view, ...)", "writes", "keeps", "reads", "reads", [(1, 0), (2, 1), (3, 1)]),
    Touch("save(view, ...)", "reads", "keeps", "writes", "writes", [(0, 1), (1, 2), (1, 3)]),
)


def touched() -> str:
    """Return the picture of the tiers that each call of a store touches."""
    shapes = list[str]()
    left = 190.0
    wide = 146.0
    top = 66.0
    high = 74.0
    for column, name in enumerate(_COLUMNS):
        shapes.append(text(left + column * wide + 58, 42, name, "ink", 15, "middle"))
    for row, each in enumerate(_TOUCHED):
        y = top + row * high
        shapes.append(text(24, y + 25, each.call, "ink mono", 14))
        for column, words in enumerate((each.caller, each.host, each.disk, each.bucket)):
            x = left + column * wide
            if words == "-":
                shapes.append(text(x + 58, y + 25, "not touched", "soft", 13, "middle"))
                continue
            moved = any(column in move for move in each.moves)
            kind = "cell"
            if moved:
                kind = "green" if each.call.startswith("save") else "blue"
            shapes += labelled(kind, x, y, 116, 38, words)
        for src, dst in each.moves:
            line = "green-line" if each.call.startswith("save") else "blue-line"
            head = line.partition("-")[0]
            right = dst > src
            begin = left + src * wide + (116 if right else 0)
            end = left + dst * wide + (0 if right else 116)
            if abs(src - dst) == 1:
                points = [(begin, y + 19), (end, y + 19)]
            else:  # below the box between them
                begin, end = left + src * wide + 58, left + dst * wide + 58
                points = [(begin, y + 38), (begin, y + 54), (end, y + 54), (end, y + 40)]
            shapes += arrow(line, points, head)
    return sheet(
        "Which tiers each call touches",
        "has and lookup read indices and move no block; lookup also asks the bucket. prefetch "
        "reads blocks of disks and the bucket into the host tier. load brings them on into your "
        "blocks. "
        "save reads your blocks and writes every tier.",
        800,
        456,
        shapes,
    )


class State(NamedTuple):
    """A state of a pull: its place, its name, and a line about it."""

    x: float
    y: float
    name: str
    words: str
    kind: str


_WIDTH, _HEIGHT = 168.0, 62.0
_STATES = {
    "wait": State(24, 40, "waiting", "for a name or a mark", "cell"),
    "copy": State(314, 40, "copying", "rows are undefined", "blue"),
    "check": State(604, 40, "confirming", "did each offer hold?", "blue"),
    "done": State(604, 190, "committed", "published is True", "green"),
    "late": State(24, 190, "TransferTimeout", "timeout= is over", "card"),
    "cancel": State(24, 270, "TransferCancelled", "you called cancel()", "card"),
    "peer": State(314, 190, "PeerError", "the owner is gone", "card"),
    "gone": State(314, 270, "OfferGone", "the offer has ended", "card"),
}


def pull_states() -> str:
    """Return the picture of the states of a pull."""
    shapes = list[str]()
    for state in _STATES.values():
        ink, soft = ("ink", "soft") if state.kind in ("cell", "card") else ("white", "white")
        middle = state.x + _WIDTH / 2
        shapes.append(box(state.kind, state.x, state.y, _WIDTH, _HEIGHT, 10))
        shapes.append(text(middle, state.y + 27, state.name, ink, 15, "middle"))
        shapes.append(text(middle, state.y + 47, state.words, soft, 13, "middle"))
    shapes += arrow("line", [(192, 71), (312, 71)])
    shapes += arrow("line", [(482, 71), (602, 71)])
    shapes += arrow("green-line", [(688, 102), (688, 188)], "green")
    shapes += [text(252, 61, "offer exists", size=13, at="middle")]
    shapes += [text(542, 61, "all bytes here", size=13, at="middle")]
    shapes += [text(698, 150, "all held", size=13)]
    shapes.append(box("cell", 12, 176, 482, 168, 12).replace("/>", ' fill-opacity="0"/>'))
    for x in (108.0, 398.0):
        shapes += arrow("red-line", [(x, 102), (x, 174)], "red")
    shapes += arrow("red-line", [(640, 102), (640, 140), (420, 140), (420, 174)], "red")
    shapes += [
        text(
            24,
            368,
            "From any state, the first of these errors ends the pull. No rows are "
            "committed, and no other row has changed.",
            size=13.5,
        )
    ]
    shapes += [
        text(
            24,
            390,
            "After TransferTimeout or TransferCancelled, pull again until the lease is over.",
            size=13.5,
        )
    ]
    return sheet(
        "The states of a pull",
        "A pull waits until the offer exists or its mark rises, copies the rows, and confirms that "
        "each offer held. Then the rows are committed. In any state it may end by TransferTimeout, "
        "TransferCancelled, PeerError or OfferGone; then no rows are committed.",
        800,
        410,
        shapes,
    )


PICTURES = {"timeline": timeline, "touched": touched, "pull-states": pull_states}


if __name__ == "__main__":
    for name, picture in PICTURES.items():
        FOLDER.joinpath(f"{name}.svg").write_text(picture(), encoding="utf-8")
