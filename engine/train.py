"""Training: one step of uni-flow in either stage, as a function of (state, batch) alone.

Masters are fp32: the model's own parameters where those are fp32 and whole, else this rank's rows
(FSDP2) or a copy beside the bf16 ones. Micro-batches and ranks add up addends of global means, so
any layout takes the step that one process would.
"""

import math
import signal
import time
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from engine import adapt, checkpoint, cost
from engine.config import TrainConfig
from engine.data import LatentSet, stream
from engine.errors import NonFinite, UsageError
from engine.fp8 import is_converted, train_in_fp8
from engine.metrics import Meter, Metrics
from engine.model import UniViGU
from engine.muon import Muon
from engine.objective import Draws, Objective, draw
from engine.parallel import Sharding, World, sum_over_ranks

MOST_SKIPPED = 10  # non-finite steps in a row that end a run


@dataclass
class TrainState:
    """All that training mutates. masters: name -> fp32 rows of each trained parameter, which the
    optimizers step; ema: their averages, none where config.ema is 0; skipped: 0-d count of
    non-finite steps. data: the shards that it was trained on, in order; base: of what stays frozen,
    a fingerprint. world, sharding: None in a single process."""

    objective: Objective
    masters: dict[str, nn.Parameter]
    optimizers: list[torch.optim.Optimizer]
    ema: dict[str, Tensor]
    skipped: Tensor
    world: World | None = None
    sharding: Sharding | None = None
    step: int = 0
    data: str = ""
    base: str = ""

    @property
    def model(self) -> UniViGU:
        return self.objective.model

    @property
    def config(self) -> TrainConfig:
        return self.objective.config

    @classmethod
    def create(
        cls, model: UniViGU, config: TrainConfig, world: World | None = None
    ) -> "TrainState":
        """Takes the model over: its parameters are frozen, given adapters and sharded as asked.
        Errors: UsageError for an fp8 model, whose weights take no gradients."""
        if is_converted(model):
            raise UsageError(
                "train: model must not be quantised; got fp8. Load the weights it was made from."
            )
        model.recompute = config.recompute
        if config.precision == "fp8":
            train_in_fp8(model)
        adapt.freeze(model, config.freeze)
        if config.lora_rank:
            adapt.add_lora(model, config.lora_rank, config.seed)
        base = adapt.fingerprint(model)
        sequence = world and world.sequence(model.cfg.heads)
        objective = Objective(model, config, sequence)
        sharding = world and Sharding(objective, world)
        masters = masters_of(model, sharding)
        kept = masters if config.ema > 0 else {}
        ema = {name: p.detach().clone() for name, p in kept.items()}
        skipped = torch.zeros((), device=next(model.parameters()).device)
        optimizers = optimizers_of(masters, config, sharding)
        return cls(objective, masters, optimizers, ema, skipped, world, sharding, base=base)

    def ema_model(self, dtype: torch.dtype | None = None) -> UniViGU:
        """A whole model that holds the averaged parameters, or the last ones where no average is
        kept, its adapters merged; dtype None: the training's. Of several ranks all must call it;
        rank 0 gets it, on the CPU, and the others one on the meta device."""
        dtype, device, kernels = dtype or self.model.dtype, self.skipped.device, "auto"
        if self.world is not None:
            device = "cpu" if self.world.rank == 0 else "meta"
            kernels = "reference"
        with torch.random.fork_rng():
            model = UniViGU(self.model.cfg, device, dtype, kernels)
        if self.config.lora_rank:
            adapt.add_lora(model, self.config.lora_rank, self.config.seed)
        for name, target in model.named_parameters():
            rows = (self.ema or self.masters).get(name)
            if rows is None:  # frozen
                rows = self.model.get_parameter(name).detach()
                rows = rows if self.sharding is None else self.sharding.local(name, rows)
            whole = rows if self.sharding is None else self.sharding.whole(name, rows)
            target.data.copy_(whole)
        adapt.merge_lora(model)
        return model.eval()


def masters_of(model: UniViGU, sharding: Sharding | None) -> dict[str, nn.Parameter]:
    masters = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if sharding is not None:
            masters[name] = nn.Parameter(sharding.local(name, p.detach()))
        elif p.dtype == model.wide_dtype:
            masters[name] = p
        else:
            masters[name] = nn.Parameter(p.detach().to(model.wide_dtype))
            p.register_post_accumulate_grad_hook(partial(_accumulate, masters[name]))
    return masters


def _accumulate(master: nn.Parameter, p: nn.Parameter) -> None:
    """Adds a bf16 gradient to its master's, so that micro-batches add up in fp32."""
    if master.grad is None:
        master.grad = p.grad.to(master.dtype)
    else:
        master.grad += p.grad
    p.grad = None


def optimizers_of(
    masters: dict[str, nn.Parameter], config: TrainConfig, sharding: Sharding | None
) -> list[torch.optim.Optimizer]:
    def hidden(name: str, p: nn.Parameter) -> bool:
        return config.muon_lr > 0 and name.startswith("blocks.") and p.ndim == 2

    rest = [p for name, p in masters.items() if not hidden(name, p)]
    groups = [
        {"params": [p for p in rest if p.ndim > 1]},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    adam = partial(torch.optim.AdamW, betas=(0.9, 0.95), weight_decay=config.weight_decay)
    optimizers: list[torch.optim.Optimizer] = []
    if groups:
        optimizers.append(adam(groups, lr=config.lr, fused=True))
    matrices = {name: p for name, p in masters.items() if hidden(name, p)}
    if matrices:
        optimizers.append(Muon(matrices, config.muon_lr, config.weight_decay, sharding))
    return optimizers


def schedule(step: int, config: TrainConfig) -> float:
    """Share of the learning rate: linear warm-up, then half a cosine down to a tenth."""
    progress = min(1.0, step / config.steps)
    return min((step + 1) / max(1, config.warmup), 0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def draws_of(state: TrainState, batch: dict[str, Tensor]) -> Draws:
    """Of this rank's share of the batch."""
    world, B = state.world, len(batch["latents"])
    rank, ranks = (0, 1) if world is None else (world.data_rank, world.data_size)
    return draw(batch, state.config, state.model, state.step, rank * B, ranks * B)


def backward(state: TrainState, batch: dict[str, Tensor], draws: Draws) -> Tensor:
    """Runs the micro-batches. -> this rank's addends of (video loss, text loss)."""
    config, B = state.config, len(batch["latents"])
    size = config.micro_batch_size or B
    found = torch.zeros(2, device=state.skipped.device)
    for i in range(0, B, size):
        part = slice(i, i + size)
        if state.sharding is not None:  # replicas meet once; their partial sums are sharded
            state.objective.set_requires_all_reduce(i + size >= B)
        rows = {k: v if k == "null_context" else v[part] for k, v in batch.items()}
        video, text = state.objective(rows, Draws(*(x[part] for x in draws)))
        (video + config.lambda_text * text).backward()
        found += torch.stack([video.detach(), text.detach()])
    return found


def collect(state: TrainState, losses_2: Tensor) -> Tensor:
    """Puts each master's gradient in place and sums over the ranks what FSDP has not, the losses
    with it. -> the norm of all gradients."""
    sharding = state.sharding
    for name, master in state.masters.items():
        if sharding is not None:
            p = state.model.get_parameter(name)
            master.grad, p.grad = p.grad if p.grad is None else sharding.local(name, p.grad), None
        if master.grad is None:  # no sample of this step read it
            master.grad = torch.zeros_like(master)
    gradients = {name: master.grad for name, master in state.masters.items()}
    if sharding is None:
        return torch.stack(torch._foreach_norm(list(gradients.values()))).norm()
    whole = [g for name, g in gradients.items() if name not in sharding.shards]
    sum_over_ranks([*whole, losses_2])
    spread = [g for name, g in gradients.items() if name in sharding.shards]
    squares = [torch.stack(torch._foreach_norm(g or [losses_2[:0]])) for g in (spread, whole)]
    squares = [norms.square().sum() for norms in squares]
    sum_over_ranks(squares[:1])  # over replicas too: what is bad on one must be on all
    return (squares[0] / sharding.replicas + squares[1]).sqrt()


def train_step(state: TrainState, batch: dict[str, Tensor]) -> dict[str, Tensor | float]:
    """One optimizer step. Mutates only `state`; returns 0-d device tensors; no host
    synchronisation.

    batch: this rank's share; see `data.LatentSet`. A loss or gradient that is not finite on any
    rank leaves parameters, moments and average as they were on all, bit for bit, and adds one to
    `state.skipped`.
    """
    return advance(state, batch, draws_of(state, batch))


def advance(state: TrainState, batch: dict[str, Tensor], draws: Draws):
    """`train_step` with given random numbers."""
    config, share = state.config, schedule(state.step, state.config)
    losses_2 = backward(state, batch, draws)
    norm = collect(state, losses_2)
    loss = losses_2[0] + config.lambda_text * losses_2[1]
    bad = (~(loss.isfinite() & norm.isfinite())).float()
    gradients = [p.grad for p in state.masters.values()]
    torch._foreach_mul_(gradients, (config.grad_clip / (norm + 1e-6)).clamp(max=1.0))
    for optimizer in state.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = share * (config.muon_lr if isinstance(optimizer, Muon) else config.lr)
        optimizer.found_inf = bad  # both skip themselves, on the device, when this is 1
        optimizer.step()
        optimizer.zero_grad()
    masters = list(state.masters.values())
    decay = min(config.ema, (1 + state.step) / (10 + state.step))
    if state.ema:  # a weight for each, since one 0-d tensor for all would be read on the host
        weights = [(1 - decay) * (1 - bad)] * len(masters)
        torch._foreach_lerp_(list(state.ema.values()), masters, weights)
    if state.sharding is None and state.model.dtype != state.model.wide_dtype:
        own = [state.model.get_parameter(name) for name in state.masters]
        pairs = [(p, m) for p, m in zip(own, masters, strict=True) if p is not m]
        if pairs:
            with torch.no_grad():
                torch._foreach_copy_(*map(list, zip(*pairs, strict=True)))
    state.skipped += bad
    state.step += 1
    return {
        "loss": loss,
        "loss_video": losses_2[0],
        "loss_text": losses_2[1],
        "grad_norm": norm,
        "lr": config.lr * share,
    }


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
        peak = cost.peak_flops(name, state.model.dtype) if all_trained else None
        self.meter = Meter(device, peak and peak * (1 if world is None else world.size))
        self.state, self.data, self.first = state, data, first
        self.in_a_row, self.skipped = 0, state.skipped.item()

    def note(self, batch: dict[str, Tensor], waited: float) -> None:
        """One step. Errors: NonFinite after 10 bad ones in a row."""
        state, config = self.state, self.state.config
        V, T = batch["latents"][0, 0].numel() // 4, batch["prompt_tokens"].shape[1]
        sizes = {"video_rows": V, "text_rows": T, "context_rows": batch["context"].shape[1]}
        flops = cost.train_flops(state.model.cfg, samples=config.batch_size, **sizes)
        self.meter.add(config.batch_size, config.batch_size * (V + T), flops, waited)
        self.bar.update()
        skipped = state.skipped.item()
        if skipped == self.skipped:
            self.in_a_row = 0
            return
        self.in_a_row, self.skipped = self.in_a_row + 1, skipped
        clips = self.data.indices(state.step - 1, config.batch_size, config.seed).tolist()
        self.write({"step": state.step, "skipped": skipped, "clips": clips})
        if self.in_a_row == MOST_SKIPPED:
            raise NonFinite(
                f"train: the loss must be finite; got {MOST_SKIPPED} bad steps in a row "
                f"up to step {state.step}. Lower --lr; the last checkpoint is unharmed."
            )

    def write(self, record: dict) -> None:
        if self.first:
            self.metrics.write(record)

    def report(self, metrics: dict[str, Tensor | float]) -> None:
        record = {"step": self.state.step} | {k: float(v) for k, v in metrics.items()}
        self.write(record | self.meter.read())
        self.bar.set_postfix(video=f"{record['loss_video']:.3f}", text=f"{record['loss_text']:.3f}")


def fit(
    state: TrainState,
    data: LatentSet,
    path: str | Path,
    save_every: int = 500,
    log_every: int = 20,
    progress: bool = True,
    log_to: tuple[str, ...] = (),
) -> None:
    """Trains up to `state.config.steps`; every log_every steps a line in path/metrics.jsonl, every
    save_every steps a checkpoint in path/checkpoint, at the end both. Resuming goes on from there,
    bit for bit. SIGTERM and SIGINT, on any rank, let the step end and save it. log_to: tensorboard,
    wandb. Errors: UsageError for other data than a resumed run's; NonFinite after 10 non-finite
    steps in a row; checkpoint.Interrupted; OSError where the last save failed."""
    path, config, world = Path(path), state.config, state.world
    path.mkdir(parents=True, exist_ok=True)
    if state.data not in ("", data.identity):
        raise UsageError(
            f"train: data must be the shards of the run, {state.data}, or its order is another's; "
            f"got {data.identity}. Resume with the same --data, in the same order."
        )
    state.data = data.identity
    rank, ranks = (0, 1) if world is None else (world.data_rank, world.data_size)
    coming = stream(
        data, range(state.step, config.steps), config.batch_size, config.seed, rank, ranks
    )
    journal = Journal(state, data, path, log_to, progress)
    with (
        checkpoint.deferred_signals() as asked,
        journal.metrics,
        closing(coming),
        checkpoint.Saver(path / "checkpoint", world) as saver,
    ):
        stop = False
        while state.step < config.steps and not stop:
            since = time.perf_counter()
            _, batch = next(coming)
            waited = time.perf_counter() - since
            device = state.skipped.device
            metrics = train_step(
                state, {k: v.to(device, non_blocking=True) for k, v in batch.items()}
            )
            journal.note(batch, waited)
            if state.step % log_every == 0 or state.step == config.steps:
                journal.report(metrics)
            # Read once: what is asked from here on waits for the next step.
            stop = bool(asked) if world is None else world.any(bool(asked))
            if stop or state.step % save_every == 0 or state.step == config.steps:
                saver.save(state)
    if stop:
        raise checkpoint.Interrupted(asked[0] if asked else signal.SIGTERM, state.step)
