# SPDX-License-Identifier: Apache-2.0
"""Layout strings: axes, extents and presets. Strings and integers only."""
