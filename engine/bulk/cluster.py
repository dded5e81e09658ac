"""The same work by a pool of Ray's actors, on one machine or many. The parts that they write are
what a run goes on from, so Ray's own checkpoints are not used."""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict

from engine import errors
from engine.bulk.items import Item
from engine.bulk.parts import Output
from engine.bulk.work import Work, do
from engine.errors import UsageError, require

OURS = errors.UsageError, errors.ModelFileError, errors.MissingPackage
OURS += errors.OutOfMemory, errors.NonFinite


MakeWork = Callable[[], AbstractContextManager[Work]]


class Worker:
    """An actor: a model, loaded with its first group."""

    def __init__(self, make_work: MakeWork, output: tuple):
        self.make_work, self.output = make_work, Output(*output)
        self.stack, self.work = ExitStack(), None

    def __call__(self, batch: dict) -> dict:
        """Do one group; an error that says what to do returns as a row, for Ray would begin the
        group again."""
        (text,) = batch["items"]
        items = [Item(**item) for item in json.loads(text)]
        try:
            if self.work is None:
                self.work = self.stack.enter_context(self.make_work())
            done = list(do(self.work, self.output, items))
        except OURS as error:
            return {"rows": [0], "errors": [0], "fault": [f"{type(error).__name__}: {error}"]}
        counts = {name: [sum(part[name] for part in done)] for name in ("rows", "errors")}
        return counts | {"fault": [""]}


def on_ray(
    address: str, workers: int | None, make_work: MakeWork, output: Output, groups
) -> Iterator[dict[str, int]]:
    """Do the groups; yields the counts of each as it is done.

    address: "local" starts Ray on this machine for the run; "auto" or HOST:PORT joins a cluster.
    workers: actors, each with its own model; None: one for each GPU, or one where there is none.
    make_work: a context with a worker's `Captions` or `Generations`; Ray sends it to each.

    Errors: MissingPackage, UsageError where the cluster does not answer or has too few GPUs; those
    of `do`.
    """
    ray = require("ray", "ray")
    require("ray.data", "ray", "pyarrow")
    try:
        ray.init(address=address, log_to_driver=False, include_dashboard=False)
    except (ConnectionError, ValueError) as error:
        raise UsageError(
            f"ray: --ray must be local or the address of a cluster; got {address}: {error}"
        ) from error

    try:
        gpus = int(ray.cluster_resources().get("GPU", 0))
        if gpus and workers is not None and workers > gpus:
            raise UsageError(f"ray: --workers must be at most the {gpus} GPUs; got {workers}.")
        ray.data.DataContext.get_current().enable_progress_bars = False  # there is one of ours
        rows = [{"items": json.dumps([asdict(item) for item in group])} for group in groups]
        data = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            Worker,
            fn_constructor_args=(make_work, (output.path, output.settings, output.columns)),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(workers or gpus or 1, len(rows))),
            **({"num_gpus": 1} if gpus else {"num_cpus": 1}),
        )
        for row in data.iter_rows():
            name, _, message = row["fault"].partition(": ")
            if name:
                raise getattr(errors, name)(message)
            yield {"rows": row["rows"], "errors": row["errors"]}
    finally:
        ray.shutdown()
