"""What commands share: their help, what stands on the command line, and what a command ends with."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from terrazzo.lowering.errors import TerrazzoError, UserError

# The largest size that a plan takes: an int of 32 bits.
LARGEST = 2**31 - 1
# What `--dtype` says of itself.
DTYPE = (
    "of the weights (default: bf16); with fp8 only the layers' matrices have eight bits, the rest is bf16, and "
    "activations are quantised per token"
)


def parser_of(tool: str, text: str) -> argparse.ArgumentParser:
    """A parser whose help is a module's docstring: its first paragraph above the arguments, the others below them."""
    first, *others = text.split("\n\n")
    return argparse.ArgumentParser(
        prog=f"python -m terrazzo.tools.{tool}",
        description=first,
        epilog="\n\n".join(others),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def sizes(text: str, least: int = 1) -> list[int]:
    """Comma-separated sizes, as the `type` of an argument."""
    parts = text.split(",")
    if not all(part.isdecimal() and least <= int(part) <= LARGEST for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no comma-separated list of sizes from {least} to {LARGEST}")
    return [int(part) for part in parts]


def number(text: str, least: int = 1) -> int:
    """A number of things, as the `type` of an argument."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from {least} on")
    return int(text)


def size_range(text: str, least: int = 1) -> tuple[int, int]:
    """A range LO:HI of sizes, both included, as the `type` of an argument."""
    lo, _, hi = text.partition(":")
    if not (lo.isdecimal() and hi.isdecimal() and least <= int(lo) and int(hi) <= LARGEST):
        raise argparse.ArgumentTypeError(f"{text!r} is no range like {least}:16384")
    if int(lo) > int(hi):
        raise argparse.ArgumentTypeError(f"{text!r} begins beyond its end")
    return int(lo), int(hi)


def with_form(models: Sequence[str], dtype: str, named: bool) -> list[str]:
    """Those of the models that have a form in a dtype, told before anything is run.

    Args:
        models: names or folders.
        dtype: a key of `DTYPES`.
        named: the models were asked for by name. Where they are simply all there are, one without a form is left out,
            with a line on stderr.

    Raises:
        UserError: there is no model of a name, or one that was asked for has no form in that dtype.
    """
    # It brings triton in, and who imports this module may not have decided yet whether that interprets (device.py).
    from terrazzo.tools.models import DTYPES, build

    found = []
    for name in models:
        try:
            build(name, dtype=DTYPES[dtype], device="meta", layers=1)
        except UserError as error:
            if named:
                raise
            print(f"left out: {error}", file=sys.stderr)
        else:
            found.append(name)
    return found


def writable(path: str | None, screen: bool = True) -> None:
    """Makes the file that results go to where it is not there yet; None and '-' are no files.

    Args:
        path: as it was given.
        screen: '-' stands for the screen.

    Raises:
        UserError: it cannot be written.
    """
    if path == "-" and not screen:
        raise UserError("file '-'", "measurements go to a file, the screen has a summary", stage="tools",
                        remedy="Name a file.")  # fmt: skip
    if path in (None, "-"):
        return
    try:
        with open(path, "a"):
            pass
    except OSError as cause:
        raise UserError(f"file {path!r}", f"it cannot be written: {cause.strerror}", stage="tools",
                        remedy="Name one in a folder that is there.") from cause  # fmt: skip


def exit_status(main: Callable[[], int]) -> int:
    """A command's own status; after one line about a request that cannot be right 2, about one that failed 1, and of a
    command that was interrupted what shells take for that."""
    try:
        status = main()
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # Who reads has read enough (`| head`); what is left must not be flushed at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    except TerrazzoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
