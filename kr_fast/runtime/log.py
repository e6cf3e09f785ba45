"""The package's logger. Libraries only emit; the command line decides what is shown."""

import logging

logger = logging.getLogger("kr_fast")


def show(level: int = logging.INFO) -> None:
    """Print the package's messages to stderr, one line each (used by the command line)."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("kr-fast: %(message)s"))
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False
