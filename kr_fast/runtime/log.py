"""The package's logger. Libraries only emit; the command line decides what is shown."""

import logging
import os

logger = logging.getLogger("kr_fast")


def show(level: int = logging.INFO) -> None:
    """Print the package's messages to stderr, one line each (used by the command line)."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("kr-fast: %(message)s"))
    logger.handlers[:] = [handler]
    # Every rank reads the same data and says the same of it; warnings may differ.
    logger.setLevel(max(level, logging.WARNING) if os.environ.get("RANK", "0") != "0" else level)
    logger.propagate = False
