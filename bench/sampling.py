"""Whole sampling runs: the engine's loops beside diffusers' pipeline loop (t2v) and the official
arithmetic in plain PyTorch (v2t). Each maker returns a call that does one run."""

import torch
from small_model import CONFIG, CONTEXT_ROWS, PLAIN, TEXT_ROWS, diffusers_model, inputs

import engine
from engine import sample
from engine.schedule import schedule

PROMPT_TOKENS, NULL_TOKENS = 20, 1  # of the CONTEXT_ROWS; the rest are zeros, as Wan has it
GENERATION_STEPS, CAPTION_STEPS, GUIDANCE, SHIFT = 10, 50, 5.0, 3.0

EXACT = "engine, exact"
REFRESH = {
    EXACT: 1,
    "engine, video refreshed every 10": 10,
    "engine, video frozen": CAPTION_STEPS,
}


def prompts(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Context of a prompt and of its null [1, C, E]."""
    g = torch.Generator().manual_seed(1)
    made = torch.zeros(2, 1, CONTEXT_ROWS, CONFIG.text_dim)
    for context, tokens in zip(made, (PROMPT_TOKENS, NULL_TOKENS), strict=True):
        context[:, :tokens] = torch.randn(1, tokens, CONFIG.text_dim, generator=g)
    return made.to(dtype).unbind()


def ours(dtype: torch.dtype, kernels: str):
    torch.manual_seed(0)
    model = engine.UniViGU(CONFIG, dtype=dtype, kernels=kernels).eval()
    torch.nn.init.normal_(model.text_head.linear.weight, std=0.05)  # zeros would read no row
    return model


def generating(dtype: torch.dtype) -> dict:
    """t2v with guidance by UniPC. diffusers' loop as its WanPipeline runs it: two evaluations a
    step, fp32 latents. The engine's with the prompt as text rows too, and without."""
    x, (cond, null) = inputs(dtype), prompts(dtype)

    def diffusers():
        from diffusers import UniPCMultistepScheduler

        model = diffusers_model(dtype)
        options = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}

        def call():
            scheduler = UniPCMultistepScheduler(flow_shift=SHIFT, **options)
            scheduler.set_timesteps(GENERATION_STEPS)
            latents = x["video"].clone()
            for t in scheduler.timesteps:
                now, low = t.expand(1), latents.to(dtype)
                text, plain = (
                    model(low, now, context, return_dict=False)[0] for context in (cond, null)
                )
                guided = plain + GUIDANCE * (text - plain)
                latents = scheduler.step(guided, t, latents, return_dict=False)[0]
            return latents

        return call

    def engine_run(text_rows: int):
        model = ours(dtype, "cpu")
        plan = schedule("t2v", GENERATION_STEPS, SHIFT, "unipc", "exact")
        tokens = x["tokens"][:, :text_rows]
        lengths = [PROMPT_TOKENS] if text_rows else None

        def call():
            run = sample.Run(model, plan, x["video"], tokens, cond, null, GUIDANCE, lengths)
            for _ in run.steps():
                pass
            return run.latents

        return call

    return {
        "diffusers": diffusers,
        "engine, prompt as text rows too": lambda: engine_run(TEXT_ROWS),
        "engine, no text rows": lambda: engine_run(0),
    }


def captioning(dtype: torch.dtype) -> dict:
    """v2t. Plain PyTorch evaluates the whole network at each step, as the official code does, and
    samples from its logits."""
    x = inputs(dtype)
    empty = torch.zeros(1, CONTEXT_ROWS, CONFIG.text_dim, dtype=dtype)
    plan = schedule("v2t", CAPTION_STEPS, 1.0, "euler", "exact")

    def plain():
        model = ours(dtype, PLAIN)

        def call():
            tokens, still = x["tokens"], torch.zeros(1)
            for time, probability in zip(plan.text_times, plan.probabilities, strict=True):
                out = model(x["video"], tokens, still, torch.tensor([time]), empty)
                draw = torch.multinomial(out.logits[0].float().softmax(-1), 1)[None, :, 0]
                jump = torch.rand(tokens.shape) < probability
                tokens = torch.where(jump, draw, tokens)
            return tokens

        return call

    def engine_run(refresh_every: int):
        model = ours(dtype, "cpu")

        def call():
            run = sample.Run(
                model, plan, x["video"], x["tokens"], empty, refresh_every=refresh_every
            )
            for _ in run.steps():
                pass
            return run

        return call

    cached = {name: lambda every=every: engine_run(every) for name, every in REFRESH.items()}
    return {"plain PyTorch": plain} | cached


@torch.inference_mode()
def drifts(dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """What the cached captions are off the exact ones of the same seed."""
    makers = captioning(dtype)
    exact = makers[EXACT]()().tokens
    runs = {name: makers[name]()() for name in REFRESH if name != EXACT}
    return {
        name: sample.drift(exact, run.tokens, run.cache_change())[0] for name, run in runs.items()
    }
