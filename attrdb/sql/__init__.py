"""SQL over one snapshot, read-only and closed in."""

from attrdb.sql.connection import connect, run, stream

__all__ = ["connect", "run", "stream"]
