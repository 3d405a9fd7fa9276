"""What a command says of an exception that nobody foresaw: what the machine lacked, or a fault of attrdb."""

from __future__ import annotations

import os
import tempfile
import traceback

from attrdb.text import visible

NO_MEMORY = (
    "cannot allocate memory",
    "failed to map segment from shared object",
    "defaultcpuallocator",
    "out of memory",
    "can't start new thread",
    "bad_alloc",
    "malloc of size",
)
NO_DESCRIPTORS = ("too many open files", "no file descriptors")


def fault_text(error: Exception) -> str:
    return _of_machine(error) or _of_attrdb(error)


def _of_machine(error: Exception) -> str | None:
    """What the machine lacked, if that is why a command failed."""
    causes = f"{error} {error.__cause__ or ''} {error.__context__ or ''}".lower()
    if isinstance(error, MemoryError) or any(phrase in causes for phrase in NO_MEMORY):
        return "the machine has no memory left; what was finished is kept: free some, then rerun the command"
    if any(phrase in causes for phrase in NO_DESCRIPTORS):
        return "too many files are open; what was finished is kept: raise the limit (ulimit -n), then rerun the command"
    return None


def _of_attrdb(error: Exception) -> str:
    """A fault of attrdb, with the file that holds its traceback: what is needed to mend it."""
    described = visible(f"{type(error).__name__}: {error}")
    trace = "".join(traceback.format_exception(error))
    try:
        handle, name = tempfile.mkstemp(prefix="attrdb-fault-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(trace)
    except OSError:
        name = "this: " + visible(trace)
    return f"this is a fault of attrdb ({described}); what was finished is kept. Please report it with {name}"
