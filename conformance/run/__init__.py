# SPDX-License-Identifier: Apache-2.0
"""Running the suite: pytest plugin, worker processes, and the record of a run."""
