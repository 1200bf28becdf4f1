# SPDX-License-Identifier: Apache-2.0
"""Contract suites: what a tier, a transport and an I/O engine of any package must do.

Each module holds the checks of one protocol, written once. They run over PortaKV's own
implementations in its tests, over a deliberately wrong one, and over yours:

    portakv conform --contract io my_package.module:MyEngine
"""
