# SPDX-License-Identifier: Apache-2.0
"""The sizes of pages, their keys, and the forms under which pages lie in folders."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from shutil import rmtree
from typing import NamedTuple

from portakv.arguments import invalid, text, whole
from portakv.errors import InvalidTerms
from portakv.serving.local import StoreTerms
from portakv.storage import BlockForm
from portakv.storage.files import claim, unusable
from portakv.storage.files import forms_in as every_form_in

#: Bytes of a key of a store; keys of other lengths are hashed.
KEY = 32


def page_key(key: bytes) -> bytes:
    """Return the 32 bytes under which the page of a key of any length is stored."""
    return key if len(key) == KEY else blake2b(key, digest_size=KEY).digest()


def check_raw(terms: StoreTerms) -> None:
    """Raise `InvalidTerms` for terms of pages with an encoding, which takes rows of a known
    type."""
    if terms.encoding is not None:
        do = "Leave it out."
        raise invalid("encoding", "None, as pages are stored as they are", terms.encoding, do)


def check_shared(terms: StoreTerms) -> None:
    """Raise `InvalidTerms` for terms of pages that processes cannot share through a folder."""
    if not terms.shared or not terms.folders or terms.bucket is not None:
        raise InvalidTerms(
            "Expected terms with shared and a folder, and without a bucket, which processes share "
            "anyway, got others. Correct them."
        )


class PageSize(NamedTuple):
    """The size of pages.

    Attributes:
        nbytes: bytes of a page.
        runs: into how many runs of equal length a page is cut, each at a separate address, such as
            one for each layer.
    """

    nbytes: int
    runs: int = 1

    def form(self, model: str, identity: str = "") -> BlockForm:
        """Return the form of stored pages; that of another model or identity differs.

        Raises `InvalidTerms` for a size that no page can have.
        """
        whole("nbytes", self.nbytes, 1)
        whole("runs", self.runs, 1, 1 << 16)
        if self.nbytes % self.runs:
            expected = f"a multiple of the {self.runs} runs of a page"
            raise invalid("nbytes", expected, self.nbytes)
        runs = (0, self.runs, self.runs)
        width = (self.nbytes // self.runs,)
        notes = f"page of an engine {text('identity', identity, least=0, most=1 << 15)}".rstrip()
        layout = "block layer page"
        return BlockForm(model, "uint8", 1, width, 1, runs, (0, 1, 1), layout, notes=notes)


def forms_in(folder: str, model: str, identity: str = "") -> Iterator[BlockForm]:
    """Yield the forms of the pages that lie in a folder, of a model and an identity."""
    for form in every_form_in(Path(folder)):
        if size_of(form).form(model, identity) == form:
            yield form


def remove_pages(folder: str, model: str, identity: str, sizes: Iterable[PageSize]) -> None:
    """Remove the pages of a model and an identity from a folder that no store has open: those of
    some sizes, which lie there, and those of all other sizes.

    Raises `StoreBusy` for a folder that another process has, and `StoreError` for files that cannot
    be removed.
    """
    place = Path(folder)
    claimed = claim(place)
    try:
        names = {form.name for form in forms_in(folder, model, identity)}
        for name in names.union(size.form(model, identity).name for size in sizes):
            rmtree(place / name)
    except OSError as error:
        raise unusable(place, error) from None
    finally:
        os.close(claimed)


def size_of(form: BlockForm) -> PageSize:
    """Return the size of the pages that a form would have."""
    runs = form.layers[1]
    return PageSize(runs * form.widths[0], runs)


def sizes_in(terms: StoreTerms, model: str, identity: str = "") -> list[PageSize]:
    """Return the sizes of the pages that lie in the folders of terms.

    A store that begins with these sizes finds all pages of earlier processes. Sizes for which
    ``staging`` has no room are left out.
    """
    sizes = dict[PageSize, None]()
    for folder in terms.folders:
        for form in forms_in(folder, model, identity):
            if form.image_bytes <= terms.staging:
                sizes[size_of(form)] = None
    return [*sizes]
