"""The process of `univigu serve`."""

import json
import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.errors import ModelFileError, UsageError, require
from engine.serve.loading import ModelSource
from engine.serve.settings import Settings

# Seconds that an idle connection stays. A server that closes it as the next question comes drops
# that question; uvicorn's own 5 s are how often many clients ask.
KEEP_ALIVE = 75
FIELDS = ("id", "trace", "kind", "status", "code", "exit_code", "owner", "error")


class JsonLines(logging.Formatter):
    """A log record as an object in one line."""

    def format(self, record: logging.LogRecord) -> str:
        found = {"time": round(record.created, 3), "level": record.levelname.lower()}
        found |= {"message": record.getMessage()}
        found |= {name: getattr(record, name) for name in FIELDS if hasattr(record, name)}
        if record.exc_info:
            found["traceback"] = self.formatException(record.exc_info)
        return json.dumps(found)


def log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in ("univigu.serve", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO if name == "univigu.serve" else logging.WARNING)


@contextmanager
def opened(settings: Settings, source: ModelSource) -> Iterator[tuple]:
    """What a server needs before it starts, as (model's configuration, key); its folder is locked.

    Errors: UsageError, MissingPackage, ModelFileError.
    """
    for module in ("fastapi", "uvicorn", "sqlalchemy", "prometheus_client"):
        require(module, "serve")
    from engine.checkpoint.lock import locked
    from engine.config import read_pipeline_config
    from engine.serve.guard import read_key

    log_to_stderr()
    key = read_key(settings)
    if not settings.loopback and key is None:
        raise UsageError(
            f"serve: --api-key-file must be given where others can reach the server; got --host "
            f"{settings.host} without it."
        )
    config = read_pipeline_config(Path(source.path))
    settings.data.mkdir(parents=True, exist_ok=True)
    with locked(settings.data, "--data"):
        yield config, key


def serve(settings: Settings, source: ModelSource) -> None:
    """Serves until a signal comes; the job that runs then has `drain_seconds` to end.

    Errors: those of `opened`; what the model's loading raises, by its exit code.
    """
    with opened(settings, source) as (config, key):
        import uvicorn

        from engine.serve.app import build
        from engine.serve.server import Server

        server = Server(settings, source, config)
        how = {"host": settings.host, "port": settings.port, "log_config": None}
        how |= {"timeout_keep_alive": KEEP_ALIVE}
        http = uvicorn.Server(uvicorn.Config(build(server, key), access_log=False, **how))
        thread = threading.Thread(target=http.run, daemon=True)
        try:
            thread.start()
            wait_for_port(http, thread, settings)
            server.start()
            say_where(http, server)
            while thread.is_alive():
                time.sleep(0.5)
        finally:
            server.drain()
            http.should_exit = True
            thread.join(5)
            server.stop()


def wait_for_port(http, thread: threading.Thread, settings: Settings) -> None:
    while not http.started:
        if not thread.is_alive():
            raise port_taken(settings)
        time.sleep(0.02)


def port_taken(settings: Settings) -> UsageError:
    return UsageError(
        f"serve: --host and --port must be free; got {settings.host}:{settings.port}. "
        "Choose another port, or 0."
    )


def check_started(server) -> None:
    """Waits until the model is loaded. Errors: ModelFileError where it is not."""
    if not server.supervisor.wait_until_ready():
        failure = server.supervisor.failure or {"message": "serve: the runner died as it started."}
        error = ModelFileError(failure["message"])
        error.exit_code = failure.get("exit_code", 1)
        raise error


def say_where(http, server) -> None:
    """Prints the address once the model is loaded. Errors: ModelFileError where it is not."""
    check_started(server)
    host, port = http.servers[0].sockets[0].getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    print(f"univigu serves {server.source.name} at http://{host}:{port}", flush=True)
