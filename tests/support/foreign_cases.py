# SPDX-License-Identifier: Apache-2.0
"""Views on the host that stand for those whose addresses only a device has."""

from __future__ import annotations

from dataclasses import replace

from portakv import KVView
from portakv.view.form import same_form


def blind(view: KVView) -> KVView:
    """Return the view, whose addresses only its table has from now on; `KVView.known` reports
    whether they were read back."""
    view._table = view.table.clone()
    view.form = same_form(replace(view.form, table_on_device=True))
    view._origins = None
    return view
