"""Which parts of a shared job a process is working on. The system frees the claims of a process that dies."""

import errno
import fcntl
import os
from pathlib import Path

from kr_fast.runtime.log import logger


class Claims:
    """Part ``k`` is claimed by a POSIX record lock on byte ``k`` of one file, so no claim can be stale.

    On a file system without locks every claim is granted: a claim avoids duplicate work and protects nothing. Two
    objects on one file in one process do not see each other's claims, and closing one frees those of both.
    """

    def __init__(self, path: str | Path):
        self._file = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
        self.supported = True

    def take(self, part: int) -> bool:
        """Whether this process has now claimed ``part``; False while another one does."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, part)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
                raise
            if self.supported:
                logger.warning("no file locks in this folder (%s): processes may do the same work twice", error)
            self.supported = False
        return True

    def free(self, part: int) -> None:
        """Release the claim on ``part``."""
        if self.supported:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, part)

    def close(self) -> None:
        """Release all claims."""
        os.close(self._file)
