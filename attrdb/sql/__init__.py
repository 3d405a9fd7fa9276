"""SQL over one snapshot, read-only and closed in."""

from attrdb.sql.connection import connect, run, select, stream
from attrdb.sql.limits import Limits

__all__ = ["Limits", "connect", "run", "select", "stream"]
