"""Training steps on a CPU: `engine.train_step` beside a plain PyTorch loop of the same model, with
the same random numbers, fp32 master weights and moments, clipping and average."""

import torch
from small_model import CONFIG, CONTEXT_ROWS, PLAIN, TEXT_ROWS
from torch.nn import functional as F

import engine
from engine import flow
from engine.objective import draw, drop_condition, text_rows

SETTINGS = engine.TrainConfig(stage="refine", batch_size=2, t2v_share=0.0, v2t_share=0.0)


def batch() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(CONFIG.vocab, (2, TEXT_ROWS), generator=g)
    return {
        "latents": torch.randn(2, 16, 5, 30, 52, generator=g),
        "prompt_tokens": ids,
        "prompt_lengths": torch.tensor([TEXT_ROWS] * 2),
        "caption_tokens": ids.flip(1),
        "context": torch.randn(2, CONTEXT_ROWS, CONFIG.text_dim, generator=g),
        "null_context": torch.randn(CONTEXT_ROWS, CONFIG.text_dim, generator=g),
    }


def plain_loop(dtype: torch.dtype):
    """What one would write without the engine's training: a step of it."""
    torch.manual_seed(0)
    model = engine.UniViGU(CONFIG, dtype=dtype, kernels=PLAIN).train()
    params = list(model.parameters())
    masters = [p.detach().float() for p in params]
    average = [m.clone() for m in masters]
    optimizer = torch.optim.AdamW(masters, lr=SETTINGS.lr, betas=(0.9, 0.95), fused=True)
    rows, number = batch(), 0

    def step():
        nonlocal number
        draws = draw(rows, SETTINGS, model, number)
        x, velocity = flow.corrupt_video(rows["latents"], draws.noise, draws.sigma_B)
        tokens, targets, t_text = text_rows(model, rows, draws, SETTINGS)
        out = model(x, tokens, 1000 * draws.sigma_B, t_text, drop_condition(rows, draws))
        video = F.mse_loss(out.velocity.float(), velocity)
        (video + F.cross_entropy(out.logits.flatten(0, 1).float(), targets.flatten())).backward()
        for master, p in zip(masters, params, strict=True):
            master.grad, p.grad = p.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, SETTINGS.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(average, masters, 1 - SETTINGS.ema)
        with torch.no_grad():
            torch._foreach_copy_(params, masters)
        number += 1

    return step


def engine_step(dtype: torch.dtype, recompute: str):
    torch.manual_seed(0)
    model = engine.UniViGU(CONFIG, dtype=dtype, kernels="auto")
    settings = engine.TrainConfig(**vars(SETTINGS) | {"recompute": recompute})
    state, rows = engine.TrainState.create(model, settings), batch()
    return lambda: engine.train_step(state, rows)


def training_steps(dtype: torch.dtype) -> dict:
    """Name -> a call that makes a step: forward, backward, clipping, AdamW, average."""
    return {
        "plain PyTorch loop": lambda: plain_loop(dtype),
        "engine.train_step": lambda: engine_step(dtype, "none"),
        "engine.train_step, recompute=attention": lambda: engine_step(dtype, "attention"),
        "engine.train_step, recompute=block": lambda: engine_step(dtype, "block"),
    }
