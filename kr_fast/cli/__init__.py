"""The ``kr-fast`` command: one file per subcommand, each of which parses, calls and prints."""

import logging
import os
import sys
import traceback
from collections.abc import Sequence

from kr_fast.runtime import log, progress
from kr_fast.runtime.errors import UserError, first_line

STARTS_AGAIN = ("bench", "export", "info")  # commands of which nothing is kept when they are interrupted


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    0; 2 for bad input; 3 where a figure is above its limit of ``--fail-above``, or was not computed; 1 for an error of
    this package; 130 after an interrupt. An error is one line, with ``--debug`` its traceback.
    """
    from kr_fast import __version__
    from kr_fast.backends import registry
    from kr_fast.cli import audit, bench, distil, export, generator, info, parser, run, synthesize

    whole = parser.Parser(prog="kr-fast", description="Knowledge Recycling with compiled kernels.")
    whole.add_argument("--version", action="version", version=f"kr-fast {__version__}")
    subparsers = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (run, generator, distil, synthesize, audit, export, bench, info):
        command.add(subparsers)
    arguments = parser.parse(whole, argv)
    log.show(logging.WARNING if arguments.quiet else logging.DEBUG if arguments.verbose else logging.INFO)
    progress.quiet(arguments.quiet)
    try:
        registry.check_environment()
        code = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of the output has ended, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        further = "" if arguments.command in STARTS_AGAIN else "; the same command continues where it stopped"
        print(f"kr-fast: interrupted{further}", file=sys.stderr)
        return 130
    except Exception as error:
        if arguments.debug:
            traceback.print_exc()
        return _print_error(error)


def _print_error(error: Exception) -> int:
    """Print ``error`` as one line; returns the exit code."""
    # Raised by the backends, which do not use UserError.
    forced = "KR_FAST_BACKEND" in str(error) or "KR_FAST_CPU_ISA" in str(error)
    if isinstance(error, UserError | OSError) or forced:
        print(f"kr-fast: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if isinstance(error, MemoryError):
        print(f"kr-fast: there is not enough memory ({first_line(error)})", file=sys.stderr)
        return 2
    name = type(error).__name__
    print(f"kr-fast: unexpected error, {name}: {first_line(error)} (--debug shows where)", file=sys.stderr)
    return 1
