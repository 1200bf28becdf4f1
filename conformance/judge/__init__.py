# SPDX-License-Identifier: Apache-2.0
"""Judge copies: the oracle, its reading of layouts, test bytes, and the backend under test."""
