"""The table of a sweep, a SQLite file: which runs wait, what became of the others.

A sweep is the only writer. Others may read while it runs.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Literal

from bench.paper.result import Result
from bench.paper.run import Run
from bench.paper.training import Outcome

State = Literal["waiting", "done", "failed"]

# Kept as SQLite makes it: a rollback journal, every commit written through to the disk. A process
# that is killed in the middle of a transaction leaves a journal, by which the next connection
# undoes it. A write-ahead log would let others read during a commit, but commits are rare here
# and take milliseconds, and the table would be three files instead of one.
_SCHEMA = """
CREATE TABLE IF NOT EXISTS runs (
    id INTEGER PRIMARY KEY,  -- in the order of adding
    run TEXT NOT NULL UNIQUE,  -- Run.key
    part INTEGER NOT NULL,  -- runs with the same number are trained as one network
    state TEXT NOT NULL DEFAULT 'waiting',
    outcome TEXT,
    measures TEXT,
    error TEXT
)
"""
_WAIT = 60.0  # seconds for a lock that another process holds during a commit


def read(paths: Iterable[Path]) -> list[Result]:
    """The results of several tables, each run once.

    Raises:
        FileNotFoundError: one is not there.
        ValueError: one is no table of a sweep, or there is no result.
    """
    results: dict[Run, Result] = {}
    for path in paths:
        with Table(path, read_only=True) as table:
            results |= {result.run: result for result in table.results()}
    if not results:
        raise ValueError("Expected a table with results, got none")
    return list(results.values())


class Table:
    """The runs of a sweep, in the order in which they were added.

    Args:
        path: the file; it and its folder are made if they are not there.
        read_only: write nothing, make nothing.

    Raises:
        FileNotFoundError: there is no file to read.
        ValueError: it is no table of a sweep.
    """

    def __init__(self, path: str | os.PathLike[str], *, read_only: bool = False) -> None:
        self.path = Path(path)
        if not read_only:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        elif not self.path.exists():
            raise FileNotFoundError(f"Expected the table of a sweep, got no file {self.path}")
        try:
            self._db = sqlite3.connect(_uri(self.path, read_only), timeout=_WAIT, uri=True)
        except sqlite3.OperationalError as error:
            raise ValueError(f"Expected the table of a sweep, got {self.path}: {error}") from error
        try:
            tables = {name for (name,) in self._db.execute("SELECT name FROM sqlite_master")}
            if not read_only and not tables:
                self._db.execute(_SCHEMA)
            self._db.execute("SELECT run, part, state, outcome, measures, error FROM runs LIMIT 1")
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise ValueError(f"Expected the table of a sweep in {self.path}: {error}") from error

    def __enter__(self) -> Table:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._db.close()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """For one sweep at a time. The lock ends with the process, however that ends.

        Raises:
            RuntimeError: another one has the lock.
        """
        with closing(
            sqlite3.connect(self.beside(".lock"), timeout=0, isolation_level=None)
        ) as lock:
            try:
                lock.execute("BEGIN EXCLUSIVE")
            except sqlite3.OperationalError as error:
                raise RuntimeError(
                    f"Expected one sweep at a time on {self.path}, got a second one: {error}"
                ) from error
            yield

    def beside(self, ending: str) -> Path:
        """A name beside the table, the same by whichever link the table was opened."""
        path = self.path.resolve()
        return path.with_name(path.name + ending)

    def add(self, groups: Iterable[Sequence[Run]]) -> None:
        """Add runs, grouped as they are to be trained; those in the table stay as they are."""
        with self._db:
            (first,) = self._db.execute("SELECT COALESCE(MAX(part) + 1, 0) FROM runs").fetchone()
            for part, group in enumerate(groups, first):
                self._db.executemany(
                    "INSERT OR IGNORE INTO runs (run, part) VALUES (?, ?)",
                    [(run.key, part) for run in group],
                )

    def waiting(self) -> list[list[Run]]:
        """The groups that are to be trained, those that failed included."""
        rows = self._db.execute(
            "SELECT part, run FROM runs WHERE state != 'done' ORDER BY part, id"
        )
        return [[Run.from_key(key) for _, key in rows] for _, rows in groupby(rows, lambda r: r[0])]

    def finish(self, results: Sequence[Result]) -> None:
        """Write the results of a group, all or none."""
        with self._db:
            for result in results:
                outcome, measures = json.dumps(asdict(result.outcome)), json.dumps(result.measures)
                self._set(result.run, "done", outcome, measures, None)

    def fail(self, runs: Sequence[Run], error: str) -> None:
        with self._db:
            for run in runs:
                self._set(run, "failed", None, None, error)

    def _set(self, run: Run, state: State, *values: str | None) -> None:
        changed = self._db.execute(
            "UPDATE runs SET state = ?, outcome = ?, measures = ?, error = ? "
            "WHERE run = ? AND state != 'done'",
            (state, *values, run.key),
        ).rowcount
        if changed != 1:
            raise ValueError(f"Expected a run of {self.path} that is not done, got {run.key}")

    def results(self) -> list[Result]:
        """Of the runs that are done."""
        rows = self._db.execute(
            "SELECT run, outcome, measures FROM runs WHERE state = 'done' ORDER BY id"
        )
        return [
            Result(Run.from_key(run), Outcome(**json.loads(outcome)), json.loads(measures))
            for run, outcome, measures in rows
        ]

    def errors(self) -> dict[Run, str]:
        """Of the runs that failed."""
        rows = self._db.execute("SELECT run, error FROM runs WHERE state = 'failed' ORDER BY id")
        return {Run.from_key(run): error for run, error in rows}

    def counts(self) -> dict[State, int]:
        """How many runs are in each state."""
        counts: dict[State, int] = {"waiting": 0, "done": 0, "failed": 0}
        counts.update(self._db.execute("SELECT state, COUNT(*) FROM runs GROUP BY state"))
        return counts


def _uri(path: Path, read_only: bool) -> str:
    """The file's name for SQLite, with what may be done to it.

    The journal of a sweep that was killed in a transaction must be undone before anything can be
    read, and that writes.
    """
    path = path.resolve()
    killed = path.with_name(f"{path.name}-journal").exists()
    mode = "rwc" if not read_only else "rw" if killed else "ro"
    return f"{path.as_uri()}?mode={mode}"
