"""What a command ends with."""

from __future__ import annotations

import sys
from collections.abc import Callable

from terrazzo.lowering.errors import TerrazzoError, UserError


def exit_status(main: Callable[[], int]) -> int:
    """A command's own status; after one line about a request that cannot be right 2, about one that failed 1."""
    try:
        return main()
    except TerrazzoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
