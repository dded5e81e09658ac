"""Latent shards and the stateful order in which training reads them.

A shard holds what training needs and nothing that a step would compute twice: normalised latents,
token ids of prompt and caption, and each distinct prompt's context once. Legend: N clips, U
distinct prompts, C context rows, T text rows.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from engine.errors import ModelFileError, UsageError

TENSORS = (
    "latents", "prompt_tokens", "prompt_lengths", "caption_tokens",
    "context_index", "contexts", "null_context",
)  # fmt: skip


class LatentSet:
    """A shard in memory. `batch(indices)` -> dict of latents fp32 [B,16,F,Y,X] (normalised),
    context [B,C,E], null_context [C,E] (the encoded empty string), prompt_tokens and caption_tokens
    [B,T], prompt_lengths [B]."""

    def __init__(self, path: str | Path):
        try:
            with safe_open(path, "pt") as file:
                self.info = json.loads((file.metadata() or {}).get("info", "{}"))
                missing = [name for name in TENSORS if name not in file.keys()]
                if missing:
                    raise ModelFileError(
                        f"data: {path} must hold {', '.join(TENSORS)}; got no {missing[0]}."
                    )
                self.tensors = {name: file.get_tensor(name) for name in TENSORS}
        except (OSError, SafetensorError, json.JSONDecodeError) as error:
            raise ModelFileError(
                f"data: {path} must be a latent shard; got {error}. Run univigu preprocess."
            ) from None

    def __len__(self) -> int:
        return len(self.tensors["latents"])

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        t = self.tensors
        rows = {
            name: t[name][indices] for name in ("prompt_tokens", "prompt_lengths", "caption_tokens")
        }
        context = t["contexts"][t["context_index"][indices]].float()
        return rows | {
            "latents": t["latents"][indices].float(),
            "context": context,
            "null_context": t["null_context"].float(),
        }


def batch_indices(count: int, batch: int, step: int, seed: int) -> Tensor:
    """The clips of one step: without replacement within an epoch, a new order each epoch, last
    partial batch dropped. A pure function of (step, seed), so resuming needs no other state. ->
    int64 [batch]."""
    if batch > count:
        raise UsageError(
            f"train: batch_size must be at most the {count} clips of the set; got {batch}."
        )
    epoch, at = divmod(step, count // batch)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    return order[at * batch : (at + 1) * batch]


def preprocess_scenes(
    parts, path: str | Path, count: int, seed: int, text_rows: int, progress=iter
) -> None:
    """Renders `count` training scenes, encodes them with a pipeline's VAE and text encoder, writes
    one shard."""
    from engine.scenes import draw_scenes, render

    scenes = draw_scenes(count, seed, held_out=False)
    prompt_rows = [parts.text.encode_rows(s.prompt, text_rows) for s in scenes]
    caption_rows = [parts.text.encode_rows(s.caption, text_rows) for s in scenes]
    prompts = sorted({s.prompt for s in scenes})
    index = {prompt: i for i, prompt in enumerate(prompts)}
    latents = [
        parts.encode_video(torch.from_numpy(render(scenes[i : i + 32]))).half()
        for i in progress(range(0, count, 32))
    ]
    tensors = {
        "latents": torch.cat(latents),
        "prompt_tokens": torch.stack([ids for ids, _ in prompt_rows]),
        "prompt_lengths": torch.tensor([n for _, n in prompt_rows]),
        "caption_tokens": torch.stack([ids for ids, _ in caption_rows]),
        "context_index": torch.tensor([index[s.prompt] for s in scenes]),
        "contexts": parts.encode_prompts(prompts),
        "null_context": parts.encode_prompts([""])[0],
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, {"info": json.dumps({"scenes": count, "seed": seed})})
