"""Training: one step of uni-flow in either stage, as a function of (state, batch) alone.

Every random number of step i comes from a generator seeded by (seed, i): a resumed run repeats the
uninterrupted one bit for bit. Legend: B samples, T text rows, D width.
"""

import copy
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from engine import checkpoint, flow
from engine.config import TrainConfig
from engine.data import LatentSet, batch_indices
from engine.errors import NonFinite, UsageError
from engine.fp8 import is_converted
from engine.model import UniViGU
from engine.muon import Muon

IGNORE = -100
MOST_SKIPPED = 10  # non-finite steps in a row that end a run


@dataclass
class TrainState:
    """All that training mutates. ema: parameter name -> fp32 average; skipped: 0-d count of
    non-finite steps."""

    model: UniViGU
    config: TrainConfig
    optimizers: list[torch.optim.Optimizer]
    ema: dict[str, Tensor]
    skipped: Tensor
    step: int = 0

    @classmethod
    def create(cls, model: UniViGU, config: TrainConfig) -> "TrainState":
        """Errors: UsageError for an fp8 model, whose weights take no gradients."""
        if is_converted(model):
            raise UsageError(
                "train: model must not be quantised; got fp8. Load the weights it was made from."
            )
        hidden = [p for p in model.blocks.parameters() if p.ndim == 2 and config.muon_lr > 0]
        ours = {id(p) for p in hidden}
        rest = [p for p in model.parameters() if id(p) not in ours]
        groups = [
            {"params": [p for p in rest if p.ndim > 1]},
            {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                groups,
                lr=config.lr,
                betas=(0.9, 0.95),
                weight_decay=config.weight_decay,
                fused=True,
            )
        ]
        if hidden:
            optimizers.append(Muon(hidden, config.muon_lr, config.weight_decay))
        ema = {name: p.detach().clone() for name, p in model.named_parameters()}
        return cls(model, config, optimizers, ema, torch.zeros((), device=rest[0].device))

    def ema_model(self) -> UniViGU:
        """A copy of the model that holds the averaged parameters."""
        model = copy.deepcopy(self.model)
        model.load_state_dict(self.ema)
        return model.eval()


def schedule(step: int, config: TrainConfig) -> float:
    """Share of the learning rate: linear warm-up, then half a cosine down to a tenth."""
    progress = min(1.0, step / config.steps)
    return min((step + 1) / config.warmup, 0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


@dataclass
class Draws:
    """The random numbers of one step, drawn on the CPU so that a seed means the same on every
    device."""

    noise: Tensor
    sigma_B: Tensor
    t_B: Tensor
    source: Tensor
    keep_BT: Tensor
    null_B: Tensor
    zeros_B: Tensor
    t2v_B: Tensor
    v2t_B: Tensor


def draw(batch: dict[str, Tensor], config: TrainConfig, model: UniViGU, step: int) -> Draws:
    g = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    latents, (B, T) = batch["latents"], batch["prompt_tokens"].shape
    cfg, device = model.cfg, latents.device

    def uniform(*shape):
        return torch.rand(shape, generator=g)

    latest = 1 - 1e-3 if config.text_loss == "kl" else 1.0  # the KL's rate is infinite at t = 1
    if cfg.text_flow == "embedding":
        source = torch.randn(B, T, cfg.dim, generator=g)
    elif cfg.mask_source:
        source = torch.full((B, T), cfg.vocab)
    else:
        source = torch.randint(cfg.vocab, (B, T), generator=g)
    corner = uniform(B)
    v2t_B = corner > 1 - config.v2t_share
    draws = Draws(
        noise=torch.randn(latents.shape, generator=g),
        sigma_B=flow.shifted(uniform(B), config.flow_shift).masked_fill(v2t_B, 0.0),
        t_B=uniform(B) * latest,
        source=source,
        keep_BT=uniform(B, T),
        null_B=(uniform(B) < config.dropout) | v2t_B,
        zeros_B=(uniform(B) < 0.5) | v2t_B,
        t2v_B=corner < config.t2v_share,
        v2t_B=v2t_B,
    )
    return Draws(**{name: value.to(device) for name, value in vars(draws).items()})


def drop_condition(batch: dict[str, Tensor], draws: Draws) -> Tensor:
    """The prompt's context, or one of the two nulls: the encoded empty string, or zeros."""
    null = torch.where(draws.zeros_B[:, None, None], 0.0, batch["null_context"])
    return torch.where(draws.null_B[:, None, None], null, batch["context"])


def text_rows(model: UniViGU, batch: dict[str, Tensor], draws: Draws, config: TrainConfig):
    """(rows given to the network, targets, times): noised target text, or the clean prompt at the
    t2v corner.

    Discrete: token ids [B,T] and clean ids with IGNORE where no loss is due. Embedding: vectors and
    velocities [B,T,D]. Rows after EOS are targets too: a caption's length is unknown when it is
    sampled, so the pads are part of it.
    """
    clean = batch["prompt_tokens"] if config.stage == "recall" else batch["caption_tokens"]
    corner = draws.t2v_B[:, None]
    t_B = torch.where(draws.t2v_B, 1.0, draws.t_B)
    if model.cfg.text_flow == "discrete":
        noised = flow.corrupt_tokens(
            clean, draws.source, draws.t_B, config.text_exponent, draws.keep_BT
        )
        rows = torch.where(corner, batch["prompt_tokens"], noised)
        return rows, clean.masked_fill(corner, IGNORE), flow.text_time(t_B)
    vectors = flow.token_vectors(
        model.vocab_embed.weight, torch.where(corner, batch["prompt_tokens"], clean)
    )
    t = t_B[:, None, None]
    return (
        (1 - t) * draws.source + t * vectors,
        vectors.detach() - draws.source,
        flow.text_time(t_B),
    )


def text_loss(
    model: UniViGU, h_BTD: Tensor, rows, targets, draws: Draws, config: TrainConfig
) -> Tensor:
    """Per token [B,T]; 0 or meaningless at the t2v corner."""
    head = model.text_head.linear
    if model.cfg.text_flow == "embedding":
        return F.mse_loss(head(h_BTD).float(), targets, reduction="none").mean(-1)
    if config.text_loss == "kl":
        clean = targets.clamp(min=0)
        return flow.generalized_kl(head(h_BTD), clean, rows, draws.t_B, config.text_exponent)
    return model.ops.vocab_loss(h_BTD, head.weight, head.bias, targets, IGNORE)


def mean_where(loss: Tensor, counted_B: Tensor) -> Tensor:
    """Mean over the tokens of the counted samples; 0 where there are none. loss [B, ...]."""
    per_sample = loss.flatten(1).mean(1)
    return torch.where(counted_B, per_sample, 0.0).sum() / counted_B.sum().clamp(min=1)


def losses(
    model: UniViGU, batch: dict[str, Tensor], draws: Draws, config: TrainConfig
) -> tuple[Tensor, Tensor]:
    """(video loss, text loss), each a mean over its own counted tokens, so that neither the length
    of a caption nor that of a video sets the balance (the paper's lambda_v = 1)."""
    x, velocity = flow.corrupt_video(batch["latents"], draws.noise, draws.sigma_B)
    rows, targets, t_text = text_rows(model, batch, draws, config)
    lengths = torch.where(draws.t2v_B, batch["prompt_lengths"], rows.shape[1])
    context = drop_condition(batch, draws)
    conditions = model.conditions(flow.TIMES * draws.sigma_B, t_text)
    h_BLD = model.features(x, rows, conditions, model.encode_context(context), lengths)
    video = F.mse_loss(model.velocity(h_BLD, x.shape).float(), velocity, reduction="none")
    text = text_loss(model, h_BLD[:, -rows.shape[1] :], rows, targets, draws, config)
    return mean_where(video, ~draws.v2t_B), mean_where(text, ~draws.t2v_B)


def train_step(state: TrainState, batch: dict[str, Tensor]) -> dict[str, Tensor | float]:
    """One optimizer step. Mutates only `state`; returns 0-d device tensors; no host
    synchronisation.

    batch: see `data.LatentSet`. A non-finite loss or gradient leaves parameters, moments and
    average as they were, bit for bit, and adds one to `state.skipped`.
    """
    model, config = state.model, state.config
    share = schedule(state.step, config)
    video, text = losses(model, batch, draw(batch, config, model, state.step), config)
    loss = video + config.lambda_text * text
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
    bad = (~(loss.isfinite() & norm.isfinite())).float()
    for optimizer, lr in zip(state.optimizers, (config.lr, config.muon_lr), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = lr * share
        optimizer.found_inf = bad  # both skip themselves, on the device, when this is 1
        optimizer.step()
        optimizer.zero_grad()
    decay = min(config.ema, (1 + state.step) / (10 + state.step))
    torch._foreach_lerp_(
        list(state.ema.values()), list(model.parameters()), (1 - decay) * (1 - bad)
    )
    state.skipped += bad
    state.step += 1
    return {
        "loss": loss.detach(),
        "loss_video": video.detach(),
        "loss_text": text.detach(),
        "grad_norm": norm,
        "lr": config.lr * share,
    }


def fit(
    state: TrainState,
    data: LatentSet,
    path: str | Path,
    save_every: int = 500,
    log_every: int = 20,
    progress=True,
) -> None:
    """Trains up to `state.config.steps`; every log_every steps a line in path/metrics.jsonl, every
    save_every steps and at the end a checkpoint in path/checkpoint. Resuming continues from there,
    bit for bit. SIGTERM and SIGINT let the step end and save it. Errors: NonFinite after 10
    non-finite steps in a row; checkpoint.Interrupted; OSError where the last save failed."""
    path, config, device = Path(path), state.config, state.skipped.device
    path.mkdir(parents=True, exist_ok=True)
    in_a_row, skipped = 0, state.skipped.item()
    since, begun = time.perf_counter(), state.step
    bar = tqdm(total=config.steps, initial=state.step, disable=not progress, mininterval=2)
    with (
        checkpoint.deferred_signals() as asked,
        (path / "metrics.jsonl").open("a") as log,
        checkpoint.Saver(path / "checkpoint") as saver,
    ):
        while state.step < config.steps:
            indices = batch_indices(len(data), config.batch_size, state.step, config.seed)
            batch = {k: v.to(device) for k, v in data.batch(indices).items()}
            metrics = train_step(state, batch)
            bar.update()
            if state.skipped.item() > skipped:
                in_a_row, skipped = in_a_row + 1, state.skipped.item()
                log.write(
                    json.dumps({"step": state.step, "skipped": skipped, "clips": indices.tolist()})
                    + "\n"
                )
                if in_a_row == MOST_SKIPPED:
                    raise NonFinite(
                        f"train: the loss must be finite; got {MOST_SKIPPED} bad steps in a row "
                        f"up to step {state.step}. Lower --lr; the last checkpoint is unharmed."
                    )
            else:
                in_a_row = 0
            if state.step % log_every == 0:
                now = time.perf_counter()
                record = {k: float(v) for k, v in metrics.items()} | {"step": state.step}
                record["samples_per_s"] = (state.step - begun) * config.batch_size / (now - since)
                since, begun = now, state.step
                log.write(json.dumps(record) + "\n")
                log.flush()
                bar.set_postfix(
                    video=f"{record['loss_video']:.3f}", text=f"{record['loss_text']:.3f}"
                )
            stop = bool(asked)  # read once: what is asked from here on waits for the next step
            if stop or state.step % save_every == 0 or state.step == config.steps:
                saver.save(state)
            if stop:
                break
    if asked:
        raise checkpoint.Interrupted(asked[0], state.step)
