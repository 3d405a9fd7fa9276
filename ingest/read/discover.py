"""What lies at a path that may be a corpus: its sources, and what of it is not read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path, PurePosixPath

from attrdb.errors import InvalidValue, NotFound
from attrdb.ingest.read.formats import READ, picture_suffixes
from attrdb.ingest.read.shard_file import SHARD_SUFFIXES, is_shard, shard_stem
from attrdb.ingest.read.side_fields import LABEL_TABLES, LabelTables
from attrdb.ingest.read.sources import PICTURES, SHARDS, Item, Source, folder_items, refused
from attrdb.ingest.read.tables import Damaged, Naming, Table, count_items, has_pictures, layout_of, table_items
from attrdb.ingest.read.walk import HIDDEN, NO_PICTURES, SIDE_FILES, Fence, File, Skipped, skip_other, walk
from attrdb.ingest.read.webdataset import Shard, check_shards, count_images, webdataset_items

TABLES = (".parquet", ".arrow")
NO_CHOICE: Mapping[str, str] = {}


@dataclass(frozen=True)
class Corpus:
    """Images that may be ingested, by source, and what lies beside them and is not read."""

    path: Path
    source: str
    sources: tuple[Source, ...]
    skipped: Skipped = field(default_factory=Skipped)

    @property
    def n_items(self) -> int | None:
        """How many there are, None where that would take reading all of them."""
        return total_items(self.sources)

    def items(self) -> Iterator[Item]:
        return _chained(self.sources)


@dataclass(frozen=True)
class Choices:
    """What the user says of a corpus. source: its name; columns: ours -> theirs; id_column: that names a row of a table."""

    source: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    id_column: str | None = None


def open_corpus(
    path: Path, source: str | None = None, columns: Mapping[str, str] = NO_CHOICE, id_column: str | None = None
) -> Corpus:
    """The corpus at a path, looked at but not read: a folder with pictures, tar shards, Parquet and Arrow files in it, or one
    of these files.

    source:    name of the data set; the folder's name when left out, for tables with a column `name` what their rows say
    columns:   ours -> theirs, before the known names; theirs are columns of a table, fields of a side file, and for
               `image` also the members of a tar shard, such as left.png
    id_column: the column of a table that names a row
    raises:    NotFound if there is nothing at the path, InvalidValue if it is no corpus or has no image in it
    """
    choices = Choices(source, columns, id_column)
    if path.is_dir():
        return _open_folder(path, choices)
    if not path.exists():
        raise NotFound(f"no folder or file {path}")
    if is_shard(path.name):
        name = source or shard_stem(path.resolve().name)
        shards = [Shard(path, name, name)]
        check_shards(shards)
        skipped = Skipped()
        return Corpus(path, name, (_shard_source(shards, choices, skipped),), skipped)
    if path.suffix in TABLES:
        tables = _Tables(choices, Fence(path.parent))
        tables.add(Table(path), Naming(source or path.resolve().stem, source is not None, ""))
        return _checked(Corpus(path, source or path.resolve().name, tuple(tables.sources())), tables)
    raise InvalidValue(
        f"{path} is neither a folder of images nor a file that holds them: {', '.join((*TABLES, *SHARD_SUFFIXES))}"
    )


def _open_folder(path: Path, choices: Choices) -> Corpus:
    name = choices.source or path.resolve().name
    skipped, labels, tables = Skipped(), LabelTables(), _Tables(choices, Fence(path))
    n_pictures, shards = 0, list[Shard]()
    for file in walk(path, skipped):
        if file.suffix in picture_suffixes():
            n_pictures += 1
        elif is_shard(file.path.name):
            shards.append(Shard(file.path, name, _prefix(name, file)))
        elif file.path.name in LABEL_TABLES and not (file.suffix in TABLES and has_pictures(Table(file.path))):
            labels.add(file, skipped)
        elif file.suffix == ".arrow" and file.path.name.startswith("cache-"):
            skipped.add(HIDDEN, file.inside)  # what `datasets` keeps of its own steps
        elif file.suffix in TABLES and _is_side_file(file) and not has_pictures(Table(file.path)):
            skipped.add(SIDE_FILES, file.inside)
        elif file.suffix in TABLES:
            inside = file.inside.removesuffix(file.path.suffix)
            try:
                tables.add(Table(file.path), Naming(name, choices.source is not None, inside))
            except InvalidValue as error:
                skipped.add(NO_PICTURES, file.inside)
                tables.problems.append(error)
        elif file.path.name.endswith("_stats.json") and _is_side_file(file):
            skipped.add(SIDE_FILES, file.inside)
        else:
            skip_other(file, skipped)
    sources = []
    if n_pictures:
        items = partial(folder_items, path, name, labels, _without_image(choices.columns))
        sources.append(Source(PICTURES, (), n_pictures, items))
    if shards:
        sources.append(_shard_source(shards, choices, skipped))
    sources.extend(tables.sources())
    if shards and len(sources) == 1:
        check_shards(shards)
    return _checked(Corpus(path, name, tuple(sources), skipped), tables)


def _checked(corpus: Corpus, tables: _Tables) -> Corpus:
    """raises: InvalidValue for a corpus without images, with the reason where a table has it"""
    if corpus.n_items == 0 and tables.problems:
        raise tables.problems[0]
    if corpus.n_items == 0:
        aside = f". Not read: {'; '.join(corpus.skipped.lines())}" if corpus.skipped.counts else ""
        raise InvalidValue(f"{corpus.path} has no image in it; {READ} are read, as files, in tars and in tables{aside}")
    return corpus


def _prefix(name: str, file: File) -> str:
    """What goes before the keys of a shard: those of one folder are one webdataset."""
    folder = PurePosixPath(file.inside).parent.as_posix()
    return name if folder == "." else f"{name}/{folder}"


def _is_side_file(file: File) -> bool:
    """Whether a table or a count lies beside img2dataset's shard of the same number."""
    stem = file.path.stem.removesuffix("_stats")
    return stem in file.beside or any(stem + suffix in file.beside for suffix in SHARD_SUFFIXES)


def _shard_source(shards: list[Shard], choices: Choices, skipped: Skipped) -> Source:
    items = partial(webdataset_items, shards, choices.columns, skipped)
    return Source(SHARDS, tuple(shard.path for shard in shards), count_images(shards), items)


class _Tables:
    """Tables, which become one source for each kind. problems: why some of them cannot be read."""

    def __init__(self, choices: Choices, fence: Fence):
        self.choices, self.fence = choices, fence
        self.problems: list[InvalidValue] = []
        self._by_kind: dict[str, list[Source]] = {}

    def add(self, table: Table, naming: Naming) -> None:
        """raises: InvalidValue for a table that can be read, and has no pictures"""
        n_items: int | None = None
        try:
            layout = layout_of(table, self.choices.columns, self.choices.id_column)
        except Damaged as error:
            # It has an item, which says what is wrong; it counts as none, lest nothing else is there.
            self.problems.append(error)
            items, n_items = partial(_one, refused(str(table.path), error, table.kind)), 0
        else:
            items = partial(table_items, table, layout, naming, self.fence)
            with suppress(Damaged):  # of the rows before the damage, nobody knows the number
                n_items = count_items(table, layout)
        self._by_kind.setdefault(table.kind, []).append(Source(table.kind, (table.path,), n_items, items))

    def sources(self) -> Iterator[Source]:
        for kind, sources in self._by_kind.items():
            files = tuple(file for source in sources for file in source.files)
            yield Source(kind, files, total_items(sources), partial(_chained, sources))


def total_items(sources: Sequence[Source]) -> int | None:
    """How many items the sources have, None if one does not know."""
    counts = [source.n_items for source in sources]
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _one(item: Item) -> Iterator[Item]:
    yield item


def _chained(sources: Sequence[Source]) -> Iterator[Item]:
    return chain.from_iterable(source.items() for source in sources)


def _without_image(columns: Mapping[str, str]) -> dict[str, str]:
    return {ours: theirs for ours, theirs in columns.items() if ours != "image"}
