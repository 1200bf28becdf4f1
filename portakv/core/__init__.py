# SPDX-License-Identifier: Apache-2.0
"""The compiled core: its shared library, which `native/core` holds the sources of."""
