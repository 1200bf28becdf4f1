# SPDX-License-Identifier: Apache-2.0
"""The AscendC kernel: `rows.h`, its launch apart, and ``emulation/`` to run it without CANN.

It holds no Python code of its own. README.md says what was run and what was not.
"""
