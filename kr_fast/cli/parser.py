"""The argument parser: no abbreviations, errors of one line that name the nearest option."""

import argparse
import difflib
import itertools
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

COMMON = ("--quiet", "-v", "--verbose", "--debug")  # of every command, behind its name or before it


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` without abbreviations of options, whose errors are one line."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with code 2."""
        # argparse itself writes "argument --flag: ignored explicit argument 'x'".
        flag, _, rule = " ".join(message.split()).removeprefix("argument ").partition(": ignored explicit argument ")
        line = f"{flag}: takes no value, got {rule}" if rule else flag
        self.exit(2, f"{self.prog}: {line}; {self.prog} --help lists the options\n")

    def options(self) -> list[str]:
        """Every ``--name`` that this parser takes, without the negations of flags."""
        names = [name for action in self._actions for name in action.option_strings]
        return [name for name in names if name.startswith("--") and not name.startswith("--no-")]


def parse(parser: Parser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of ``argv``; an unknown one is an error that suggests an option.

    A command with ``needs_arguments`` prints its help if there are none, instead of beginning long work.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv:
        parser.print_help()
        parser.exit(2)
    before = list(itertools.takewhile(COMMON.__contains__, argv))
    argv = argv[len(before) :] + before
    arguments, unknown = parser.parse_known_args(argv)
    used = arguments.parser
    if unknown:
        given = next((each for each in unknown if each.startswith("-")), unknown[0])
        name, flag = given.partition("=")[0], argv[argv.index(given) - 1]
        remedy = f" ({flag} takes no value)" if flag.startswith("-") and not name.startswith("-") else ""
        used.error(f"{name} is not an option of this command{remedy or did_you_mean(name, used.options())}")
    if getattr(arguments, "needs_arguments", False) and len(argv) == 1:
        used.print_help()
        used.exit(2)
    return arguments


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """`` (did you mean A or B?)``, or an empty text where no known name is similar."""
    plain = {each: each.strip("-").replace("_", "-") for each in known}
    word = name.strip("-").replace("_", "-").lower()
    near = [each for each in known if len(word) > 2 and word in plain[each]]
    if word not in (plain[each] for each in near):
        near += [each for each in known if plain[each] in difflib.get_close_matches(word, plain.values(), 3, 0.7)]
    exact = [each for each in near if plain[each] == word]
    near = exact or sorted(dict.fromkeys(near), key=lambda each: not plain[each].startswith(word))
    return f" (did you mean {' or '.join(near[:4])}?)" if near else ""


def add_common(parser: argparse.ArgumentParser) -> None:
    """The options of every command: what is shown."""
    parser.set_defaults(parser=parser)
    group = parser.add_argument_group("what is shown")
    group.add_argument("--quiet", action="store_true", help="warnings, errors and the result only, no progress")
    group.add_argument("-v", "--verbose", action="store_true", help="more messages")
    group.add_argument("--debug", action="store_true", help="the traceback of an error")
