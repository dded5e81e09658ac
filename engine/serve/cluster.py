"""The server as a Ray Serve application: every replica is a server with a runner of its own.

There is no dispatcher. The replicas are several servers of one table of jobs, so that each claims
what it runs, and what one leaves behind when it dies is claimed by another. A configuration of Ray
Serve names `application`.
"""

import asyncio
import secrets
import signal
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from engine.errors import ModelFileError, UsageError, require
from engine.serve.loading import ModelSource
from engine.serve.program import check_started, log_to_stderr, opened, port_taken
from engine.serve.settings import Settings

NAME = "univigu"
SPARE = 15  # seconds, beyond those for the job that runs, in which a replica ends


def application(args: dict):
    """The application of a configuration of Ray Serve.

    args: "settings", fields of `Settings`; "source", fields of `ModelSource`; "replicas", as
        --replicas.

    Errors: UsageError.
    """
    require("ray.serve", "ray", "ray")
    settings = Settings.of_plain(Settings().plain() | args.get("settings", {}))
    return bound(settings, ModelSource(**args["source"]), str(args.get("replicas", "")))


def bound(settings: Settings, source: ModelSource, replicas: str):
    """The application. replicas: N, or MIN-MAX of which the jobs decide; "": one for each GPU."""
    import ray
    from ray import serve

    if not settings.data.is_absolute():
        raise UsageError(f"serve: --data must be absolute with Ray; got {settings.data}.")
    machines = sum(node["Alive"] for node in ray.nodes())
    if machines > 1 and not (settings.database and settings.results):
        raise UsageError(
            f"serve: --database and --results must be given, for the cluster has {machines} "
            "machines that share no --data."
        )

    few, most = counts_of(replicas)
    gpus = int(ray.cluster_resources().get("GPU", 0))
    on_gpu = bool(gpus) if source.device is None else source.device.startswith("cuda")
    if not few:
        few = most = max(1, gpus if on_gpu else 1)
    how = {"num_replicas": few}
    if few < most:
        policy = {"policy_function": "engine.serve.scaling:Queue"}
        policy |= {"policy_kwargs": {"url": settings.database_url}}
        how = {"autoscaling_config": {"min_replicas": few, "max_replicas": most, "policy": policy}}

    @serve.deployment(
        name=NAME,
        ray_actor_options={"num_gpus": 1} if on_gpu else {"num_cpus": 1},
        max_constructor_retry_count=2,
        max_ongoing_requests=1000,  # they wait for jobs, of which the table says how many may
        graceful_shutdown_timeout_s=settings.drain_seconds + SPARE,
        **how,
    )
    @serve.ingress(lambda: replica(settings, source))
    class Replica:
        """Its routes are those of `engine.serve.app`."""

    return Replica.bind()


def counts_of(replicas: str) -> tuple[int, int]:
    """(least, most) of N or MIN-MAX; zeros of "". Errors: UsageError."""
    least, _, most = replicas.partition("-")
    try:
        found = int(least or 0), int(most or least or 0)
    except ValueError:
        found = 0, -1
    if not 0 <= found[0] <= found[1] <= 10_000 or (replicas and not found[0]):
        raise UsageError(f"serve: --replicas must be N or MIN-MAX, from 1 on; got {replicas}.")
    return found


def replica(settings: Settings, source: ModelSource):
    """The ASGI application of one replica, whose life is that of its server."""
    from engine.config import read_pipeline_config
    from engine.serve.app import build
    from engine.serve.guard import read_key
    from engine.serve.server import Server

    log_to_stderr()
    name = secrets.token_hex(8)
    server = Server(settings, source, read_pipeline_config(Path(source.path)), name)
    server.start()
    check_started(server)

    @asynccontextmanager
    async def life(app) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(server.end)

    return build(server, read_key(settings), life)


def serve_on_ray(settings: Settings, source: ModelSource, address: str, replicas: str) -> None:
    """Serves until a signal comes; then each replica ends as a server does.

    address: "local" starts Ray on this machine; "auto" or HOST:PORT joins a cluster.
    replicas: as of `bound`.

    Errors: those of `opened`; UsageError where the cluster does not answer; ModelFileError where no
    replica comes up.
    """
    ray, serve = require("ray", "ray"), require("ray.serve", "ray", "ray")
    counts_of(replicas)
    port = free_port(settings)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = f"http://{host}:{port}"
    key = settings.api_key_file
    settings = replace(
        settings,
        data=settings.data.absolute(),
        allow_folder=tuple(path.absolute() for path in settings.allow_folder),
        api_key_file=key and key.absolute(),
    )

    with opened(settings, source):
        signals = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
        start(ray, address)
        try:
            for each, handler in signals.items():  # Ray's own would end all at once
                signal.signal(each, handler)
            where = "HeadOnly" if address == "local" else "EveryNode"
            serve.start(proxy_location=where, http_options={"host": settings.host, "port": port})
            run(serve, bound(settings, source, replicas), settings, f"{source.name} at {url}")
        finally:
            ray.shutdown()


def start(ray, address: str) -> None:
    """Errors: UsageError."""
    try:
        ray.init(address=address, log_to_driver=False, include_dashboard=False)
    except (ConnectionError, ValueError) as error:
        raise UsageError(
            f"serve: --ray must be local or the address of a cluster; got {address}: {error}"
        ) from error


def run(serve, app, settings: Settings, what: str) -> None:
    """Until a signal comes. Errors: ModelFileError."""
    try:
        try:
            serve.run(app, name=NAME)
        except RuntimeError as error:
            raise ModelFileError(f"serve: no replica came up. {error}") from error
        print(f"univigu serves {what}", flush=True)
        while True:
            time.sleep(1)
    finally:
        late = time.monotonic() + settings.drain_seconds + 2 * SPARE
        serve.delete(NAME, _blocking=False)
        while NAME in serve.status().applications and time.monotonic() < late:
            time.sleep(0.2)


def free_port(settings: Settings) -> int:
    """The port to listen at. Errors: UsageError."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError:
            raise port_taken(settings) from None
        return probe.getsockname()[1]
