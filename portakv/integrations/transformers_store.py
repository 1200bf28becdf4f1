# SPDX-License-Identifier: Apache-2.0
"""The path that configurations name; see `portakv.integrations.transformers.store`."""

from portakv.integrations.transformers.store import PrefixStore as PrefixStore
