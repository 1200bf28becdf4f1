# SPDX-License-Identifier: Apache-2.0
"""The old place of `Index`, kept for one release; use `portakv.Index`."""

from portakv.view.index import Index as Index
