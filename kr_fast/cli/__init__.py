"""The ``kr-fast`` command: one file per subcommand, each of which parses, calls and prints."""

import argparse
import sys
from collections.abc import Sequence

from kr_fast.runtime import log
from kr_fast.runtime.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for bad input, 130 after an interrupt."""
    from kr_fast import __version__
    from kr_fast.cli import audit, bench, info, run, synthesize

    parser = argparse.ArgumentParser(prog="kr-fast", description="Knowledge Recycling with compiled kernels.")
    parser.add_argument("--version", action="version", version=f"kr-fast {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (run, synthesize, audit, bench, info):
        command.add(subparsers)
    arguments = parser.parse_args(argv)
    log.show()
    try:
        return arguments.run(arguments)
    except (UserError, OSError) as error:
        print(f"kr-fast: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("kr-fast: interrupted; the same command continues where it stopped", file=sys.stderr)
        return 130


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
