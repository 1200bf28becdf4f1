# SPDX-License-Identifier: Apache-2.0
"""Work with dependencies, priorities and deadlines, carried out by the workers of links. Knows
neither files nor networks, and needs no store."""
