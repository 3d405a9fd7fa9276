"""What a command needs of the machine before it begins: open files, and a folder for temporary ones.

Without them Lance panics, and prints where.
"""

from __future__ import annotations

import os
import resource
import tempfile
from contextlib import suppress

from attrdb.errors import AttrdbError

FEWEST_FILES = 12  # with 8, Lance cannot start its threads


def prepare() -> None:
    """Raise the limit of open files as far as this process may, and name a temporary folder that can be written.

    raises: AttrdbError if too few files may be open
    """
    _raise_file_limit()
    _choose_temporary_folder()


def _raise_file_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # macOS has a lower bound of its own
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    if 0 <= soft < FEWEST_FILES:
        raise AttrdbError(
            f"this process may open {soft} files at once; needed are {FEWEST_FILES}: raise the limit (ulimit -n), then rerun "
            "the command"
        )


def _choose_temporary_folder() -> None:
    """Python looks for a folder that can be written; Lance takes TMPDIR, or /tmp."""
    if os.access(os.environ.get("TMPDIR") or "/tmp", os.W_OK | os.X_OK):
        return
    with suppress(FileNotFoundError):  # there is none: most commands need none
        os.environ["TMPDIR"] = tempfile.gettempdir()
