"""What came before: exact and near duplicates, in a private database that spills to disk.

Memory stays flat however much was seen, and nothing is left behind: SQLite makes a
nameless temporary file (https://www.sqlite.org/inmemorydb.html#temp_db).
"""

import sqlite3
from typing import Literal

NEAR = 12  # of 256 signs
_BANDS = 16  # more than NEAR, so that near hashes agree in at least one whole band
_MAX_CANDIDATES = 64

Table = Literal["records", "pictures"]


class Seen:
    """Remembers digests, each with the name of its first owner."""

    def __init__(self) -> None:
        self._db = sqlite3.connect("", isolation_level=None)
        self._db.execute("PRAGMA journal_mode = OFF")
        self._db.execute("PRAGMA synchronous = OFF")
        for table in ("records", "pictures"):
            self._db.execute(
                f"CREATE TABLE {table} (digest BLOB PRIMARY KEY, name TEXT) WITHOUT ROWID"
            )
        self._db.execute("CREATE TABLE bands (band INT, key BLOB, signs BLOB, name TEXT)")
        self._db.execute("CREATE INDEX by_band ON bands (band, key)")
        self._db.execute("BEGIN")

    def first(self, table: Table, digest: bytes, name: str) -> str | None:
        """The name that had this digest before, or None; then it is remembered."""
        new = self._db.execute(f"INSERT OR IGNORE INTO {table} VALUES (?, ?)", (digest, name))
        if new.rowcount:
            return None
        found = self._db.execute(f"SELECT name FROM {table} WHERE digest = ?", (digest,))
        return str(found.fetchone()[0])

    def near(self, signs: bytes, name: str) -> str | None:
        """An earlier picture whose hash differs in at most `NEAR` signs; then it is remembered.

        A band of zeros, as plain surfaces give, names no candidates; of any band only the
        first `_MAX_CANDIDATES` are looked at.
        """
        size = len(signs) // _BANDS
        bands = [(i, signs[i * size : (i + 1) * size]) for i in range(_BANDS)]
        bands = [band for band in bands if any(band[1])]
        own = int.from_bytes(signs)
        for band in bands:
            for other, owner in self._db.execute(
                f"SELECT signs, name FROM bands WHERE band = ? AND key = ? LIMIT {_MAX_CANDIDATES}",
                band,
            ):
                if owner != name and (own ^ int.from_bytes(other)).bit_count() <= NEAR:
                    return str(owner)
        self._db.executemany(
            "INSERT INTO bands VALUES (?, ?, ?, ?)", [(*band, signs, name) for band in bands]
        )
        return None

    def close(self) -> None:
        """Forget everything."""
        self._db.close()
