"""The lists as they were: the book of any version that a receipt carries, from the Delta table `list_changes`. Without Spark."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict

import msgspec
from deltalake import DeltaTable
from deltalake.exceptions import TableNotFoundError

from feature_jobs.training_set import local
from gateway.contracts import tables
from gateway.contracts.lists import ListBook, ListChange
from gateway.contracts.settings import Settings

# Books that are kept to go on from; what two of them have in common they share.
BOOKS_MAX = 64
COLUMNS = [*ListChange.__struct_fields__]


class ListBooks:
    """`changes` are (offset, change), in order, of every version that will be asked for."""

    def __init__(self, changes: list[tuple[int, ListChange]]) -> None:
        self._changes = changes
        self._offsets = [offset for offset, _ in changes]
        self._books: OrderedDict[int, ListBook] = OrderedDict()

    def at(self, version: int) -> ListBook:
        """The book of a version; below 0, where no lists were known, an empty one."""
        version = max(version, 0)
        held = self._books.get(version)
        if held is not None:
            self._books.move_to_end(version)
            return held
        before = max((v for v in self._books if v < version), default=None)
        book = ListBook() if before is None else self._books[before]
        first, end = bisect_right(self._offsets, book.version - 1), bisect_right(self._offsets, version - 1)
        book = book.applied(self._changes[first:end], version)
        self._books[version] = book
        if len(self._books) > BOOKS_MAX:
            self._books.popitem(last=False)
        return book


def read_books(settings: Settings) -> ListBooks:
    """Of all changes that the feature jobs have written; none where there is no such table."""
    try:
        held = DeltaTable(local(tables.table_uri(settings.tables, tables.LIST_CHANGES))).to_pyarrow_table(
            columns=[*COLUMNS, "offset"]
        )
    except TableNotFoundError:
        return ListBooks([])
    rows = held.sort_by("offset").to_pylist()
    return ListBooks([(row.pop("offset"), msgspec.convert(row, ListChange)) for row in rows])
