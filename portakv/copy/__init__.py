# SPDX-License-Identifier: Apache-2.0
"""The one primitive: ids checked, the copy cut into pieces, enqueued, remembered."""
