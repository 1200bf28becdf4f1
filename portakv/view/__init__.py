# SPDX-License-Identifier: Apache-2.0
"""Tensors read through a layout: form, addresses, slices and index lists."""

from portakv.view.index import IdList as IdList
from portakv.view.index import Index as Index
from portakv.view.view import KVView as KVView
