"""A folder that one process at a time may use: a lock on a file in it, which the system frees when the process ends."""

from __future__ import annotations

import errno
import sys
import time
from pathlib import Path
from typing import IO

from kalmagrove.errors import KalmaGroveError

LOCK_NAME = ".lock"
_ATTEMPTS, _SECONDS_BETWEEN_ATTEMPTS = 5, 0.05
_NO_LOCKS_HERE = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


class FolderInUse(KalmaGroveError):
    """Another process holds the folder."""


def lock_folder(folder: Path, what: str) -> IO[bytes]:
    """Opens the folder's lock file and holds it.

    Args:
        folder: Must exist.
        what: The folder's name in the error.

    Returns:
        The open file; :func:`unlock` it and close it.

    Raises:
        FolderInUse: Another process holds it.
    """
    file = (folder / LOCK_NAME).open("ab")
    try:
        # A reader that looks whether somebody is at work holds the lock for a moment.
        for attempt in range(_ATTEMPTS):
            try:
                _take(file)
                return file
            except BlockingIOError:
                if attempt == _ATTEMPTS - 1:
                    raise
                time.sleep(_SECONDS_BETWEEN_ATTEMPTS)
    except OSError as error:
        # Some network file systems have no locks, and work there is better than none.
        if error.errno not in _NO_LOCKS_HERE:
            file.close()
            raise FolderInUse(
                f"{what} {folder} is in use by another process; wait for it to end or choose another folder"
            ) from error
    return file


def unlock(file: IO[bytes]) -> None:
    """Frees a lock and closes its file; doing so twice is harmless."""
    if file.closed:
        return
    if sys.platform != "win32":
        import fcntl

        # Closing alone would leave it with worker processes that were forked meanwhile.
        fcntl.flock(file, fcntl.LOCK_UN)
    file.close()


def _take(file: IO[bytes]) -> None:
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_locked(file: IO[bytes]) -> bool:
    """Whether a process holds the lock of an open lock file."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)
        else:
            import fcntl

            # Given back at once: a run that wants the folder in between is refused.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            fcntl.flock(file, fcntl.LOCK_UN)
    except (BlockingIOError, PermissionError):
        return True
    return False
