"""The models and inputs that infer, caption, train and scale run: ours with each choice of kernels,
and diffusers' Wan transformer with the same weights. Weights and inputs are drawn from seeds."""

from dataclasses import dataclass, replace
from math import prod

import torch

import engine
from bench.harness.timing import is_cuda
from engine.errors import UsageError
from engine.weights import names
from univigu_kernels import Ops, bind

SMALL = engine.ModelConfig(
    heads=4, head_dim=128, layers=6, ffn_dim=2048, text_dim=512, freq_dim=256, vocab=1024
)
QUICK = engine.ModelConfig(
    heads=2, head_dim=16, layers=2, ffn_dim=48, text_dim=24, freq_dim=16, vocab=60
)
PLAIN = (
    "adaln=reference,residual_adaln=reference,qknorm_rope=reference,rope3d=reference,"
    "rms_norm=reference,linear=reference,joint_attention=sdpa,cross_attention=sdpa,"
    "routed_ffn=reference,vocab_sample=reference,vocab_loss=reference,flow_step=reference"
)
ENGINE, ENGINE_PLAIN, DIFFUSERS = "engine", "plain PyTorch", "diffusers"
AGREEMENT = {"bfloat16": 5e-2, "float32": 1e-3}  # relative L2 error against plain PyTorch in fp32


@dataclass(frozen=True)
class Setting:
    """What is measured, and how long. preset: small, quick, or one of the engine's; latent: frames,
    height and width of the latents, 4 x 8 x 8 smaller than the video; steps, caption_steps: of
    sampling runs; rounds: of each process, fewer where `budget` seconds of one group are over;
    run_rounds: of whole sampling runs, which a short one has warmed up."""

    device: str = "cpu"
    preset: str = "small"
    latent: tuple[int, int, int] = (5, 30, 52)
    text_rows: int = 64
    context_rows: int = 512
    samples: int = 1
    steps: int = 10
    caption_steps: int = 50
    rounds: int = 4
    run_rounds: int = 1
    budget: float = 40.0

    @property
    def cfg(self) -> engine.ModelConfig:
        mine = {"small": SMALL, "quick": QUICK}
        return mine.get(self.preset) or engine.ModelConfig.preset(self.preset)

    @property
    def video_rows(self) -> int:
        return prod(self.latent) // 4

    @property
    def sizes(self) -> dict[str, int]:
        """As `engine.planning.flops` and `bench.roofline` take them."""
        return {
            "video_rows": self.video_rows,
            "text_rows": self.text_rows,
            "context_rows": self.context_rows,
            "samples": self.samples,
        }

    @property
    def cuda(self) -> bool:
        return is_cuda(self.device)


DEFAULTS = {
    "cpu": Setting(),
    "cuda": Setting("cuda", "wan2.1-1.3b", (21, 60, 104), 256, steps=3, caption_steps=12, rounds=5),
    "quick": Setting("cpu", "quick", (2, 4, 6), 5, 9, steps=3, caption_steps=4, rounds=2),
}


def default(device: str, quick: bool) -> Setting:
    chosen = DEFAULTS["quick" if quick else torch.device(device).type]
    return replace(chosen, device=device)


def inputs(s: Setting, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Arguments of `UniViGU.forward`."""
    g, B = torch.Generator().manual_seed(0), s.samples
    made = {
        "video": torch.randn(B, 16, *s.latent, generator=g),
        "tokens": torch.randint(s.cfg.vocab, (B, s.text_rows), generator=g),
        "t_video": torch.full((B,), 500.0),
        "t_text": torch.full((B,), 500.0),
        "context": torch.randn(B, s.context_rows, s.cfg.text_dim, generator=g).to(dtype),
    }
    return {name: x.to(s.device) for name, x in made.items()}


def bound(s: Setting, dtype: torch.dtype, training: bool = False) -> Ops:
    """The engine's kernels for the setting; on a GPU those that a trial found right and fastest."""
    case = {"B": s.samples, "V": s.video_rows, "T": s.text_rows, "C": s.context_rows}
    return bind("auto", s.device, dtype, case=case | s.cfg.case, training=training)


def ours(s: Setting, dtype: torch.dtype, kernels: str | Ops = "auto") -> engine.UniViGU:
    """kernels: auto, which is `bound`; another request; or what was bound."""
    torch.manual_seed(0)
    cfg = s.cfg
    if kernels == "auto":
        kernels = bound(s, dtype)
    model = engine.UniViGU(cfg, s.device, kernels="reference")  # in fp32: both dtypes round these
    torch.nn.init.normal_(model.text_head.linear.weight, std=0.05)  # zeros would read no row
    made = engine.UniViGU(cfg, s.device, dtype, kernels).eval()
    made.load_state_dict(model.state_dict())
    return made


def diffusers_model(s: Setting, dtype: torch.dtype):
    """WanTransformer3DModel with the weights of `ours`, and in fp32 what from_pretrained keeps so;
    it has no text rows."""
    from diffusers import WanTransformer3DModel

    cfg = s.cfg
    with torch.device(s.device):
        model = WanTransformer3DModel(
            num_attention_heads=cfg.heads,
            attention_head_dim=cfg.head_dim,
            num_layers=cfg.layers,
            ffn_dim=cfg.ffn_dim,
            text_dim=cfg.text_dim,
            freq_dim=cfg.freq_dim,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
        ).eval()
    wide = set(WanTransformer3DModel._keep_in_fp32_modules)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not wide & set(name.split(".")):
            tensor.data = tensor.data.to(dtype)
    theirs = model.state_dict()
    stock = names.from_diffusers({name: name for name in theirs})
    for name, weight in ours(s, dtype, "reference").state_dict().items():
        row = 0
        for part in names.stock_names(name):
            if part in stock:
                target = theirs[stock.pop(part)]
                target.copy_(weight.flatten()[row : row + target.numel()].view_as(target))
                row += target.numel()
    if stock:
        raise UsageError(
            f"bench: diffusers' weights must all be ours; got {list(stock)} that are not. "
            "Use diffusers 0.38 to 0.42."
        )
    return model


def compiled(model, device: str):
    """By torch.compile. On a GPU block by block, as diffusers advises: 30 blocks as one graph take
    the compiler a minute."""
    if not is_cuda(device):
        return torch.compile(model, dynamic=False)
    model.compile_repeated_blocks(dynamic=False)
    return model


def error(result: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative L2."""
    return ((result.float() - truth.float()).norm() / truth.float().norm()).item()
