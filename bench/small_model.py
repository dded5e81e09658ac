"""The model of the CPU benchmarks and its inputs: width 512 (4 heads of 128), 6 blocks, hidden
width 2048, latents 16 x 5 x 30 x 52 (1950 video rows), 512 context rows. The engine's has 64 text
rows more, which diffusers' has not."""

import torch

import engine

CONFIG = engine.ModelConfig(
    heads=4, head_dim=128, layers=6, ffn_dim=2048, text_dim=512, freq_dim=256, vocab=1024
)
PLAIN = "adaln=reference,residual_adaln=reference,qknorm_rope=reference,rope3d=reference,"
PLAIN += "joint_attention=sdpa,cross_attention=sdpa,routed_ffn=reference"
VIDEO_ROWS, TEXT_ROWS, CONTEXT_ROWS = 1950, 64, 512


def inputs(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "video": torch.randn(1, 16, 5, 30, 52, generator=g),
        "tokens": torch.randint(CONFIG.vocab, (1, TEXT_ROWS), generator=g),
        "t_video": torch.tensor([500.0]),
        "t_text": torch.tensor([500.0]),
        "context": torch.randn(1, CONTEXT_ROWS, CONFIG.text_dim, generator=g).to(dtype),
    }


def diffusers_model(dtype: torch.dtype):
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        num_attention_heads=CONFIG.heads, attention_head_dim=CONFIG.head_dim,
        num_layers=CONFIG.layers, ffn_dim=CONFIG.ffn_dim, text_dim=CONFIG.text_dim,
        freq_dim=CONFIG.freq_dim, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
    ).to(dtype).eval()  # fmt: skip
