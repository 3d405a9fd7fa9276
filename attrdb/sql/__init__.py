"""SQL over one snapshot, read-only and closed in."""

from attrdb.sql.connection import connect, run, select, stream
from attrdb.sql.limits import Limits
from attrdb.sql.user_tables import load_tables

__all__ = ["Limits", "connect", "load_tables", "run", "select", "stream"]
