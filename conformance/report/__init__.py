# SPDX-License-Identifier: Apache-2.0
"""Reports of a run: one record, written in the forms that its readers use."""
