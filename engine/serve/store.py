"""The table of jobs: what was asked, how far it is, how it ended.

It is the one truth that the HTTP process and the runners share. A runner owns a job only while the
row says so: whoever cancels or deletes a job changes its row, and the runner's next sign of life,
which changes no row then, tells it to stop. All changes are single statements that name the state
they start from, so any number of processes may work on one table.
"""

import hashlib
import json
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial, wraps

import sqlalchemy as sql

from engine.errors import UsageError

QUEUED, RUNNING, COMPLETED, FAILED = "queued", "in_progress", "completed", "failed"
VIDEO, CAPTION = "video", "caption"
CANCELLED, RUNNER_DIED = "cancelled", "runner_died"
AGAIN = 0.5  # seconds until a runner asks a table again that was out of reach
DEAF = 5.0  # seconds without signs of life after one that was not heard

_TABLES = sql.MetaData()
_BIG = sql.BigInteger().with_variant(sql.Integer(), "sqlite")  # SQLite counts INTEGER keys alone
JOBS = sql.Table(
    "univigu_jobs",
    _TABLES,
    sql.Column("number", _BIG, primary_key=True, autoincrement=True),
    sql.Column("id", sql.String(64), unique=True, nullable=False),
    sql.Column("kind", sql.String(16), nullable=False),
    sql.Column("status", sql.String(16), nullable=False),
    sql.Column("request", sql.Text, nullable=False),
    sql.Column("asked", sql.String(64), nullable=False),
    sql.Column("like", sql.String(200), nullable=False, default=""),
    sql.Column("key", sql.String(300), unique=True),
    sql.Column("trace", sql.String(64), nullable=False),
    sql.Column("created_at", sql.Float, nullable=False),
    sql.Column("started_at", sql.Float),
    sql.Column("completed_at", sql.Float),
    sql.Column("beat_at", sql.Float),
    sql.Column("progress", sql.Integer, nullable=False, default=0),
    sql.Column("attempts", sql.Integer, nullable=False, default=0),
    sql.Column("owner", sql.String(64)),
    sql.Column("error_code", sql.String(64)),
    sql.Column("error_message", sql.Text),
    sql.Column("result", sql.Text),
    sql.Index("univigu_jobs_next", "status", "kind", "number"),
)
SERVERS = sql.Table(
    "univigu_servers",
    _TABLES,
    sql.Column("name", sql.String(64), primary_key=True),
    sql.Column("place", sql.Text, nullable=False),
    sql.Column("beat_at", sql.Float, nullable=False),
)


OUT_OF_REACH = (sql.exc.OperationalError, sql.exc.InterfaceError, sql.exc.TimeoutError)
"""What is raised while the database is down, or another process holds SQLite's lock."""
FAULTS = (sql.exc.DBAPIError, sql.exc.TimeoutError)  # whatever a database may raise


class QueueFull(RuntimeError):
    """No more jobs may wait; `waiting` do."""

    def __init__(self, waiting: int):
        super().__init__(f"{waiting} jobs wait")
        self.waiting = waiting


class KeyReused(ValueError):
    """An idempotency key that stands for another request."""


def new_id(prefix: str) -> str:
    """A name that nobody guesses."""
    return f"{prefix}_{secrets.token_hex(16)}"


def digest(asked: dict) -> str:
    """Equal for equal fields, in whichever order they came."""
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


class Store:
    """Jobs in a database. A store may be shared by threads, not by processes, which open their own.

    url: as SQLAlchemy's; SQLite and PostgreSQL are tested.
    durable: what is written to SQLite outlasts a power cut. A runner's signs of life need not, and
        cost 0.35 ms in place of 0.84 without; a result that is lost with them is made again.
    """

    def __init__(self, url: str, durable: bool = True):
        try:
            self.engine = sql.create_engine(url, pool_pre_ping=not url.startswith("sqlite"))
        except (sql.exc.ArgumentError, sql.exc.NoSuchModuleError, ImportError) as error:
            raise UsageError(
                f"serve: --database must be a URL that SQLAlchemy opens; got {error}. "
                "Write postgresql+psycopg://user:password@host/name, or leave it out."
            ) from None
        if self.engine.dialect.name == "sqlite":
            sql.event.listen(self.engine, "connect", partial(_set_up_sqlite, durable))
        with suppress(sql.exc.DBAPIError):  # a server that starts with this one was the first
            _TABLES.create_all(self.engine)
        try:
            _TABLES.create_all(self.engine)
        except sql.exc.OperationalError as error:
            raise UsageError(
                f"serve: --database must be reachable; got {error.orig}. Start it, or leave the "
                "flag out."
            ) from None

    def close(self) -> None:
        self.engine.dispose()

    def create(
        self,
        kind: str,
        request: dict,
        asked: dict,
        limit: int,
        like: str = "",
        key: str | None = None,
    ) -> sql.Row:
        """A new job that waits, or the one that this key made of the same fields.

        request: what the runner is told.
        asked: what the client said, which a second use of the key must say too.
        limit: jobs that may wait.
        like: captions with equal ones may run as one batch.

        Errors: QueueFull, KeyReused.
        """
        said, prefix = digest(asked), "video" if kind == VIDEO else "caption"
        if key is not None and (known := self._by_key(key, said)) is not None:
            return known
        waiting = self.count(QUEUED)
        if waiting >= limit:
            raise QueueFull(waiting)

        row = {"id": new_id(prefix), "kind": kind, "status": QUEUED, "asked": said}
        row |= {"request": json.dumps(request, ensure_ascii=False), "like": like, "key": key}
        row |= {"trace": secrets.token_hex(16)}
        row |= {"created_at": time.time(), "progress": 0, "attempts": 0}
        try:
            with self.engine.begin() as db:
                db.execute(JOBS.insert().values(row))
        except sql.exc.IntegrityError:  # two requests with one key at the same time
            known = None if key is None else self._by_key(key, said)
            if known is None:
                raise
            return known
        return self.get(row["id"])

    def _by_key(self, key: str, said: str) -> sql.Row | None:
        with self.engine.connect() as db:
            known = db.execute(sql.select(JOBS).where(JOBS.c.key == key)).first()
        if known is not None and known.asked != said:
            raise KeyReused(key)
        return known

    def get(self, id: str) -> sql.Row | None:
        if "\0" in id:  # PostgreSQL takes no text with it
            return None
        with self.engine.connect() as db:
            return db.execute(sql.select(JOBS).where(JOBS.c.id == id)).first()

    def page(self, after: str | None, limit: int, descending: bool) -> tuple[list[sql.Row], bool]:
        """Videos in the order in which they were asked for, and whether there are more. Nothing
        comes after a job that is not there."""
        query = sql.select(JOBS).where(JOBS.c.kind == VIDEO)
        if after is not None:
            last = self.get(after)
            if last is None:
                return [], False
            number = JOBS.c.number
            query = query.where(number < last.number if descending else number > last.number)
        query = query.order_by(JOBS.c.number.desc() if descending else JOBS.c.number)
        with self.engine.connect() as db:
            rows = db.execute(query.limit(limit + 1)).all()
        return list(rows[:limit]), len(rows) > limit

    def count(self, *statuses: str) -> int:
        query = sql.select(sql.func.count()).where(JOBS.c.status.in_(statuses))
        with self.engine.connect() as db:
            return db.execute(query).scalar_one()

    def counts(self) -> dict[tuple[str, str], int]:
        """Jobs by kind and status."""
        query = sql.select(JOBS.c.kind, JOBS.c.status, sql.func.count())
        with self.engine.connect() as db:
            return {
                row[:2]: row[2] for row in db.execute(query.group_by(*query.selected_columns[:2]))
            }

    def claim(
        self, owner: str, kinds: Sequence[str] = (VIDEO, CAPTION), like: str | None = None
    ) -> sql.Row | None:
        """The job that has waited longest, now this owner's. like: of those alone that may run
        with it. Where none waits nothing is written: a runner asks twice a second, and SQLite's
        one lock would stay with a process that stops in the midst of it."""
        wanted = [JOBS.c.status == QUEUED, JOBS.c.kind.in_(kinds)]
        wanted += [] if like is None else [JOBS.c.like == like]
        first = sql.select(JOBS.c.id).where(*wanted).order_by(JOBS.c.number).limit(1)
        with self.engine.connect() as db:
            if db.execute(first).first() is None:
                return None
        first = first.with_for_update(skip_locked=True)  # of PostgreSQL; SQLite has one writer
        first = first.correlate(None).scalar_subquery()

        now = time.time()
        taken = {"status": RUNNING, "owner": owner, "started_at": now, "beat_at": now}
        taken |= {"attempts": JOBS.c.attempts + 1, "progress": 0}
        mine = JOBS.update().where(JOBS.c.id == first, JOBS.c.status == QUEUED).values(taken)
        with self.engine.begin() as db:
            return db.execute(mine.returning(JOBS)).first()

    def beat(self, id: str, owner: str, progress: int) -> bool:
        """A sign of life. Whether the job is still the owner's; it stops where it is not."""
        return self._change_mine(id, owner, {"progress": progress, "beat_at": time.time()})

    def note(self, id: str, owner: str, result: dict) -> bool:
        """What there is of a result so far. Whether the job is still the owner's."""
        return self._change_mine(id, owner, {"result": json.dumps(result)})

    def complete(self, id: str, owner: str, result: dict) -> bool:
        """Whether the result was wanted still."""
        done = {"status": COMPLETED, "progress": 100, "result": json.dumps(result)}
        return self._change_mine(id, owner, done | {"completed_at": time.time()})

    def fail(self, id: str, owner: str, code: str, message: str) -> bool:
        done = {"status": FAILED, "error_code": code, "error_message": message}
        return self._change_mine(id, owner, done | {"completed_at": time.time()})

    def _change_mine(self, id: str, owner: str, values: dict) -> bool:
        mine = JOBS.c.id == id, JOBS.c.status == RUNNING, JOBS.c.owner == owner
        with self.engine.begin() as db:
            return db.execute(JOBS.update().where(*mine).values(values)).rowcount == 1

    def cancel(self, id: str) -> sql.Row | None:
        """The job, which has failed as cancelled unless it had ended; None where there is none."""
        open_ = JOBS.c.id == id, JOBS.c.status.in_((QUEUED, RUNNING))
        ended = {"status": FAILED, "completed_at": time.time(), "error_code": CANCELLED}
        with self.engine.begin() as db:
            message = {"error_message": "The job was cancelled."}
            db.execute(JOBS.update().where(*open_).values(ended | message))
        return self.get(id)

    def remove(self, id: str) -> bool:
        """Whether there was such a job. One that runs stops."""
        with self.engine.begin() as db:
            return db.execute(JOBS.delete().where(JOBS.c.id == id)).rowcount == 1

    def release(self, owner: str, attempts: int, counted: bool = True) -> list[sql.Row]:
        """Jobs of an owner that is no more wait again; those that were begun `attempts` times have
        failed. counted: False where the owner stopped by itself, which is no attempt. Returns those
        that failed."""
        mine = JOBS.c.status == RUNNING, JOBS.c.owner == owner
        again = {"status": QUEUED, "owner": None, "progress": 0}
        again |= {} if counted else {"attempts": JOBS.c.attempts - 1}
        message = f"The process that ran the job died, in {attempts} attempts of {attempts}."
        over = {"status": FAILED, "error_code": RUNNER_DIED, "error_message": message}
        over |= {"completed_at": time.time()}
        with self.engine.begin() as db:
            lost = []
            if counted:
                spent = sql.select(JOBS).where(*mine, JOBS.c.attempts >= attempts)
                lost = list(db.execute(spent).all())
                ids = JOBS.c.id.in_([job.id for job in lost])
                db.execute(JOBS.update().where(ids, *mine).values(over))
            db.execute(JOBS.update().where(*mine).values(again))
        return lost

    def owners(self) -> list[tuple[str, float]]:
        """Who runs jobs, and when the last sign of life came from each."""
        query = sql.select(JOBS.c.owner, sql.func.max(JOBS.c.beat_at))
        query = query.where(JOBS.c.status == RUNNING).group_by(JOBS.c.owner)
        with self.engine.connect() as db:
            return [tuple(row) for row in db.execute(query)]

    def sign(self, server: str, place: str) -> None:
        """A server's sign of life. place: where it keeps results."""
        mine, signs = SERVERS.c.name == server, {"place": place, "beat_at": time.time()}
        with self.engine.begin() as db:
            if not db.execute(SERVERS.update().where(mine).values(signs)).rowcount:
                db.execute(SERVERS.insert().values(signs | {"name": server}))

    def servers(self) -> dict[str, sql.Row]:
        """Those that have not left, by name."""
        with self.engine.connect() as db:
            return {row.name: row for row in db.execute(sql.select(SERVERS))}

    def leave(self, server: str) -> None:
        with self.engine.begin() as db:
            db.execute(SERVERS.delete().where(SERVERS.c.name == server))

    def ended_before(self, moment: float, kind: str) -> list[str]:
        """The jobs of a kind that had ended by then, the oldest first."""
        query = sql.select(JOBS.c.id).where(JOBS.c.completed_at <= moment, JOBS.c.kind == kind)
        with self.engine.connect() as db:
            return list(db.execute(query.order_by(JOBS.c.completed_at)).scalars())


def _patient(ask: Callable) -> Callable:
    """A method that asks again for as long as the table is out of reach."""

    @wraps(ask)
    def asked(*given, **named):
        while True:
            try:
                return ask(*given, **named)
            except OUT_OF_REACH:
                time.sleep(AGAIN)

    return asked


class PatientStore(Store):
    """A runner's: the video of an hour is not lost when the database starts again. A sign of life
    that nobody hears stops no job, what must be known or kept waits, and a claim finds nothing."""

    deaf = 0.0  # when a sign of life is worth the wait again
    unsure = False  # whether a job may be this runner's whose claim was never answered

    get, note, fail = map(_patient, (Store.get, Store.note, Store.fail))

    def beat(self, id: str, owner: str, progress: int) -> bool:
        if time.monotonic() < self.deaf:
            return True
        try:
            return super().beat(id, owner, progress)
        except OUT_OF_REACH:
            self.deaf = time.monotonic() + DEAF
            return True

    def claim(self, *wanted, **named) -> sql.Row | None:
        try:
            return super().claim(*wanted, **named)
        except OUT_OF_REACH:
            self.unsure = True
            return None

    def take_back(self, owner: str) -> None:
        """Jobs that nobody works at, because the answer to their claim was lost, wait again. For an
        owner that runs none."""
        with suppress(*OUT_OF_REACH):
            if self.unsure:
                self.release(owner, 0, counted=False)
            self.unsure = False

    def complete(self, id: str, owner: str, result: dict) -> bool:
        """As of `Store`; True too where an earlier try was done and its answer lost."""
        if _patient(super().complete)(id, owner, result):
            return True
        job = self.get(id)
        return job is not None and (job.status, job.owner) == (COMPLETED, owner)


def _set_up_sqlite(durable: bool, connection, _) -> None:
    """Readers do not wait for the writer, and writers wait for each other; a runner not for long,
    for it has a clip to make."""
    synchronous, patience = ("FULL", 30_000) if durable else ("NORMAL", 5_000)  # ms
    for line in ("journal_mode=WAL", f"synchronous={synchronous}", f"busy_timeout={patience}"):
        connection.execute(f"PRAGMA {line}")


def ended(job: sql.Row, code: str) -> dict:
    """What is said of a job that ended. code: "ok", or that of its error."""
    return {"event": "ended", "id": job.id, "trace": job.trace, "kind": job.kind, "code": code}
