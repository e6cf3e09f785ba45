"""Errors that a user can mend, in the package's form: ``where: argument must RULE, got VALUE``."""

from typing import Any, NoReturn


class UserError(ValueError):
    """Bad input. The command line prints it as one line and exits with code 2."""


def fail(where: str, argument: str, rule: str, value: Any) -> NoReturn:
    """Raise a :class:`UserError` naming the argument, its rule and the value it had."""
    raise UserError(f"{where}: {argument} must {rule}, got {value}")
