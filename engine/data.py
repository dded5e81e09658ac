"""Latent shards and the stateful order in which training reads them.

A shard holds what training needs and nothing that a step would compute twice: normalised latents,
token ids of prompt and caption, and each distinct prompt's context once; its metadata says which
VAE, text encoder and tokenizer made it. Legend: N clips, U distinct prompts, C context rows, T text
rows.
"""

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from engine.config import PipelineConfig, read_pipeline_config
from engine.errors import ModelFileError, UsageError

FORMAT_VERSION = 1
TENSORS = (
    "latents", "prompt_tokens", "prompt_lengths", "caption_tokens",
    "context_index", "contexts", "null_context",
)  # fmt: skip


class LatentSet:
    """A shard in memory. `batch(indices)` -> dict of latents fp32 [B,16,F,Y,X] (normalised),
    context [B,C,E], null_context [C,E] (the encoded empty string), prompt_tokens and caption_tokens
    [B,T], prompt_lengths [B]. `info`: what `write_shard` says of the shard."""

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
        known = isinstance(self.info, dict)
        if not known or self.info.get("format_version", FORMAT_VERSION) != FORMAT_VERSION:
            raise ModelFileError(
                f"data: {path} must have format version {FORMAT_VERSION}; got "
                f"{str(self.info)[:80]}. Run univigu preprocess again."
            )

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


def batch_indices(
    count: int, batch: int, step: int, seed: int, rank: int = 0, world: int = 1
) -> Tensor:
    """A rank's clips of one step: without replacement within an epoch, a new order each epoch, last
    partial batch dropped. A pure function of (step, seed), so resuming needs no other state; the
    ranks' shares in order are the global `batch` of one process. -> int64 [batch / world]."""
    if batch > count:
        raise UsageError(
            f"train: batch_size must be at most the {count} clips of the set; got {batch}."
        )
    if batch % world or not 0 <= rank < world:
        raise UsageError(
            f"train: batch_size must be a multiple of the {world} processes, and rank below them; "
            f"got {batch} and rank {rank}. Change --batch-size."
        )
    epoch, at = divmod(step, count // batch)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    return order[at * batch : (at + 1) * batch].chunk(world)[rank]


def fingerprint(folder: str | Path) -> dict[str, str | int]:
    """What of a pipeline folder decides a shard's content: the SHA-256 of each part's weights and
    configuration, and two settings of pipeline.json. Errors: ModelFileError."""
    folder = Path(folder)
    config = read_pipeline_config(folder)
    facts: dict[str, str | int] = {
        "latent_space": config.latent_space,
        "context_rows": config.context_rows,
    }
    for part in ("vae", "text_encoder", "tokenizer"):
        suffixes = {".json", ".safetensors", ".model", ".txt"}
        files = sorted(path for path in (folder / part).glob("*") if path.suffix in suffixes)
        if not files:
            raise ModelFileError(
                f"data: {folder} must hold {part}; got none. Give a whole pipeline folder."
            )
        digest = hashlib.sha256()
        for path in files:
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(f"{content} {path.name}\n".encode())
        facts[part] = digest.hexdigest()
    return facts


def write_shard(
    parts,
    made_with: dict,
    path: str | Path,
    latents: list[Tensor],
    texts: list[tuple[str, str]],
    config: PipelineConfig,
    source: dict,
) -> None:
    """Encodes the (prompt, caption) pairs with a pipeline's text encoder and writes them beside
    their latents fp16 [n,16,F,Y,X], complete or not at all.

    made_with: the `fingerprint` of the pipeline's folder; config: size, rate and text rows of the
    clips; source: where they come from. Errors: UsageError (text too long), ModelFileError."""
    prompt_rows = [parts.text.encode_rows(prompt, config.text_rows) for prompt, _ in texts]
    caption_rows = [parts.text.encode_rows(caption, config.text_rows) for _, caption in texts]
    prompts = sorted({prompt for prompt, _ in texts})
    index = {prompt: i for i, prompt in enumerate(prompts)}
    # 256 at a time, for the encoder's activations grow with the batch.
    chunks = [prompts[i : i + 256] for i in range(0, len(prompts), 256)]
    tensors = {
        "latents": torch.cat(latents),
        "prompt_tokens": torch.stack([ids for ids, _ in prompt_rows]),
        "prompt_lengths": torch.tensor([n for _, n in prompt_rows]),
        "caption_tokens": torch.stack([ids for ids, _ in caption_rows]),
        "context_index": torch.tensor([index[prompt] for prompt, _ in texts]),
        "contexts": torch.cat([parts.encode_prompts(chunk) for chunk in chunks]),
        "null_context": parts.encode_prompts([""])[0],
    }
    size = {name: getattr(config, name) for name in ("num_frames", "height", "width", "fps")}
    info = {"format_version": FORMAT_VERSION, "made_with": made_with, "count": len(texts)}
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, {"info": json.dumps(info | size | {"source": source})})
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise ModelFileError(
            f"data: {path} must be writable; got {error}. Check space and permissions."
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def preprocess_scenes(
    parts, made_with: dict, path: str | Path, count: int, seed: int, text_rows: int, progress=iter
) -> None:
    """Renders `count` training scenes, encodes them with a pipeline's VAE and text encoder, writes
    one shard. made_with: the `fingerprint` of the pipeline's folder."""
    from engine.scenes import FPS, FRAMES, SIZE, draw_scenes, render

    scenes = draw_scenes(count, seed, held_out=False)
    latents = [
        parts.encode_video(torch.from_numpy(render(scenes[i : i + 32]))).half()
        for i in progress(range(0, count, 32))
    ]
    texts = [(scene.prompt, scene.caption) for scene in scenes]
    config = PipelineConfig(
        text_rows=text_rows, num_frames=FRAMES, height=SIZE, width=SIZE, fps=FPS
    )
    write_shard(parts, made_with, path, latents, texts, config, {"scenes": count, "seed": seed})
