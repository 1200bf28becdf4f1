# SPDX-License-Identifier: Apache-2.0
"""The benchmark of engines: what a request waits for, with each place from which rows come."""
