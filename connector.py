"""InstructX (arXiv 2510.08485): learnable queries, the MLP connector, and the four models joined into one editor.

    instruction, pictures ──► Qwen2.5-VL + LoRA ──► hidden states at Q learnable queries ──► MLP ──┐ context
    source ──► Wan VAE ──► latents, added to the noisy ones ──────────────────────────────────────┤
    references ──► Wan VAE ──► latents, appended to the sequence ─────────────────────────────────┴► Wan DiT ──► result

What is unusual, beside other editors built on an MLLM (paper, section 3):
- The connector is two linear layers. MetaQuery needed a 1.6B transformer because its MLLM was frozen; here LoRA lets the MLLM
  form the editing semantics itself, and the connector only changes the width.
- Images and videos have each their own set of queries, so that the two modalities do not have to share features.
- The connector's output takes the place of Wan's T5 embeddings, so Wan's own `text_embedding` still applies to it.

Letters: B batch, T frames, F latent frames = 1 + (T-1)/4, H W pixels, h w = H/8 W/8, L prompt tokens, Q queries, D MLLM width.

    python connector.py [FOLDER]     # what a weights folder holds, and how one edit flows through it, with shapes
"""

import argparse
import contextlib
import ctypes
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from threading import Thread

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from dit import WanDiT
from mllm import Processor, Qwen2_5_VL, add_lora, load_lora, lora_state_dict
from sampler import FlowSampler, guided
from vae import WanVAE

SYSTEM_PROMPT = "Describe what the edited picture should look like, following the instruction."  # we chose: the paper has none


@dataclass
class InstructXConfig:
    """The released sizes as defaults. "paper" marks what section 3 states, "ours" what it leaves open."""

    mllm_dim: int = 2048        # width of Qwen2.5-VL-3B
    hidden_dim: int = 4096      # ours
    context_dim: int = 4096     # width of the T5 embeddings which the context replaces
    image_queries: int = 256    # paper
    video_queries: int = 512    # paper
    mllm_frames: int = 13       # paper: frames of a clip that the MLLM sees
    text_embedding: bool = True  # False: the connector writes the DiT's own width, and `text_embedding` is left out
    lora_rank: int = 64         # ours; 0 leaves the MLLM as it was released
    lora_alpha: float = 64.0    # ours
    steps: int = 50             # the rest is ours: how an edit is sampled unless the caller says otherwise
    guidance: float = 5.0
    shift: float = 5.0

    @classmethod
    def from_file(cls, file):
        """Reads config.json. Raises ValueError for a key that no field has, or a value that is no number."""
        values = read_json(file)
        values.pop("_class_name", None)
        odd = sorted(set(values) - {field.name for field in fields(cls)})
        if odd:
            raise ValueError(f"{file}: unknown settings {odd}; known are {[field.name for field in fields(cls)]}")
        odd = sorted(name for name, value in values.items() if not isinstance(value, (int, float)))
        if odd:
            raise ValueError(f"{file}: {odd} should be numbers, or true or false")
        return cls(**values)


class Connector(nn.Module):
    """Two sets of learnable queries and the two-layer MLP (paper, section 3.2)."""

    def __init__(self, config):
        super().__init__()
        self.image_queries = nn.Parameter(torch.empty(config.image_queries, config.mllm_dim))
        self.video_queries = nn.Parameter(torch.empty(config.video_queries, config.mllm_dim))
        self.mlp = nn.Sequential(
            nn.Linear(config.mllm_dim, config.hidden_dim),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.hidden_dim, config.context_dim),
        )
        for queries in (self.image_queries, self.video_queries):
            if not queries.is_meta:     # there is nothing to fill, and normal_ would import torch's compiler
                nn.init.normal_(queries, std=0.02)

    def queries(self, is_video):
        """(Q, D): what the MLLM is given after the last token of the prompt."""
        return self.video_queries if is_video else self.image_queries

    def forward(self, features):
        """(B, Q, D) hidden states at the queries, of any float dtype -> (B, Q, context_dim) in the connector's own."""
        return self.mlp(features.to(self.image_queries.dtype))


def trim_heap():
    """glibc keeps what is freed in pieces below 32 MB, gigabytes after both towers of the MLLM: the system gets it back."""
    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", lambda keep: None)(0)


class Offload:
    """Walks through the blocks of a model whose weights stay in their files: each has them only while it works.

    `read(i)` -> {name: tensor} of block i, where they are needed. A thread reads one block ahead, so two are in memory.
    """

    def __init__(self, blocks, read, device="cpu"):
        self.blocks, self.read, self.device = blocks, read, torch.device(device)
        # One for all reads: what a stream's copies were in can only be used again by copies of the same stream.
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def __iter__(self):
        with ThreadPoolExecutor(1) as reader:
            coming = reader.submit(self.fetch, 0)
            for i, block in enumerate(self.blocks):
                weights = coming.result()
                if i + 1 < len(self.blocks):
                    coming = reader.submit(self.fetch, i + 1)
                block.load_state_dict(weights, strict=False, assign=True)   # not strict: LoRA stays where it is
                yield block
                if self.stream:
                    torch.cuda.current_stream(self.device).synchronize()    # else the next copy could overwrite what is in use
                nowhere = {name: weight.to("meta") for name, weight in weights.items()}
                block.load_state_dict(nowhere, strict=False, assign=True)
                del weights
                trim_heap()

    def fetch(self, i):
        """read(i), on a GPU beside its work: on the one stream that threads share, a copy would wait for it."""
        if self.stream is None:
            return self.read(i)
        with torch.cuda.stream(self.stream):
            weights = self.read(i)
        self.stream.synchronize()
        return weights


class InstructX(nn.Module):
    """One model that edits images and videos from an instruction.

    Holds the four models as `mllm`, `connector`, `dit` and `vae`, and the MLLM's `processor`. `trained` is False where a folder
    holds only the official Qwen2.5-VL and Wan2.1: queries and connector are then random, and no edit follows its instruction.
    """

    def __init__(self, config, mllm, processor, connector, dit, vae, trained=True):
        super().__init__()
        self.config, self.processor, self.trained = config, processor, trained
        self.mllm, self.connector, self.dit, self.vae = mllm, connector, dit, vae

    def context(self, inputs, is_video):
        """What the DiT reads instead of T5 embeddings. `inputs`: what the processor (or its `collate`) returns, B prompts."""
        queries = self.connector.queries(is_video)                  # (Q, D)
        hidden = self.mllm(**inputs, queries=queries)               # (B, L+Q, D)
        features = hidden[:, -len(queries):]                        # (B, Q, D)     only the queries leave the MLLM
        return self.connector(features)                             # (B, Q, 4096)

    def prompt(self, frames, instruction, references=(), fps=16.0):
        """The MLLM's view of one edit: frames uint8 (T, H, W, 3) at `fps`, references a list of uint8 (H, W, 3) -> dict of tensors.

        A single frame is shown as an image, a clip as at most `mllm_frames` frames spread evenly, first and last included.
        """
        if len(frames) == 1:
            return self.processor(instruction, image=frames[0], references=references, system=SYSTEM_PROMPT)
        shown = spread(len(frames), self.config.mllm_frames)
        rate = fps * (len(shown) - 1) / (len(frames) - 1)           # the MLLM's frame times are in seconds
        return self.processor(instruction, video=frames[shown], references=references, system=SYSTEM_PROMPT, fps=rate)

    def multiple(self):
        """Sides of a picture have to be multiples of this many pixels: VAE stride times DiT patch (16 as released)."""
        return self.vae.spatial_stride * self.dit.config.patch_size[1]

    def encode(self, frames):
        """uint8 (T, H, W, 3) -> latents (1, 16, F, h, w). Sides and length are padded by repeating the last row, column, frame."""
        parameter = next(self.vae.parameters())
        video = torch.from_numpy(pad(frames, self.multiple(), self.vae.temporal_stride))            # (T, H, W, 3)
        video = video.to(parameter.device).permute(3, 0, 1, 2)[None].to(parameter.dtype)            # (1, 3, T, H, W)
        return self.vae.encode(video.div_(127.5).sub_(1))   # in place: of a clip a copy takes gigabytes

    def decode(self, z, shape):
        """Latents (1, 16, F, h, w) -> uint8 frames of `shape` (T, H, W, 3), a piece of the clip at a time; padding is cut off."""
        done, (length, height, width, _) = 0, shape
        for video in self.vae.decode_stream(z.to(next(self.vae.parameters()).dtype)):               # (1, 3, t, H, W)
            piece = video[0, :, :length - done, :height, :width].float()
            done += piece.shape[1]
            if piece.shape[1]:
                yield ((piece + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 3, 0).cpu().numpy()

    @torch.inference_mode()
    def edit(self, frames, instruction, references=(), steps=None, guidance=None, shift=None, seed=0, fps=16.0,
             solver="unipc", progress=None, write=None):
        """Edits one image or clip.

        Args:
            frames: uint8 (T, H, W, 3); T = 1 is an image. Any size: padding is added and taken off again, so the result
                lies on the source pixel for pixel.
            instruction: what to do.
            references: uint8 (H, W, 3) each, of any size; those larger than the source are scaled down to its area.
            steps, guidance, shift: of the sampler; None takes what the checkpoint's config says (50, 5.0, 5.0 as released).
                Guidance 1 runs without the unconditional branch: half the work.
            seed: of the noise, drawn on the CPU so that devices agree.
            fps: frame rate of `frames`, which tells the MLLM how fast things move.
            progress: called as progress(phase, done, total) for the phases "understand", "encode", "denoise", "decode".
            write: called with pieces of the result, uint8 (t, H, W, 3), as they are decoded; nothing is returned then.

        Returns: uint8 array of the shape of `frames`. Raises ValueError for arguments that make no edit.
        """
        steps, guidance, shift = (getattr(self.config, name) if value is None else value
                                  for name, value in (("steps", steps), ("guidance", guidance), ("shift", shift)))
        frames, references = check_frames(frames), [check_frames(np.asarray(image)[None])[0] for image in references]
        if not np.isfinite(guidance) or guidance < 1:
            raise ValueError(f"guidance {guidance} is not a number of 1 or more; 1 follows the instruction without amplifying it")
        sampler = FlowSampler(steps, shift, solver)
        report = progress or (lambda phase, done, total: None)
        device, dtype = self.dit.patch_embedding.weight.device, self.dit.patch_embedding.weight.dtype
        references = [shrink(image, frames.shape[1] * frames.shape[2]) for image in references]

        report("understand", 0, 1)
        # The unconditional branch sees the same pictures with an empty instruction, so guidance amplifies the words alone.
        wanted = [instruction] if guidance == 1 else [instruction, ""]
        inputs = self.processor.collate([self.prompt(frames, words, references, fps) for words in wanted], same_pictures=True)
        context = self.context(inputs, len(frames) > 1)                                             # (1 or 2, Q, 4096)
        report("understand", 1, 1)

        report("encode", 0, 1 + len(references))
        source = self.encode(frames).to(dtype)                                                      # (1, 16, F, h, w)
        report("encode", 1, 1 + len(references))
        latents = []
        for image in references:
            latents.append(self.encode(image[None]).to(dtype))                                      # (1, 16, 1, h', w')
            report("encode", 1 + len(latents), 1 + len(references))

        report("denoise", 0, steps)
        noise = torch.randn(source.shape, generator=torch.Generator().manual_seed(seed)).to(device)  # (1, 16, F, h, w)
        shape = (len(wanted), *noise.shape[1:])
        timesteps = 1000 * sampler.sigmas()[:-1]
        condition = self.dit.condition(context.to(dtype), shape, source, latents, timesteps)        # what no step changes
        velocity = guided(lambda z, t: self.dit.denoise(z.to(dtype), t, condition).float(), guidance)
        z = sampler.sample(velocity, noise, progress=lambda done: report("denoise", done, steps))
        del condition                                               # up to gigabytes, which the VAE can use

        report("decode", 0, len(frames))
        result, done = [], 0
        for piece in self.decode(z, frames.shape):
            write(piece) if write else result.append(piece)
            done += len(piece)
            report("decode", done, len(frames))
        return None if write else np.concatenate(result)

    @classmethod
    def from_pretrained(cls, folder, device="cpu", dtype=None, instructx=None, offload=False, quantize=None, group=None,
                        **settings):
        """Everything an edit needs, from one folder (layout: weights/README.md).

        `dtype` is that of the MLLM, the connector and the DiT; None keeps each file's own. The VAE always keeps its own, which is
        float32 as released: it is small, and its rounding errors would be seen. `instructx`: a folder that save_pretrained wrote,
        to be used instead of the one in `folder`. `offload` leaves the blocks of MLLM and DiT in their files and reads each when it
        is its turn: the same result with a small part of the memory. `quantize`: torch.int8 or torch.float8_e4m3fn, to which the
        matrices of the DiT's blocks are rounded; the result changes. `group`: of processes (torch.distributed) that share out the
        DiT, its weights and its tokens. `settings` take the place of those in config.json, or of a fresh start.

        Raises FileNotFoundError where a model is missing, ValueError where a checkpoint does not fit.
        """
        if quantize and group:
            raise ValueError("a DiT that is shared out cannot be quantized too")
        place = locate(folder, instructx)
        if not offload:
            Thread(target=read_ahead, args=(place.values(),), daemon=True).start()
        streamed = partial(Offload, device=device)
        mllm = Qwen2_5_VL.from_pretrained(place["mllm"], device, dtype, streamed if offload else None)
        dit = WanDiT.from_pretrained(place["dit"], device, dtype, streamed if offload or quantize or group else None)
        vae = WanVAE.from_pretrained(place["vae"], device)
        processor = Processor.from_pretrained(place["mllm"])
        if "instructx" in place:
            config = replace(InstructXConfig.from_file(place["instructx"] / "config.json"), **settings)
            with torch.device("meta"):
                connector = Connector(config)
            model = cls(config, mllm, processor, connector, dit, vae)
            model.load(place["instructx"] / "model.safetensors", device, dtype)
        else:
            model = cls.untrained(mllm, processor, dit, vae, **settings)
        if quantize:
            model.dit.quantize(quantize)
        if group:
            model.dit.parallelize(group, device)
        return model.eval()

    @classmethod
    def untrained(cls, mllm, processor, dit, vae, config=None, **settings):
        """Joins released models with fresh queries, connector and LoRA: where stage 1 starts. The same weights every time.

        Without a config the widths are those of the models, and the rest as released but for `settings`.
        """
        width = dit.config.text_dim or dit.config.dim
        config = config or InstructXConfig(**{"mllm_dim": mllm.config.hidden_size, "hidden_dim": width, "context_dim": width,
                                              "text_embedding": bool(dit.config.text_dim)} | settings)
        weight = dit.patch_embedding.weight
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            connector = Connector(config).to(weight.device, weight.dtype)
            if config.lora_rank:
                add_lora(mllm, config.lora_rank, config.lora_alpha)
        if not config.text_embedding:
            dit.text_embedding = nn.Identity()
        return cls(config, mllm, processor, connector, dit, vae, trained=False)

    def load(self, file, device="cpu", dtype=None):
        """Fills connector, LoRA and source embedding from our own checkpoint. Strict: ValueError names what is odd."""
        if self.config.lora_rank:
            add_lora(self.mllm, self.config.lora_rank, self.config.lora_alpha)
        if not self.config.text_embedding:
            self.dit.text_embedding = nn.Identity()
        try:
            with safe_open(file, "pt", device=str(device)) as stored:
                tensors = {name: stored.get_tensor(name).to(dtype=dtype) for name in stored.keys()}
        except Exception as error:                                  # safetensors has its own error type, which is not public
            raise ValueError(f"{file}: not a readable safetensors file ({error})") from None
        if "source_embedding.weight" in tensors:
            self.dit.add_source_embedding()
        own = self.own_tensors()
        problems = [f"missing {name}" for name in own if name not in tensors]
        problems += [f"unexpected {name}" for name in tensors if name not in own]
        problems += [f"{name} is {tuple(tensors[name].shape)}, should be {tuple(own[name].shape)}"
                     for name in own if name in tensors and tensors[name].shape != own[name].shape]
        if problems:
            raise ValueError(f"{file} does not fit its config.json: {'; '.join(problems[:5])} ({len(problems)} in all)")
        parts = {name.removeprefix("connector."): value for name, value in tensors.items() if name.startswith("connector.")}
        self.connector.load_state_dict(parts, assign=True)
        if self.config.lora_rank:
            load_lora(self.mllm, {name: value for name, value in tensors.items() if name.startswith("base_model.")})
        if "source_embedding.weight" in tensors:
            self.dit.source_embedding.weight = nn.Parameter(tensors["source_embedding.weight"])

    def own_tensors(self):
        """{name: tensor} of what InstructX adds to the released models: connector, LoRA (PEFT's names), source embedding."""
        tensors = {f"connector.{name}": value for name, value in self.connector.state_dict().items()}
        tensors |= lora_state_dict(self.mllm) if self.config.lora_rank else {}
        if self.dit.source_embedding is not None and not self.dit.config.source_embedding:
            tensors["source_embedding.weight"] = self.dit.source_embedding.weight
        return tensors

    def save_pretrained(self, folder, dit=False, mllm=False, dtype=None):
        """Writes the folder `instructx` of a weights folder: config.json, model.safetensors and, if told so, the trained DiT or MLLM.

        A DiT saved here (with its source embedding) and an MLLM (which must not have LoRA) are used instead of the released ones
        beside it. Files appear whole or not at all.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if mllm:
            self.mllm.save_pretrained(folder / "mllm")
            self.processor.save_pretrained(folder / "mllm")
        if dit:
            self.dit.config.source_embedding = self.dit.source_embedding is not None
            self.dit.save_pretrained(folder / "dit", dtype=dtype)
        tensors = {name: value.detach().to("cpu", dtype).contiguous() for name, value in self.own_tensors().items()}
        save_file(tensors, folder / "model.safetensors.partial", metadata={"format": "pt"})
        os.replace(folder / "model.safetensors.partial", folder / "model.safetensors")
        settings = {"_class_name": "InstructX", **asdict(self.config)}
        (folder / "config.json.partial").write_text(json.dumps(settings, indent=2) + "\n")
        os.replace(folder / "config.json.partial", folder / "config.json")


def spread(length, count):
    """Indices of at most `count` of `length` frames, spread evenly, first and last included."""
    return np.linspace(0, length - 1, min(length, count)).round().astype(int)


def check_frames(frames):
    """The frames as a contiguous array. Raises ValueError unless they are uint8 (T, H, W, 3) with at least one pixel."""
    frames = np.ascontiguousarray(frames)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(f"frames are {frames.dtype} {frames.shape}; they should be uint8 (frames, height, width, 3)")
    return frames


def pad(frames, multiple, stride):
    """Repeats the last row and column up to a multiple, and the last frame up to 1 + n * stride frames."""
    length, height, width, _ = frames.shape
    extra = ((0, (1 - length) % stride), (0, -height % multiple), (0, -width % multiple), (0, 0))
    return np.pad(frames, extra, mode="edge")


def shrink(image, area):
    """Scales a picture down to at most `area` pixels: a reference costs as many tokens as the source has in one frame."""
    height, width, _ = image.shape
    scale = (area / (height * width)) ** 0.5
    if scale >= 1:
        return image
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))


def read_ahead(paths):
    """Has the system read the weights at `paths` into free memory, in this order, while models load and work.

    Files are mapped, so without this what lies on a disk is read where it is first touched, in the middle of an edit. Nothing
    is read if not all of it fits into memory, or the last would push out the first.
    """
    if not hasattr(os, "posix_fadvise"):                            # macOS, Windows
        return
    files = [file for path in paths for file in ([path] if path.is_file() else sorted(path.glob("*")))
             if file.suffix in (".safetensors", ".pth", ".bin")]
    with contextlib.suppress(OSError):                              # whoever loads the file says what is wrong with it
        if sum(file.stat().st_size for file in files) < 0.8 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
            for file in files:
                with open(file, "rb") as stream:
                    for start in range(0, file.stat().st_size, 1 << 17):        # what one call asks beyond that, Linux ignores
                        os.posix_fadvise(stream.fileno(), start, 1 << 17, os.POSIX_FADV_WILLNEED)


def read_json(file):
    """The object in a JSON file. Raises ValueError that names the file, FileNotFoundError."""
    try:
        values = json.loads(Path(file).read_text())
    except ValueError as error:
        raise ValueError(f"{file} is damaged, or no JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file} should hold a JSON object, not a {type(values).__name__}")
    return values


def locate(folder, instructx=None):
    """Where each model lies: {"mllm", "dit", "vae" and, once trained, "instructx": path}. `instructx`: a folder to use as such.

    A folder of that name, or of any name: the released folders are told by their config.json, and the VAE also by the file
    Wan2.1_VAE.pth. So the official downloads can be dropped side by side into one folder as they are.
    Raises FileNotFoundError for what is missing, ValueError for what is there twice.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; it should hold mllm/, dit/, vae/ and instructx/ (see weights/README.md)")
    place = {name: folder / name for name in ("mllm", "dit", "vae", "instructx") if (folder / name).is_dir()}
    kinds = {"Qwen2_5_VLForConditionalGeneration": "mllm", "qwen2_5_vl": "mllm", "WanModel": "dit",
             "WanTransformer3DModel": "dit", "AutoencoderKLWan": "vae", "InstructX": "instructx"}
    found = {}
    for file in sorted([*folder.glob("*/config.json"), *folder.glob("*/*/config.json")]):
        config = read_json(file)
        kind = kinds.get(config.get("_class_name", config.get("model_type")))
        if kind and file.parent.parent.name != "instructx":
            found.setdefault(kind, []).append(file.parent)
    found.setdefault("vae", sorted([*folder.glob("Wan2.1_VAE.*"), *folder.glob("*/Wan2.1_VAE.*")]))
    for kind, paths in found.items():
        if kind not in place and len(paths) > 1:
            raise ValueError(f"{folder} holds more than one {kind}: {', '.join(map(str, paths))}; leave one, or name it {kind}/")
        if paths:
            place.setdefault(kind, paths[0])
    if instructx is not None:
        place["instructx"] = Path(instructx)
        if not (place["instructx"] / "config.json").is_file():
            raise FileNotFoundError(f"{instructx} is no folder that training wrote: there is no config.json in it")
    for name in ("mllm", "dit"):                                    # a DiT is trained from stage 2 on
        if "instructx" in place and (place["instructx"] / name).is_dir():
            place[name] = place["instructx"] / name
    for kind, what in (("mllm", "Qwen2.5-VL"), ("dit", "the Wan2.1 DiT"), ("vae", "the Wan2.1 VAE")):
        if kind not in place:
            raise FileNotFoundError(f"{folder} holds no {kind}/ with {what} (see weights/README.md for the layout)")
    return place


def show(folder):
    """Prints what is in a weights folder, and the shapes of an edit of an image and of a clip."""
    model = InstructX.from_pretrained(folder)
    for name in ("mllm", "connector", "dit", "vae"):
        module = getattr(model, name)
        print(f"{name:10} {sum(p.numel() for p in module.parameters()) / 1e6:9.2f} M parameters   {next(module.parameters()).dtype}")
    size = 4 * model.multiple()
    for length in (1, 1 + 2 * model.vae.temporal_stride):
        frames = np.zeros((length, size, size, 3), np.uint8)
        inputs, source = model.prompt(frames, "make it night"), model.encode(frames)
        context = model.context(inputs, is_video=length > 1)
        print(f"\nframes {frames.shape} -> latents {tuple(source.shape)}")
        print(f"prompt {tuple(inputs['input_ids'].shape)} -> context {tuple(context.shape)}")
        t = torch.full((1,), 500.0)
        print(f"velocity {tuple(model.dit(torch.randn_like(source), t, context, source=source).shape)}")


def main():
    """Prints what a weights folder holds; ends with code 2 after one line of what is wrong with it."""
    parser = argparse.ArgumentParser(description="What a weights folder holds, and the shapes of one edit.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    shapes = Path(__file__).resolve().parent / "weights" / "shapes"
    parser.add_argument("folder", nargs="?", default=shapes, help="a weights folder")
    args = parser.parse_args()
    try:
        with torch.inference_mode():
            show(args.folder)
    except (ValueError, OSError) as error:
        parser.exit(2, f"connector.py: {error}\n")


if __name__ == "__main__":
    main()
