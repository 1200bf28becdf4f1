# SPDX-License-Identifier: Apache-2.0
"""Layout strings: axes, extents, presets and pictures. Strings and integers only."""
