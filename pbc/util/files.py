"""Open files that others may have put there: regular files alone, within a bound.

A pipe would wait for ever, and a device never end.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


def opened(path: Path, *, follow: bool = True) -> BinaryIO:
    """Open a regular file to read; raises OSError for anything else.

    follow: whether a link may lead to it.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    handle = os.open(path, flags)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_bytes(path: Path, most_bytes: int, *, follow: bool = True) -> bytes:
    """Return what a regular file holds; raises OSError, also where that is more than the bound."""
    with opened(path, follow=follow) as file:
        size_bytes = os.fstat(file.fileno()).st_size
        if size_bytes > most_bytes:
            raise OSError(errno.EFBIG, f"it has more than {most_bytes} bytes", str(path))
        return file.read(size_bytes)  # room is made for all that is asked for
