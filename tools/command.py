"""What commands share: sizes on the command line, and what a command ends with."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

from terrazzo.lowering.errors import TerrazzoError, UserError

# The largest size that a plan takes: an int of 32 bits.
LARGEST = 2**31 - 1


def sizes(text: str) -> list[int]:
    """Comma-separated sizes, as the `type` of an argument."""
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) <= LARGEST for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no comma-separated list of sizes up to {LARGEST}")
    return [int(part) for part in parts]


def exit_status(main: Callable[[], int]) -> int:
    """A command's own status; after one line about a request that cannot be right 2, about one that failed 1."""
    try:
        status = main()
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # Who reads has read enough (`| head`); what is left must not be flushed at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except TerrazzoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
