"""A run of training: the loop around `train_step`, its checkpoints, and what it says of itself."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from engine import checkpoint
from engine.checkpoint.lock import locked
from engine.checkpoint.state import deferred_signals
from engine.data import LatentSet, stream
from engine.errors import NonFinite, UsageError
from engine.parallel import World, place_on_node
from engine.planning import peak_flops, train_flops
from engine.train.ahead import Ahead
from engine.train.distill import Distillation, step_flops
from engine.train.metrics import Meter, Metrics
from engine.train.step import TrainState, train_step
from engine.weights.forms import say

MOST_SKIPPED = 10  # non-finite steps in a row that end a run


def late(x: Tensor) -> Callable[[], float]:
    """The value that a 0-d tensor has now, for the host to read later. Reading waits for what its
    device had been given until now; `x.item()` would wait for all that it was given since."""
    if x.device.type != "cuda":
        return x.clone().item
    copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    copy.copy_(x, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(x.device))

    def read() -> float:
        event.synchronize()
        return copy.item()

    return read


class Journal:
    """What a run says of itself: metrics.jsonl and more, a progress bar, and the steps that were
    skipped. On rank 0; `note` on every rank, for all must end together."""

    def __init__(self, state: TrainState, data: LatentSet, path: Path, log_to, progress: bool):
        config, world = state.config, state.world
        first = world is None or world.rank == 0
        self.metrics = Metrics(path, log_to, state.step) if first else nullcontext()
        self.bar = tqdm(
            total=config.steps, initial=state.step, disable=not (first and progress), mininterval=2
        )
        device = state.skipped.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        all_trained = all(p.requires_grad for p in state.model.parameters())
        peak = peak_flops(name, state.model.dtype) if all_trained else None
        self.meter = Meter(device, peak and peak * (1 if world is None else world.size))
        self.state, self.data, self.first = state, data, first
        self.in_a_row, self.skipped = 0, state.skipped.item()
        self.unread: tuple[int, Callable[[], float]] | None = None

    def note(self, batch: dict[str, Tensor], waited: float) -> None:
        """One step. Whether it was skipped is read a step later, when the device has the next one
        to work on: read at once, the host would wait for it. Errors: NonFinite, see `settle`."""
        state, config = self.state, self.state.config
        V, T = batch["latents"][0, 0].numel() // 4, batch["prompt_tokens"].shape[1]
        sizes = {"video_rows": V, "text_rows": T, "context_rows": batch["context"].shape[1]}
        sizes["samples"] = config.batch_size
        if isinstance(state.objective, Distillation):
            teacher = None if state.trajectories else state.objective.teacher.cfg
            flops = step_flops(state.model.cfg, teacher, config, state.step - 1, **sizes)
        else:
            flops = train_flops(state.model.cfg, **sizes)
        self.meter.add(config.batch_size, config.batch_size * (V + T), flops, waited)
        self.bar.update()
        self.settle()
        self.unread = state.step, late(state.skipped)

    def settle(self) -> None:
        """Reads what `note` left unread; waits for that step. Errors: NonFinite after 10 bad ones
        in a row."""
        if self.unread is None:
            return
        (step, count), self.unread = self.unread, None
        skipped = count()
        if skipped == self.skipped:
            self.in_a_row = 0
            return
        self.in_a_row, self.skipped = self.in_a_row + 1, skipped
        config = self.state.config
        clips = self.data.indices(step - 1, config.batch_size, config.seed).tolist()
        self.write({"step": step, "skipped": skipped, "clips": clips})
        if self.in_a_row == MOST_SKIPPED:
            raise NonFinite(
                f"train: the loss must be finite; got {MOST_SKIPPED} bad steps in a row "
                f"up to step {step}. Lower --lr; the last checkpoint is unharmed."
            )

    def write(self, record: dict) -> None:
        if self.first:
            self.metrics.write(record)

    def report(self, metrics: dict[str, Tensor | float]) -> None:
        self.settle()
        record = {"step": self.state.step} | {k: float(v) for k, v in metrics.items()}
        self.write(record | self.meter.read())
        self.bar.set_postfix(video=f"{record['loss_video']:.3f}", text=f"{record['loss_text']:.3f}")


def take(
    coming: Iterator, device: torch.device
) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
    """Takes the next batch; returns it, its copy on the device, and the seconds that it took."""
    since = time.perf_counter()
    _, batch = next(coming)
    waited = time.perf_counter() - since
    return batch, {k: v.to(device, non_blocking=True) for k, v in batch.items()}, waited


def stops(
    world: World | None, asked: list[int], earlier: Callable[[], float]
) -> tuple[bool, Callable[[], float]]:
    """Whether a run is to stop now, and what tells it after its next step. Of several ranks all
    stop a step after any was asked, for their hosts do not wait to hear of each other. Read once a
    step: what is asked from then on waits for the next one."""
    if world is None:
        return bool(asked), bool
    return bool(earlier()), late(world.any(bool(asked)))


def fit(
    state: TrainState,
    data: LatentSet,
    path: str | Path,
    save_every: int = 500,
    log_every: int = 20,
    progress: bool = True,
    log_to: tuple[str, ...] = (),
    verify: bool = False,
) -> None:
    """Trains up to `state.config.steps`, and resumes from a checkpoint bit for bit. SIGTERM and
    SIGINT let the step end and save it; on any of several ranks, they let all do one step more.

    state: new, or loaded from a checkpoint of this run.
    data: what every step's batch is taken from.
    path: the run's folder, which this process alone may write. It gets metrics.jsonl and
        checkpoint/.
    save_every: steps between checkpoints; the last step is saved too.
    log_every: steps between lines of metrics.jsonl; the last step has one too.
    progress: show a bar.
    log_to: "tensorboard", "wandb" or both, which get the same records.
    verify: check the shards against their hashes first, as a resumed run does in any case.

    Errors: UsageError for other data than a resumed run's, or than the model takes, and where
    another process trains in `path`; ModelFileError for a shard that does not match its hash;
    NonFinite after 10 non-finite steps in a row and for a state that is not finite when it is
    saved; checkpoint.Interrupted; OSError where the last save failed.
    """
    path, world = Path(path), state.world
    path.mkdir(parents=True, exist_ok=True)

    if state.data not in ("", data.identity):
        raise UsageError(
            f"train: data must be the shards of the run, {state.data}, or its order is another's; "
            f"got {data.identity}. Resume with the same --data, in the same order."
        )
    data.check_model(state.model.cfg)
    if state.trajectories is not None:
        state.trajectories.check_data(data)
    if verify or state.data:
        without = data.verify(*place_on_node())
        if verify and without:
            names = ", ".join(path.name for path in without)
            say(f"train: {names}: made without a hash, so nothing to check the data against.")
    state.data = data.identity

    first = world is None or world.rank == 0
    with locked(path) if first else nullcontext():
        journal = Journal(state, data, path, log_to, progress)
        _run(journal, path, save_every, log_every)


def _run(journal: Journal, path: Path, save_every: int, log_every: int) -> None:
    state, data = journal.state, journal.data
    config, world = state.config, state.world
    rank, ranks = (0, 1) if world is None else (world.data_rank, world.data_size)
    steps, written = range(state.step, config.steps), state.trajectories
    order = config.batch_size, config.seed, rank, ranks
    coming = stream(data, steps, *order, beside=written and written.batch)
    ahead = Ahead(state, not journal.bar.disable)

    with (
        deferred_signals() as asked,
        journal.metrics,
        closing(coming),
        checkpoint.Saver(path / "checkpoint", world) as saver,
    ):
        stop, asked_of_any = False, bool
        while state.step < config.steps and not stop:
            batch, there, waited = take(coming, state.skipped.device)
            ahead(batch)

            metrics = train_step(state, there)
            journal.note(batch, waited)
            if state.step % log_every == 0 or state.step == config.steps:
                journal.report(metrics)

            stop, asked_of_any = stops(world, asked, asked_of_any)
            if stop or state.step % save_every == 0 or state.step == config.steps:
                journal.settle()
                saver.save(state)

    if stop or asked_of_any():
        raise checkpoint.Interrupted(asked[0] if asked else signal.SIGTERM, state.step)
