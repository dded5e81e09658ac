"""Training: one step of uni-flow in either stage, as a function of (state, batch) alone.

Masters are fp32: the model's own parameters where those are fp32 and whole, else this rank's rows
(FSDP2) or a copy beside the bf16 ones. Micro-batches and ranks add up addends of global means, so
any layout takes the step that one process would.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.config import ModelConfig, TrainConfig
from engine.data import Batch
from engine.errors import UsageError
from engine.fp8 import is_converted, train_in_fp8
from engine.model import UniViGU
from engine.parallel import World
from engine.parallel.sequence import heads_over
from engine.parallel.world import Sharding, sum_over_ranks
from engine.train import distill, lora
from engine.train.muon import Muon
from engine.train.objective import Draws, Objective, draw, part_of
from engine.train.trajectories import Trajectories
from engine.weights import read_adapter
from engine.weights.checkpoints import SCORE
from engine.weights.merge import shapes_of


@dataclass
class TrainState:
    """All that training mutates, and what it does by.

    masters: name -> fp32 rows of each trained parameter, which the optimizers step.
    ema: their averages, none where config.ema is 0.
    skipped: 0-d count of non-finite steps.
    lr_share: from a step's number to the share of the learning rate that it takes.
    world, sharding: None in a single process.
    data: the shards that it was trained on, in order.
    base: a fingerprint of what stays frozen.
    teacher: one of stage distill's teacher.
    origin: what the run began with, which `engine.train.export` makes again where some of it stays
        frozen: a preset, or init_from and its path; and the dtype.
    """

    objective: Objective | distill.Distillation
    masters: dict[str, nn.Parameter]
    optimizers: list[torch.optim.Optimizer]
    ema: dict[str, Tensor]
    skipped: Tensor
    lr_share: Callable[[int], float]
    world: World | None = None
    sharding: Sharding | None = None
    step: int = 0
    data: str = ""
    base: str = ""
    teacher: str = ""
    origin: dict[str, str] = field(default_factory=dict)

    @property
    def model(self) -> UniViGU:
        return self.objective.model

    @property
    def config(self) -> TrainConfig:
        return self.objective.config

    def parameter(self, name: str) -> nn.Parameter:
        """The one whose master has this name."""
        networks = self.objective.networks
        prefix = max(filter(name.startswith, networks), key=len)
        return networks[prefix].get_parameter(name.removeprefix(prefix))

    @property
    def trajectories(self) -> Trajectories | None:
        """Those that stage distill's teacher wrote ahead."""
        teacher = getattr(self.objective, "teacher", None)
        return teacher if isinstance(teacher, Trajectories) else None

    @classmethod
    def create(
        cls,
        model: UniViGU,
        config: TrainConfig,
        world: World | None = None,
        lr_share: Callable[[int], float] | None = None,
        adapter: str | Path | None = None,
        teacher: UniViGU | Trajectories | None = None,
    ) -> "TrainState":
        """Takes the model over: its parameters are frozen, given adapters and sharded as asked.

        model: as `load_model` returns it.
        config: one stage of training.
        world: the ranks that train together; None: this process alone.
        lr_share: from a step's number, counted from 0, to the share of config.lr and config.muon_lr
            that it takes; None: linear warm-up, then half a cosine down to a tenth. A checkpoint
            does not hold it: give it again to resume.
        adapter: a file that a training with lora_rank saved, to start from.
        teacher: of stage distill, another copy of the model or another model of the same rows,
            which is frozen; whole on every rank. Or the trajectories that it wrote ahead.

        Errors: UsageError for an fp8 model, whose weights take no gradients, for an adapter of
        another base or rank, and for a teacher that the stage does not go with; ModelFileError."""
        if is_converted(model):
            raise UsageError(
                "train: model must not be quantised; got fp8. Load the weights it was made from."
            )

        model.recompute = config.recompute
        if config.precision == "fp8":
            train_in_fp8(model)
        lora.freeze(model, config.freeze)
        start = None if adapter is None else read_adapter(adapter, shapes_of(model))
        if config.lora_rank:
            lora.add_lora(model, config.lora_rank, config.seed)

        base = lora.fingerprint(model)
        if start is not None:
            lora.start_from(model, start)
        sequence = world and world.sequence(model.cfg.heads)
        objective = objective_of(model, config, sequence, teacher)
        sharding = world and Sharding(objective, world)

        masters = masters_of(objective, sharding)
        kept = of_model(masters) if config.ema > 0 else {}
        ema = {name: p.detach().clone() for name, p in kept.items()}
        skipped = torch.zeros((), device=next(model.parameters()).device)
        optimizers = optimizers_of(masters, config, sharding)
        share = lr_share or partial(cosine_share, config=config)

        parts = objective, masters, optimizers, ema, skipped, share
        if isinstance(teacher, Trajectories):
            known = teacher.fingerprint
        else:
            known = "" if teacher is None else lora.fingerprint(teacher)
        return cls(*parts, world, sharding, base=base, teacher=known)

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
            lora.add_lora(model, self.config.lora_rank, self.config.seed)
        for name, target in model.named_parameters():
            rows = (self.ema or self.masters).get(name)
            if rows is None:  # frozen
                rows = self.model.get_parameter(name).detach()
                rows = rows if self.sharding is None else self.sharding.local(name, rows)
            whole = rows if self.sharding is None else self.sharding.whole(name, rows)
            target.data.copy_(whole)
        lora.merge_lora(model)
        return model.eval()

    def save_adapter(self, path: Path) -> None:
        """Writes what `ema_model` has merged as an adapter, see `engine.train.lora`. Of several
        ranks all must call it; rank 0 writes."""
        factors, sharding = self.ema or of_model(self.masters), self.sharding
        if sharding is not None:
            factors = {name: sharding.whole(name, rows) for name, rows in factors.items()}
        if self.world is None or self.world.rank == 0:
            sampling = distill.sampling_of(self.config) if self.config.student_steps else None
            factors = {k: v.detach() for k, v in factors.items()}
            lora.save_adapter(factors, self.base, path, sampling)


def objective_of(
    model: UniViGU, config: TrainConfig, sequence, teacher: UniViGU | Trajectories | None
):
    """The losses of the stage. Errors: UsageError."""
    distill.check_settings(config)
    if config.stage != "distill":
        if teacher is not None:
            raise UsageError(f"train: teacher must go with stage=distill; got {config.stage}.")
        return Objective(model, config, sequence)
    return distill.Distillation(model, config, sequence, teacher)


def masters_of(objective: nn.Module, sharding: Sharding | None) -> dict[str, nn.Parameter]:
    masters, wide = {}, objective.model.wide_dtype
    for prefix, network in objective.networks.items():
        for own, p in network.named_parameters():
            name = prefix + own
            if not p.requires_grad:
                continue
            if sharding is not None:
                masters[name] = nn.Parameter(sharding.local(name, p.detach()))
            elif p.dtype == wide:
                masters[name] = p
            else:
                masters[name] = nn.Parameter(p.detach().to(wide))
                p.register_post_accumulate_grad_hook(partial(_accumulate, masters[name]))
    return masters


def of_model(masters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Those of the model; what only teaches it is neither averaged nor saved with it."""
    return {name: p for name, p in masters.items() if not name.startswith(SCORE)}


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
        inside = name.removeprefix(SCORE).startswith("blocks.")
        return config.muon_lr > 0 and inside and p.ndim == 2

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


def cosine_share(step: int, config: TrainConfig) -> float:
    """The share of the learning rate that a step takes: linear warm-up, then half a cosine down to
    a tenth."""
    progress = min(1.0, step / config.steps)
    return min((step + 1) / max(1, config.warmup), 0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def case_of(
    cfg: ModelConfig, config: TrainConfig, size: tuple, ranks: int = 1, sp: int = 1
) -> dict[str, int]:
    """What a rank's attention and feed-forward layers see in a step, for `univigu_kernels.bind`.
    size: a key of `LatentSet.buckets`; ranks: those with samples of their own; sp: those that share
    each sample, which exchange rows for heads before attention."""
    (_, *latents), (text_rows,), (context_rows, _) = size
    samples = config.micro_batch_size or config.batch_size // ranks
    rows = {"V": prod(latents) // 4, "T": text_rows, "C": context_rows}
    return {"B": max(1, samples), **rows, **cfg.case, "H": cfg.heads // heads_over(cfg.heads, sp)}


def draws_of(state: TrainState, batch: dict[str, Tensor]) -> Draws | distill.Runs:
    """Draws the random numbers of this rank's share of the batch."""
    world, B = state.world, len(batch["latents"])
    rank, ranks = (0, 1) if world is None else (world.data_rank, world.data_size)
    draw_for = distill.draw_runs if state.config.stage == "distill" else draw
    return draw_for(batch, state.config, state.model, state.step, rank * B, ranks * B)


def backward(state: TrainState, batch: dict[str, Tensor], draws: Draws | distill.Runs) -> Tensor:
    """Runs the micro-batches; returns this rank's addends of the losses: of video and text, and of
    what else the stage has."""
    config, B = state.config, len(batch["latents"])
    size = config.micro_batch_size or B
    found = 0
    for i in range(0, B, size):
        part = slice(i, i + size)
        if state.sharding is not None:  # replicas meet once; their partial sums are sharded
            state.objective.set_requires_all_reduce(i + size >= B)
        losses = torch.stack(state.objective(*part_of(batch, draws, part)))
        total(losses, config).backward()
        found = found + losses.detach()
    return found


def total(losses: Tensor, config: TrainConfig) -> Tensor:
    """What training lowers. Each of those that only stage distill has is a slice, which is empty
    where it is not there."""
    matched = config.matching * losses[2:3].sum() + losses[3:].sum()
    return losses[0] + config.lambda_text * losses[1] + matched


def collect(state: TrainState, losses: Tensor) -> Tensor:
    """Puts each master's gradient in place and sums over the ranks what FSDP has not, the losses
    with it; returns the norm of all gradients."""
    sharding = state.sharding
    for name, master in state.masters.items():
        if sharding is not None:
            p = state.parameter(name)
            master.grad, p.grad = p.grad if p.grad is None else sharding.local(name, p.grad), None
        if master.grad is None:  # no sample of this step read it
            master.grad = torch.zeros_like(master)
    gradients = {name: master.grad for name, master in state.masters.items()}
    if sharding is None:
        return torch.stack(torch._foreach_norm(list(gradients.values()))).norm()
    whole = [g for name, g in gradients.items() if name not in sharding.shards]
    sum_over_ranks([*whole, losses])
    spread = [g for name, g in gradients.items() if name in sharding.shards]
    squares = [torch.stack(torch._foreach_norm(g or [losses[:0]])) for g in (spread, whole)]
    squares = [norms.square().sum() for norms in squares]
    sum_over_ranks(squares[:1])  # over replicas too: what is bad on one must be on all
    return (squares[0] / sharding.replicas + squares[1]).sqrt()


def train_step(state: TrainState, batch: Batch) -> dict[str, Tensor | float]:
    """One optimizer step. Mutates only `state`; returns 0-d device tensors; no host
    synchronisation.

    batch: this rank's share, an `engine.Batch`; `LatentSet.batch` makes them.

    A loss or gradient that is not finite on any rank leaves parameters, moments and average as they
    were on all, bit for bit, and adds one to `state.skipped`.
    """
    return advance(state, batch, draws_of(state, batch))


def advance(state: TrainState, batch: dict[str, Tensor], draws: Draws | distill.Runs):
    """`train_step` with given random numbers."""
    config = state.config
    share = state.lr_share(state.step)
    losses = backward(state, batch, draws)
    norm = collect(state, losses)
    loss = total(losses, config)
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
        weights = [(1 - decay) * (1 - bad)] * len(state.ema)
        followed = [state.masters[name] for name in state.ema]
        torch._foreach_lerp_(list(state.ema.values()), followed, weights)

    # A bf16 model without FSDP computes with copies of its fp32 masters.
    if state.sharding is None and state.model.dtype != state.model.wide_dtype:
        own = [state.parameter(name) for name in state.masters]
        pairs = [(p, m) for p, m in zip(own, masters, strict=True) if p is not m]
        if pairs:
            with torch.no_grad():
                torch._foreach_copy_(*map(list, zip(*pairs, strict=True)))

    state.skipped += bad
    state.step += 1
    return {
        "loss": loss,
        "loss_video": losses[0],
        "loss_text": losses[1],
        **dict(zip(("loss_match", "loss_score"), losses[2:], strict=False)),
        "grad_norm": norm,
        "lr": config.lr * share,
    }
