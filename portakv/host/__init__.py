# SPDX-License-Identifier: Apache-2.0
"""The host side: pinned memory, plain copies, and small copies that wait for no copy engine.

Nothing is imported here; import a module by its name.
"""
