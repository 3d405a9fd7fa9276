"""What a table's schema is made of: columns, each with its meaning."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

TEXT, INT32, INT64, FLOAT64 = pa.string(), pa.int32(), pa.int64(), pa.float64()
TIMESTAMP = pa.timestamp("us", tz="UTC")


@dataclass(frozen=True)
class Column:
    """A column of a table: what it means, and whether it may be null."""

    name: str
    type: pa.DataType
    meaning: str
    required: bool = False
    key: bool = False

    @property
    def field(self) -> pa.Field:
        # Lance lets no two writers insert the same key, even when neither saw the other's rows.
        metadata = {"lance-schema:unenforced-primary-key": "true"} if self.key else None
        return pa.field(self.name, self.type, nullable=not (self.required or self.key), metadata=metadata)


@dataclass(frozen=True)
class TableSchema:
    """A table: what a row of it is, and its columns."""

    grain: str
    columns: tuple[Column, ...]

    @property
    def arrow(self) -> pa.Schema:
        return pa.schema([column.field for column in self.columns])

    @property
    def key(self) -> str | None:
        """The column that identifies a row; None for tables whose rows have no id."""
        return next((column.name for column in self.columns if column.key), None)


def key_column(name: str, meaning: str) -> Column:
    return Column(name, TEXT, meaning, key=True)
