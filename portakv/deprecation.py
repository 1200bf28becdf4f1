# SPDX-License-Identifier: Apache-2.0
"""Warn of former names, which ship in 0.1.0 and go in 0.2.0."""

from __future__ import annotations

import warnings


def warn_former(former: str, name: str, above: int = 0) -> None:
    """Warn the code that used a former name.

    Call this in the function that has the former name; from further inside, pass in ``above`` the
    number of frames between that function and the call.
    """
    why = f"{former} is now {name}. The former name ships in 0.1.0 and goes in 0.2.0."
    warnings.warn(why, DeprecationWarning, stacklevel=3 + above)
