"""Errors that a user can correct, in the package's form: ``where: argument must RULE, got VALUE``."""

from typing import Any, NoReturn


class UserError(ValueError):
    """Bad input. The command line prints it as one line and exits with code 2."""


def fail(where: str, argument: str, rule: str, value: Any) -> NoReturn:
    """Raise a :class:`UserError` naming the argument, its rule and the value it had."""
    raise UserError(f"{where}: {argument} must {rule}, got {value}")


def first_line(error: BaseException) -> str:
    """The first line of an error's text; the name of its type where it has none, as of a bare ``assert``."""
    try:
        lines = str(error).strip().splitlines()
    except Exception:  # a class of a user's own, whose text cannot be made
        lines = []
    return lines[0].strip() if lines else type(error).__name__
