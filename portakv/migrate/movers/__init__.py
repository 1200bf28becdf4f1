# SPDX-License-Identifier: Apache-2.0
"""Ways for staged chunks to cross where memory cannot be mapped."""
