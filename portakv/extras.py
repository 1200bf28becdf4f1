# SPDX-License-Identifier: Apache-2.0
"""Name the commands that install what PortaKV's base package lacks, for messages."""

from __future__ import annotations


def installing(extra: str) -> str:
    """Return the commands that install an extra, in a clone and from a release.

    ``-e`` keeps an installation editable that is so already.
    """
    return f"`pip install -e '.[{extra}]'` in a clone of PortaKV ('portakv[{extra}]' once released)"
