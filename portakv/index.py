# SPDX-License-Identifier: Apache-2.0
"""Where `portakv.view.index` was; it stays for one release."""

from portakv.view.index import Ids as Ids
from portakv.view.index import Index as Index
