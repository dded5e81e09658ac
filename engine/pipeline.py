"""Pixels and strings in, pixels and strings out: VAE, text encoder and tokenizer around the
sampler.

Legend: B samples, N frames, H,W pixels, C context rows, T text rows.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine import sample, schedule
from engine.config import PipelineConfig, find_few_steps
from engine.errors import UsageError, go_on
from engine.files.hashes import check_hashes
from engine.graphs import Ahead, Graphs, warm_up
from engine.media import TextEncoder
from engine.media.autoencoder import WanVAE
from engine.media.inputs import Prompts, checked_noise, clips_of, noise_source, seeds_of
from engine.media.parts import Parts, find_folder, load_parts
from engine.model import UniViGU
from engine.parallel import Ranks
from engine.planning import memory
from engine.result import SEEN, TENSORS, Clock, Outputs, Result, Watch, results_of
from engine.run import Run, cache_drift, decode_tokens
from engine.weights import load_model, read_codecs, read_transformer
from engine.weights.decoder import read_decoder
from engine.weights.index import Index, sampled_as, take_index
from engine.weights.load import pipeline_sources
from engine.weights.merge import Adaptable, Adapters, running
from engine.weights.place import find_place, moved


class Pipeline(Adaptable, Parts):
    """`from_pretrained`, `generate`, `caption`; and `encode_video`, `decode_video`,
    `encode_prompts` for data work; `load_lora_weights` and what goes with it. Called, it
    generates."""

    def __init__(
        self, model: UniViGU | None, vae: WanVAE, text: TextEncoder, config: PipelineConfig
    ):
        super().__init__(vae, text, config)
        self.kernels, self.cuda_graphs = "auto", False  # as asked of `from_pretrained`
        self.ranks: Ranks | None = None
        self.first = True  # of the ranks: it has the results
        self.index, self.adapters = Index(), Adapters()
        self.turn = threading.RLock()  # of threads, where steps are captured
        self._take(model)

    def _take(self, model: UniViGU | None) -> None:
        """Have this network, for which nothing was compiled or captured yet."""
        self.model, self.ahead = model, None if model is None else Ahead(model)
        captures = self.device.type == "cuda" and self.ranks is None
        self.graphs = Graphs() if captures and self.cuda_graphs is not False else None

    @property
    def transformer(self) -> UniViGU | None:
        """The network; diffusers' name of `model`."""
        return self.model

    @classmethod
    def from_pretrained(
        cls,
        path,
        device=None,
        dtype: torch.dtype | None = None,
        kernels: str = "auto",
        precision: str | None = None,
        transformer_path=None,
        cuda_graphs: bool | None = None,
        offload: str = "none",
        vae_tiling: bool = False,
        world=None,
        torch_dtype: torch.dtype | None = None,
        verify: bool = False,
        vae_dtype: torch.dtype = torch.float32,
        few_steps: bool = False,
    ) -> "Pipeline":
        """Load a pipeline. Nothing is downloaded.

        path: a pipeline folder, or the id of a model in Hugging Face's cache, such as
            "Wan-AI/Wan2.1-T2V-1.3B-Diffusers".
        device: None is the GPU where there is one, else the CPU.
        dtype: of the network and the text encoder; the VAE runs in fp32. None is torch.bfloat16 on
            a GPU, torch.float32 on a CPU.
        kernels: a request to `univigu_kernels.bind`.
        precision: "bf16" (not quantised), "fp8", or None: as in the file.
        transformer_path: another model for the folder's VAE and text encoder.
        cuda_graphs: capture the steps and replay them; None: on a CUDA device.
        offload: "text_encoder" keeps it on the CPU and copies it to the device for encoding alone.
        vae_tiling: the VAE works on 256 x 256 pixels at a time, blended where they meet.
        world: the `engine.parallel.World` whose ranks make every sample together, by its dimensions
            sp and cfg, each on its own device and with the same calls; rank 0 gets the results, the
            others None.
        torch_dtype: another name of dtype.
        verify: compare all bytes with the SHA-256 beside them first, once on each node; files that
            have none are named on stderr. Sizes are always compared.
        vae_dtype: torch.bfloat16 takes half of the VAE's memory, and changes pixels.
        few_steps: take the folder's few_steps/, a model that was distilled from its own.

        Errors: UsageError, ModelFileError, MissingPackage, OutOfMemory."""
        path = find_folder(path)
        if few_steps:
            transformer_path = find_few_steps(path, transformer_path)
        if verify:
            check_hashes(pipeline_sources(path, transformer_path), world and world.on_each_node)
        index = take_index(path, transformer_path is not None)
        device, dtype = find_place(device if world is None else world.device, dtype, torch_dtype)
        if cuda_graphs and (device.type != "cuda" or world is not None):
            where = device if world is None else "several ranks"
            raise UsageError(
                f"pipeline: cuda_graphs must be left out on {where}; got True. Leave it out."
            )

        def job() -> dict:
            cfg, stored = read_transformer(transformer_path or path)
            known = {"dtype": dtype, "precision": precision or stored, "offload": offload}
            return known | {"cfg": cfg, "codecs": read_codecs(path), "device": str(device)}

        with memory.explain_oom(memory.LOADING, job):
            source, once = transformer_path or path, world and world.once
            kinds = dtype, offload, vae_tiling, vae_dtype
            pipe = cls(None, *load_parts(path, device, *kinds, kernels, once))
            model = load_model(source, device, dtype, kernels, precision, pipe.config.case, once)
        pipe.check_model(model.cfg)
        pipe.kernels, pipe.cuda_graphs, pipe.index = kernels, cuda_graphs, index
        pipe.adapters.source, pipe.config = source, sampled_as(pipe.config, transformer_path)
        if world is not None:
            pipe.ranks, pipe.first = Ranks(world, model), world.rank == 0
        pipe._take(model.eval())
        return pipe

    @classmethod
    def without_model(
        cls, path, device="cpu", dtype=torch.float32, offload="none", vae_tiling=False
    ) -> "Pipeline":
        """VAE, text encoder and configuration alone, as `preprocess` needs them."""
        return cls(None, *load_parts(path, device, dtype, offload, vae_tiling))

    def to(self, device=None, dtype: torch.dtype | None = None) -> "Pipeline":
        """Move the pipeline, in place, and choose the kernels again. The VAE keeps its dtype.

        device: None stays where it is. May be a dtype instead, as of torch.nn.Module.to.
        dtype: of the network and the text encoder; None stays.

        Errors: UsageError for a pipeline of several ranks, or one with captured steps.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        captured = self.graphs is not None and len(self.graphs.steps) > 0
        if self.ranks is not None or captured:
            why = "its steps are captured" if captured else "it is one of several ranks"
            raise UsageError(
                f"pipeline: to must be called on one process, before its first run; got {device} "
                f"when {why}. Load it there: Pipeline.from_pretrained(path, device, dtype)."
            )

        device = torch.device(device or self.device)
        dtype = dtype or self.text.encoder.dtype
        model = self.model
        if model is not None:
            model = moved(model, device, dtype, self.kernels, self.config.case)
        self._move(device, dtype, self.kernels)
        self._take(model)
        self.adapters.again(model)
        return self

    def load_decoder(self, path: str | Path) -> None:
        """Decodes by a tiny decoder from now on, taew2_1 of github.com/madebyollin/taehv: coarser
        than the VAE, which still encodes, and far cheaper. It runs in the VAE's dtype.

        path: a .safetensors or .pth file. Errors: ModelFileError."""
        self.decoder = read_decoder(path, self.device, self.vae.dtype)

    def job_of(self, shape: tuple[int, ...], **job) -> dict:
        model = self.model
        known = {} if model is None else {"cfg": model.cfg, "dtype": model.dtype}
        return super().job_of(shape, **known | job)

    def decode_chunks(
        self, latents: Tensor, check: Callable[[], None] = go_on
    ) -> Iterator[np.ndarray]:
        """As `Parts.decode_chunks`; captured steps go first where it would not fit beside them."""
        captures = self.graphs is not None
        if captures and self.decoding_peak(latents.shape) > torch.cuda.mem_get_info(self.device)[0]:
            self.graphs.release()
        return super().decode_chunks(latents, check)

    def warm_up(self, mode: str = "t2v", **settings) -> int:
        """Compiles, in parallel, the kernels that a run of these settings would launch on a CUDA
        device and that were never compiled there: once, because Triton keeps them on disk.
        `generate` and `caption` do the same before their first step. Returns how many kernels that
        were; 0 on a CPU.

        mode: "t2v" or "t2vt" for `generate`, "v2t" for `caption`.
        batch: clips of the run; 1.
        prompt_tokens: of t2v, lengths of prompts, of which multiples of 16 have kernels of their
            own; (20, 32).
        num_frames, height, width, text_rows, guidance_scale, video_cache, num_inference_steps,
            sigmas, timesteps, solver, sampler, text_steps, temperature, commit, progress: as in
            `generate` and `caption`, with their defaults.

        Errors: UsageError."""
        return warm_up(self.ahead, self.config, mode, **settings, records=self.sampling)

    @running
    def generate(
        self,
        prompt: str | list[str] | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        flow_shift: float | None = None,
        seed: int | list[int] = 0,
        mode: str = "t2v",
        negative_prompt: str | list[str] | None = "",
        solver: str | None = None,
        sampler: str = "exact",
        text_rows: int | None = None,
        text_steps: int | None = None,
        temperature: float = 1.0,
        commit: str = "jump",
        callback_on_step_end: Callable | None = None,
        cancel: threading.Event | None = None,
        progress: bool = True,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        num_videos_per_prompt: int = 1,
        callback_on_step_end_tensor_inputs: Sequence[str] = TENSORS,
        sigmas: Sequence[float] | None = None,
        timesteps: Sequence[float] | None = None,
        output_path: str | Path | Sequence[str | Path] | None = None,
    ) -> Result | list[Result] | None:
        """Prompt to video ("t2v") or to video and caption ("t2vt"). One prompt gives a result; a
        list of prompts, or several videos per prompt, a list of results. In t2v the prompt enters
        twice, as context and as clean text rows; the guidance null keeps the rows.

        prompt: may be left out where `prompt_embeds` are given and no text rows hold it: in t2vt,
            or with text_rows=0.
        num_frames, height, width: frames and pixels; None: the folder's own.
        num_inference_steps: evaluations of the network, each of prompt and null where guided. None,
            here and below: what an adapter or the folder's pipeline.json says; else 50.
        guidance_scale: weight of the prompt against its null; at most 1 turns guidance off. None:
            5, where nothing says another.
        flow_shift: more puts more steps at high noise: 3 for 480p, 5 for 720p. None: what the
            folder's scheduler/scheduler_config.json says, else 3.
        seed: one per clip, or one from which clip i takes seed + i. A batch of N draws what N
            singles draw; its products round apart by 1e-7, which moves a pixel in 10^4 by 1.
        mode: "t2v" or "t2vt".
        negative_prompt: what guidance leads away from; one for all prompts, or a list of one each.
        solver: of the video, "unipc", "euler", or "lcm": predict the clean latents and noise them
            again, as some distilled models ask. None: the folder's, else "unipc".
        sampler: of the text, "exact" or "legacy", which repeats the official code.
        text_rows: rows of the text stream; 0 leaves it out of t2v.
        text_steps: of t2vt's text, on its own grid; None: the video's number.
        temperature: of the draw of tokens; 0 takes the most probable.
        commit: "jump" (each token by itself, as the flow says) or "confidence" (the number that
            is due, the surest first, and they stay).
        callback_on_step_end: called as (pipe, step, time, tensors); may return a dict with
            "latents" [B,16,F,Y,X], "tokens" [B,T] or both, to go on with instead. On a GPU the
            steps before this one are done then, and it may still be running.
        cancel: an Event, checked before each layer of the text encoder, after each step and before
            each four frames are decoded; set, it raises Cancelled. On a GPU at most one step runs
            on. Several ranks heed it from the first step on.
        progress: show a bar, of the steps that are done.
        generator: in place of seed. torch.Generator().manual_seed(s) is seed=s; a list of them, a
            list of seeds. From one, several clips draw their noise in turn, as in diffusers. What
            the text draws depends on a generator's initial seed alone.
        latents: [B,16,F,Y,X], the noise to start from, of all clips.
        prompt_embeds, negative_prompt_embeds: [B,C,text_dim], what `encode_prompts` returns.
        num_videos_per_prompt: clips of each prompt, which are neighbours in the list.
        callback_on_step_end_tensor_inputs: the tensors that the callback gets; "committed" too,
            bool [B,T], the tokens that stay with commit="confidence".
        sigmas: in place of num_inference_steps, where the video's steps begin, before flow_shift:
            falling numbers, at most 1 and above 0.
        timesteps: in place of either, the network's own times, 1000 times the shifted sigmas.
        output_path: an .mp4 or .gif, or one for each clip: each clip is decoded by itself and
            written meanwhile, with its sidecar, and Result.frames names the file in place of its
            frames. What fails or is cancelled leaves the file as it was.

        Errors: UsageError, OutOfMemory, NonFinite (step and block named), Cancelled."""
        asked = {"mode": mode, "sampler": sampler, "temperature": temperature, "commit": commit}
        asked |= {"num_inference_steps": num_inference_steps, "flow_shift": flow_shift}
        asked |= {"sigmas": sigmas, "timesteps": timesteps, "guidance_scale": guidance_scale}
        asked |= {"solver": solver, "text_steps": text_steps}
        settings, rows = self._settle(asked, text_rows)
        settings["noise"] = noise_source(generator, latents)
        watch = Watch(progress, callback_on_step_end, callback_on_step_end_tensor_inputs, cancel)
        embeds = prompt_embeds, negative_prompt_embeds
        prompts = Prompts(prompt, negative_prompt, *embeds, num_videos_per_prompt, output_path)
        seeds, generators = seeds_of(seed, generator, len(prompts.texts))
        shape = self.config.shape(num_frames, height, width)

        clock, noise = Clock(), self._noise(latents, shape, seeds, generators)
        run = self._run(clock, watch, self._request(prompts, watch, noise, rows, seeds, settings))
        return self._clips(run, watch, prompts, seeds, clock, settings)

    __call__ = generate

    @running
    def caption(
        self,
        video,
        num_inference_steps: int | None = None,
        video_cache: str | int = "exact",
        seed: int | list[int] = 0,
        sampler: str = "exact",
        text_rows: int | None = None,
        temperature: float = 1.0,
        commit: str = "jump",
        report_drift: bool = False,
        callback_on_step_end: Callable | None = None,
        cancel: threading.Event | None = None,
        progress: bool = True,
    ) -> Result | list[Result] | None:
        """Video to caption, under a condition of zeros. A batch gives a list of results.

        video: a path, of which the first seconds are sampled at the model's frame rate, number of
            frames and size; an `engine.media.StreamedClip` or an excerpt of
            `engine.media.read_clips`, which take others; uint8 frames [N,H,W,3] as they are, or a
            batch [B,N,H,W,3]. A path and a StreamedClip are encoded while the file is decoded.
        num_inference_steps: evaluations of the network. None: the caption_steps that an adapter or
            the folder's pipeline.json says; else 50.
        video_cache: "exact" computes every video row in every step; "frozen" in the first step
            alone, after which text rows attend to the K and V kept from it; a number k in every
            k-th step. The last two are exact for a model with video_sees_text=False and an
            approximation for others.
        seed, sampler, text_rows, temperature, commit, progress: as in `generate`.
        report_drift: run the exact path too; Result.drift then has the share of tokens equal to
            those of exact and jump, and the relative change of the kept K and V by the end.
        callback_on_step_end: as in `generate`; gets latents, tokens and committed.
        cancel: as in `generate`; checked before each four frames are encoded, too.

        Errors: UsageError, ModelFileError (unreadable video), OutOfMemory, NonFinite, Cancelled.
        """
        steps, source = schedule.caption_steps(num_inference_steps, self.sampling)
        choices = "euler", sampler, steps, None, temperature, commit
        rows = self._rows(text_rows, "v2t", ("v2t",), choices)
        refresh_every = schedule.refresh_every(video_cache, steps)
        watch = Watch(progress, callback_on_step_end, SEEN, cancel, "caption")

        clock, clips = Clock(), clips_of(video, self.config)
        seeds, _ = seeds_of(seed, None, clips.shape[0])
        with closing(clips.chunks):
            latents = self.encode_chunks(clips.chunks, clips.shape, watch.encoding(self))
        context = torch.zeros(len(seeds), *self.context_shape, device=self.device)
        tokens = sample.text_source(self.model, rows, seeds)

        plan = schedule.schedule("v2t", steps, 1.0, "euler", sampler)
        how = {"seeds": seeds, "temperature": temperature, "commit": commit}
        request = sample.Request(plan, latents, tokens, context, **how, refresh_every=refresh_every)
        run = self._run(clock, watch, request)
        captions, drift = self._captions(run), None
        if report_drift:
            found, change = run.tokens, run.cache_change()
            exact = replace(request, commit="jump", refresh_every=1)
            exact = self._run(Clock(), replace(watch, callback=None), exact)
            drift = cache_drift(exact.tokens, found, change)
            clock.lap("drift")
        if not self.first:
            return None

        frames, file = clips.taken()
        settings = {"mode": "v2t", "video_cache": video_cache, "sampler": sampler, "commit": commit}
        settings |= file | source | {"num_inference_steps": steps, "temperature": temperature}
        prompts = [None] * len(seeds)
        results = results_of(self, frames, captions, seeds, prompts, clock, settings, drift)
        return results[0] if clips.single else results

    def _settle(self, asked: dict, text_rows: int | None) -> tuple[dict, int]:
        """The settings of `generate`, see `schedule.settle`, and its text rows, all checked."""
        index = self.index
        settings = schedule.settle(asked, self.sampling, index.flow_shift, index.solver)
        choices = schedule.choices(settings)
        return settings, self._rows(text_rows, asked["mode"], ("t2v", "t2vt"), choices)

    def _request(
        self, prompts: Prompts, watch: Watch, latents, rows, seeds, settings
    ) -> sample.Request:
        """What `generate` samples, its prompts encoded. In t2v they are the text rows too; the
        embedding flow takes the tokens' vectors."""
        scale, lengths = settings["guidance_scale"], None
        context, null = prompts.contexts(self, scale > 1, watch.encoding(self))
        if settings["mode"] != "t2v" or rows == 0:
            tokens = sample.text_source(self.model, rows, seeds)
        else:
            tokens, lengths = prompts.rows(self, rows)
            if self.model.cfg.text_flow == "embedding":
                tokens = sample.flow.unit_vectors(self.model.vocab_embed(tokens))

        given = latents, tokens, context, null, scale, lengths, seeds
        how = settings["temperature"], settings["commit"]
        return sample.Request(schedule.settled(settings), *given, *how)

    def _clips(
        self, run, watch: Watch, prompts: Prompts, seeds, clock, settings
    ) -> Result | list[Result] | None:
        """What `generate` returns of a finished run."""
        if not self.first:
            return None

        outputs = Outputs(prompts.paths)
        clips = outputs.decode(self, run.latents, watch, clock), self._captions(run)
        results = outputs.describe(results_of(self, *clips, seeds, prompts.texts, clock, settings))
        return results[0] if prompts.single else results

    def _rows(self, text_rows: int | None, mode: str, modes, choices: tuple) -> int:
        """The number of text rows of a run, whose other choices are checked too."""
        rows = self.config.text_rows if text_rows is None else text_rows
        schedule.check_run(self.model.cfg, mode, modes, rows, *choices)
        return rows

    def _noise(self, latents, shape: tuple[int, ...], seeds, generators) -> Tensor:
        if latents is None:
            return sample.video_noise(shape, seeds, self.device, generators)
        return checked_noise(latents, (len(seeds), *shape)).to(self.device, torch.float32)

    def _run(self, clock: Clock, watch: Watch, request: sample.Request) -> Run:
        """A finished run of inputs that were encoded since the clock began."""
        clock.lap("encode")
        plan = request.schedule
        job = partial(
            self.job_of,
            request.latents.shape,
            mode="v2t" if plan.coefficients is None else "t2vt",
            guided=request.guided,
            steps=len(plan),
            noise_count=plan.noise_count,
            text_rows=request.tokens.shape[1],
            precision=self.model.ops.precision,
        )

        if self.ranks is None and self.ahead(request, watch.progress):
            clock.lap("compile")

        captured = 0 if self.graphs is None else len(self.graphs.reports)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with memory.explain_oom(memory.DENOISING, job):
            run = Run(self.model, request, self.graphs, self.ranks)
            watch.follow(self, run)
        clock.lap("denoise")

        if self.graphs is not None:
            captures = self.graphs.reports[captured:]
            clock.laps["of which capture"] = round(sum(report.seconds for report in captures), 4)
        return run

    def _captions(self, run: Run) -> list[str] | list[None]:
        if not any(run.schedule.text_moves):
            return [None] * len(run.tokens)
        return [self.text.decode_rows(ids) for ids in decode_tokens(self.model, run.tokens)]
