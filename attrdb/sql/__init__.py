"""SQL over one snapshot, read-only and closed in."""

from attrdb.sql.connection import connect, run, stream
from attrdb.sql.user_tables import load_tables

__all__ = ["connect", "load_tables", "run", "stream"]
