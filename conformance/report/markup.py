# SPDX-License-Identifier: Apache-2.0
"""HTML that cannot be broken by what it shows: every string is escaped, only `Html` is not."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from typing import TypeAlias

_VOID = frozenset({"br", "img", "input", "link", "meta", "wbr"})
# Characters that no HTML or XML document may hold, and lone surrogates, which UTF-8 has no bytes
# for. A vendor's traceback brings some along.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


class Html(str):
    """Text that is markup already; made by `element`, `join` and for constants of this package."""

    __slots__ = ()


Content: TypeAlias = "str | int | Iterable[Content] | None"


def printable(text: str) -> str:
    """The text with characters that a document must not hold written as ``\\x1b``."""
    return _UNPRINTABLE.sub(lambda found: ascii(found.group())[1:-1], text)


def join(content: Content, between: str = "") -> Html:
    """Anything as markup: strings escaped, `Html` kept, None left out, others one by one."""
    if content is None:
        return Html("")
    if isinstance(content, Html):
        return content
    if isinstance(content, (str, int)):
        return Html(html.escape(printable(str(content))))
    return Html(between.join(join(part) for part in content))


def element(name: str, /, *content: Content, **attributes: str | int | bool | None) -> Html:
    """One element with its content.

    Attributes are written as Python writes them: ``class_`` is class, ``data_status`` is
    data-status. True gives an attribute without value; None and False leave it out.
    """
    parts = [name]
    for key, value in attributes.items():
        written = key.strip("_").replace("_", "-")
        if value is True:
            parts.append(written)
        elif value is not None and value is not False:
            parts.append(f'{written}="{html.escape(printable(str(value)))}"')
    opening = f"<{' '.join(parts)}>"
    return Html(opening if name in _VOID else f"{opening}{join(content)}</{name}>")


def prose(text: str) -> Html:
    """A sentence; what stands between backticks is code."""
    pieces = text.split("`")
    if len(pieces) % 2 == 0:
        return join(text)
    return join(element("code", piece) if n % 2 else piece for n, piece in enumerate(pieces))


def breakable(text: str, marks: str = "/:[,") -> Html:
    """A long identifier that may be broken before any of the marks where a line ends."""
    broken = re.sub(f"(?<=[^{re.escape(marks)}])(?=[{re.escape(marks)}])", "\0", printable(text))
    return join((join(piece) for piece in broken.split("\0")), "<wbr>")
