"""The errors attrdb raises for what a user, a file or a database can cause."""


class AttrdbError(Exception):
    """Root of all attrdb errors; the message says what was found, what was needed and what to do next."""


class InvalidValue(AttrdbError, ValueError):
    """A value, a file or a row that cannot be used as it is."""


class NotFound(AttrdbError, LookupError):
    """Something that was named and is not there."""


class MissingExtra(AttrdbError, ImportError):
    """A part of attrdb that needs an extra, such as `pip install attrdb[images]`."""


class OutOfMemory(AttrdbError, MemoryError):
    """Work that does not fit into the memory of a GPU, or of the machine."""


class Busy(AttrdbError):
    """Work that another process is at."""


class QueryRefused(AttrdbError):
    """An SQL statement that failed, or that asked for files, the network or other settings."""


class StorageError(AttrdbError, OSError):
    """A disk that is full or read-only, or a file of the database that is damaged."""
