"""InstructX (arXiv 2510.08485): learnable queries, the MLP connector, four models as one editor.

    instruction, pictures ─► Qwen2.5-VL + LoRA ─► hidden states at Q queries ─► MLP ─┐ context
    source ─► Wan VAE ─► latents, added to the noisy ones ───────────────────────────┤
    references ─► Wan VAE ─► latents, appended to the sequence ──────────────────────┴─► Wan DiT

What is unusual, compared with other editors built on a multimodal LLM (paper, section 3.2):
- The connector is two linear layers. MetaQuery needed a 1.6B transformer because its MLLM was
  frozen. Here LoRA lets the MLLM form the editing semantics, so the connector only maps hidden
  states to the width of the DiT's context.
- Images and videos have separate queries, so the two modalities need not share features.
- The connector's output replaces Wan's T5 embeddings. It still passes through Wan's own
  `text_embedding`.

Letters: B batch, T frames, F latent frames = 1 + (T-1)/4, H W pixels, h w = H/8 W/8 (of the small
model that ships 1 + (T-1)/2 and H/4 W/4), L prompt tokens, Q queries, D width of the MLLM.

    python connector.py [FOLDER]     # contents of a weights folder, and shapes of an edit
"""

import argparse
import contextlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

import dit as dit_module
import mllm as mllm_module
import vae as vae_module
from dit import PatchEmbedding, WanDiT, read_json
from mllm import Processor, Qwen2_5_VL, add_lora, load_lora, lora_state_dict, to_pil
from sampler import FlowSampler, guided
from vae import WanVAE, to_frames, to_video

# Ours: Fig. 2 of the paper shows a system prompt without its words.
SYSTEM_PROMPT = "Describe what the edited picture should look like, following the instruction."


@dataclass
class InstructXConfig:
    """Defaults fit Qwen2.5-VL-3B and Wan2.1. "paper": from section 3.2. The rest is our choice."""

    mllm_dim: int = 2048  # width of Qwen2.5-VL-3B
    hidden_dim: int = 4096
    context_dim: int = 4096  # width of the T5 embeddings that the context replaces
    image_queries: int = 256  # paper
    video_queries: int = 512  # paper
    mllm_frames: int = 13  # paper: of a clip the MLLM sees at most this many frames
    frame_pixels: int = 602112  # the MLLM sees larger frames scaled down, as in Qwen's pipeline
    system_prompt: str = SYSTEM_PROMPT
    text_embedding: bool = True  # False: the connector writes the DiT's own width
    lora_rank: int = 64  # 0: no LoRA
    lora_alpha: float = 64.0
    steps: int = 50  # these four are sampling defaults
    guidance: float = 5.0
    shift: float = 5.0
    solver: str = "unipc"
    area: int = 0  # pixels; edit.py scales larger inputs down to this first; 0: any size
    max_references: int = 99

    # Differences in Kiwi-Edit, whose weights are public.
    source_first: bool = False  # source before instruction; the queries end the user's turn
    reference_queries: int = 0  # queries for edits with a reference; it gets its own MLP
    reference_words: str = ""  # appended to the instruction if there is a reference
    reference_pixels: int = 0  # the MLLM sees larger references scaled down to this
    reference_padded: bool = False  # the DiT sees references padded to the source's size with white
    frame_resizes: tuple = ()  # see Processor.__call__
    mllm_fps: float = 0.0  # frame rate in the MLLM's positions; 0: the clip's own


class Connector(nn.Module):
    """Two sets of learnable queries and the two-layer MLP (paper, section 3.2).

    Kiwi-Edit has a third set, and a second MLP for the hidden states at a reference's tokens.
    """

    def __init__(self, config):
        super().__init__()
        D = config.mllm_dim
        self.image_queries = nn.Parameter(torch.empty(config.image_queries, D))
        self.video_queries = nn.Parameter(torch.empty(config.video_queries, D))
        self.mlp = self.make_mlp(config)
        self.reference_queries = self.reference_mlp = None
        if config.reference_queries:
            self.reference_queries = nn.Parameter(torch.empty(config.reference_queries, D))
            self.reference_mlp = self.make_mlp(config)

    def make_mlp(self, config):
        return nn.Sequential(
            nn.Linear(config.mllm_dim, config.hidden_dim),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.hidden_dim, config.context_dim),
        )

    def initialize(self):
        """Initial weights of stage 1: queries from N(0, 0.02), the MLP from PyTorch's defaults."""
        for queries in self.parameters(recurse=False):
            nn.init.normal_(queries, std=0.02)
        return self

    def queries(self, is_video, has_reference=False):
        """(Q, D) inputs of the MLLM, in the place of its answer (Kiwi-Edit: in the user's turn)."""
        if has_reference:
            return self.reference_queries
        return self.video_queries if is_video else self.image_queries

    def forward(self, features):
        """Hidden states at the queries (B, Q, D) -> (B, Q, context_dim), in the MLP's dtype."""
        return self.mlp(features.to(self.image_queries.dtype))

    def reference(self, states):
        """Hidden states at a reference's tokens (B, R, D) -> (B, R, context_dim)."""
        return self.reference_mlp(states.to(self.image_queries.dtype))


class InstructX(nn.Module):
    """One model that edits images and videos from an instruction.

    `trained` is False if the folder holds only the official Qwen2.5-VL and Wan2.1. Queries and
    connector are then random, and edits do not follow their instructions.
    """

    def __init__(self, config, mllm, processor, connector, dit, vae, trained=True):
        super().__init__()
        self.config, self.processor, self.trained = config, processor, trained
        self.mllm, self.connector, self.dit, self.vae = mllm, connector, dit, vae
        if not config.text_embedding:
            self.dit.remove_text_embedding()

    @torch.inference_mode()
    def edit(
        self,
        frames,
        instruction,
        references=(),
        steps=None,
        guidance=None,
        seed=0,
        fps=16.0,
        progress=None,
        write=None,
        start=None,
        watch=None,
    ):
        """Edits one image or clip.

        Args:
            frames: a PIL image, or uint8 (T, H, W, 3); T = 1 is an image. Any size is allowed.
                Padding goes to the right, the bottom and the end, and is cropped from the result.
                The source is never resized, so it and the result align pixel for pixel.
            instruction: the edit in words.
            references: PIL images or uint8 (H, W, 3), of any size. References larger than the
                source are scaled down to its area.
            steps, guidance: None takes the values of the checkpoint's config (by default 50 and
                5.0). Guidance 1 skips the unconditional branch and takes half the time.
            seed: seed of the noise. The noise is drawn on the CPU, so all devices start alike.
            fps: frame rate of `frames`. The MLLM's positions in time depend on it.
            progress: called as progress(phase, done, total) for the phases "understand", "encode",
                "denoise" and "decode".
            write: called with pieces of the result, uint8 (t, H, W, 3), as they are decoded. The
                method then returns None.
            start: uint8 (t, H, W, 3), the first frames of the result where they are known, as in
                a window of a longer clip. The rest goes on from them. t is 1 + a multiple of the
                VAE's stride in time, 4 at full size.
            watch: called in each step with the result as the model then expects it: latents
                (1, 16, F, h, w), for `decode`.

        Returns an image for an image, an array for an array. Raises ValueError for unusable
        arguments, FloatingPointError for NaN or infinity.
        """
        report = progress or (lambda phase, done, total: None)
        as_image = isinstance(frames, Image.Image)
        frames = check_frames(np.asarray(frames.convert("RGB"))[None] if as_image else frames)
        guidance = self.config.guidance if guidance is None else guidance
        steps = self.config.steps if steps is None else steps
        self.sampler(steps)  # raises for bad settings, before the long work
        if not (np.isfinite(guidance) and guidance >= 1):
            raise ValueError(f"guidance is {guidance}; it should be 1 or more; 1 changes nothing")
        if len(references) > self.config.max_references:
            most = self.config.max_references
            raise ValueError(f"{len(references)} references; these weights take at most {most}")
        start = self.check_start(start, frames)
        shown = [self.reference_for_mllm(picture, frames.shape) for picture in references]
        references = [self.reference_for_dit(picture, frames.shape) for picture in shown]

        report("understand", 0, 1)
        # Both branches see the same pictures, and the unconditional one an empty instruction. So
        # guidance amplifies the effect of the words alone.
        instructions = [instruction] if guidance == 1 else [instruction, ""]
        prompts = [self.prompt(frames, words, shown, fps) for words in instructions]
        inputs = self.processor.collate(prompts, same_pictures=True)
        context = self.context(inputs, is_video=len(frames) > 1)              # (1 or 2, Q, 4096)
        check_finite(context, "context")
        report("understand", 1, 1)

        latents = []
        for pictures in (frames, *(reference[None] for reference in references)):
            report("encode", len(latents), 1 + len(references))
            latents.append(self.encode(pictures))                             # (1, 16, F, h, w)
        source, *references = latents
        report("encode", len(latents), len(latents))

        report("denoise", 0, steps)
        known = None if start is None else self.encode(start)                 # (1, 16, f, h, w)
        settings = steps, guidance, seed, progress, known, watch
        z = self.sample(context, source.shape, source, references, *settings)
        check_finite(z, "result")                                             # (1, 16, F, h, w)

        report("decode", 0, len(frames))
        pieces, done = [], 0
        for piece in self.decode(z, frames.shape):                            # (t, H, W, 3)
            (write or pieces.append)(piece)
            done += len(piece)
            report("decode", done, len(frames))
        if write:
            return None
        return Image.fromarray(pieces[0][0]) if as_image else np.concatenate(pieces)

    def prompt(self, frames, instruction, references=(), fps=16.0):
        """Builds the MLLM's inputs for one edit, a dict of tensors.

        `frames` are uint8 (T, H, W, 3), `references` uint8 (H, W, 3). A single frame becomes an
        image. A clip becomes at most `mllm_frames` evenly spaced frames, first and last included.
        """
        config = self.config
        if references:
            instruction += config.reference_words
        show = partial(
            self.processor,
            instruction,
            references=references,
            system=config.system_prompt,
            reference_pixels=config.reference_pixels,
            source_first=config.source_first,
        )
        # With a reference, Kiwi-Edit shows even a single frame as a video.
        if len(frames) == 1 and not (references and config.reference_queries):
            return show(image=frames[0])
        count = min(len(frames), config.mllm_frames)
        sampled = np.linspace(0, len(frames) - 1, count).round().astype(int)
        rate = fps * (count - 1) / max(1, len(frames) - 1)  # of the sampled frames
        return show(
            video=frames[sampled],
            fps=config.mllm_fps or rate,
            frame_pixels=config.frame_pixels,
            frame_resizes=config.frame_resizes,
        )

    def context(self, inputs, is_video):
        """The DiT's context, in place of T5 embeddings. `inputs`: a prompt, or a collated batch."""
        has_reference = self.has_reference(inputs)
        queries = self.connector.queries(is_video, has_reference)             # (Q, D)
        hidden = self.mllm(**inputs, queries=self.with_turn_end(queries))     # (B, L+Q, D)
        features = hidden[:, -len(queries) :]                                 # (B, Q, D)
        context = self.connector(features)                                    # (B, Q, 4096)
        if has_reference:
            states = self.reference_states(hidden, inputs)                    # (B, R, D)
            context = torch.cat([self.connector.reference(states), context], dim=1)
        return context

    # Three details of Kiwi-Edit. InstructX has none of them.

    def has_reference(self, inputs):
        """Whether a prompt of Kiwi-Edit's has a reference: then it holds an image and a video."""
        has_image_and_video = {"pixel_values", "pixel_values_videos"} <= inputs.keys()
        return self.config.reference_queries > 0 and has_image_and_video

    def with_turn_end(self, queries):
        """Kiwi-Edit appends the end of the turn. The last Q states include those at its tokens."""
        if not self.config.source_first:
            return queries
        end = self.mllm.words(torch.tensor(self.processor.turn_end()))  # (2, D)
        return torch.cat([queries.to(end), end])

    def reference_states(self, hidden, inputs):
        """Hidden states (B, R, D) at the tokens of the reference, which ends the prompt."""
        tokens = int(inputs["image_grid_thw"][-1].prod()) // self.processor.merge_size**2
        end = inputs["input_ids"].shape[1] - 1  # before <|vision_end|>
        return hidden[:, end - tokens : end]

    @torch.no_grad()
    def sample(
        self,
        context,
        shape,
        source=None,
        references=(),
        steps=None,
        guidance=None,
        seed=0,
        progress=None,
        known=None,
        watch=None,
    ):
        """Noise -> latents of `shape` (1, 16, F, h, w), float32.

        `context` has one row or, with guidance, two: instruction first, empty instruction second.
        `source` and `references` are latents. Stage 1 has no source. `known` are the first frames
        of the result, (1, 16, f, h, w). `watch` is called with each step's estimate of the result.
        """
        guidance = self.config.guidance if guidance is None else guidance
        steps = self.config.steps if steps is None else steps
        context = context[:1] if guidance == 1 else context
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        report = progress and (lambda done: progress("denoise", done, steps))
        velocity = self.velocity(context, (len(context), *shape[1:]), source, references)
        velocity = guided(velocity, guidance if len(context) == 2 else 1)
        if known is not None:
            velocity = with_known(velocity, known)
        if watch:
            velocity = watched(velocity, watch)
        return self.sampler(steps).sample(velocity, noise.to(context.device), report)

    def velocity(self, context, shape, source, references):
        """velocity(z, t) for z of `shape`. The condition is computed once for all steps."""
        condition = self.dit.condition(context, shape, source, references)
        return lambda z, t: self.dit.denoise(z, t, condition)

    def sampler(self, steps):
        return FlowSampler(steps, self.config.shift, self.config.solver)

    def encode(self, frames):
        """uint8 (T, H, W, 3) -> latents (1, 16, F, h, w).

        The last row, column and frame are repeated until sides and length suit the models. Pixel
        (0, 0) of frame 0 stays the first, so `decode` only has to crop.
        """
        frames = pad(frames, self.multiple(), self.vae.temporal_stride)
        return self.vae.encode(to_video(frames, like=self.vae.conv1.weight))

    def check_start(self, start, frames):
        """The `start` of `edit` as an array. Raises ValueError unless a result can begin so."""
        if start is None:
            return None
        start, stride = check_frames(start), self.vae.temporal_stride
        if start.shape[1:] != frames.shape[1:] or not len(start) < len(frames):
            raise ValueError(f"a result of {frames.shape} cannot start with frames {start.shape}")
        if len(start) % stride != 1 % stride:
            raise ValueError(f"{len(start)} known frames; it should be 1 + a multiple of {stride}")
        return start

    def decode(self, z, shape):
        """Latents (1, 16, F, h, w) -> uint8 frames, cropped to `shape` (T, H, W, 3), in pieces."""
        remaining, height, width, _ = shape
        for video in self.vae.decode_stream(z):                               # (1, 3, t, H, W)
            check_finite(video, "picture")
            frames = to_frames(video[:, :, :remaining, :height, :width])
            remaining -= len(frames)
            if len(frames):
                yield frames                                                  # (t, H, W, 3)

    def reference_for_mllm(self, picture, shape):
        """A reference -> uint8 (H, W, 3) for the MLLM. `shape`: of the source, (T, H, W, ...)."""
        if self.config.reference_padded:
            return np.asarray(to_pil(picture))
        return fit_reference(picture, shape[1] * shape[2])

    def reference_for_dit(self, picture, shape):
        """The result of `reference_for_mllm` -> uint8 (H, W, 3) for the DiT."""
        if not self.config.reference_padded:
            return picture
        image, size = to_pil(picture), (shape[2], shape[1])
        return np.asarray(ImageOps.pad(image, size, Image.Resampling.BICUBIC, color="white"))

    def multiple(self):
        """Sides are padded to multiples of this number: VAE stride times DiT patch size."""
        return self.vae.spatial_stride * self.dit.config.patch_size[1]

    # Loading.

    @classmethod
    def from_pretrained(
        cls,
        folder,
        device="cpu",
        dtype=None,
        instructx=None,
        offload=False,
        quantize=False,
        **settings,
    ):
        """Loads all models from one folder (layout: weights/README.md).

        Args:
            dtype: dtype of MLLM, connector and DiT; None keeps the stored ones. The VAE always
                keeps its stored dtype, officially float32: it is small, and its rounding errors
                would be visible.
            instructx: folder from save_pretrained, used instead of the one in `folder`.
            offload: keeps the blocks of MLLM and DiT in their files (see `offload_blocks`).
            quantize: rounds the DiT's matrices to int8 (see `quantize_blocks`). They are in memory
                with `offload`, too.
            settings: fields of InstructXConfig that override config.json.

        Raises FileNotFoundError for a missing model, ValueError for a checkpoint that does not
        fit.
        """
        folders = locate(folder, instructx)
        check_configs(folders)
        dit_blocks = not (offload or quantize)
        mllm = Qwen2_5_VL.from_pretrained(
            folders["mllm"], device, dtype, blocks=not offload, config=folders.get("mllm_config")
        )
        dit = WanDiT.from_pretrained(folders["dit"], device, dtype, blocks=dit_blocks)
        vae = WanVAE.from_pretrained(folders["vae"], device)
        processor = Processor.from_pretrained(folders.get("processor", folders["mllm"]))
        check_processor(processor, mllm.config, folders["mllm"])
        own, is_kiwi = folders.get("instructx"), "mllm_config" in folders
        if own or is_kiwi:
            config = read_config(own / "config.json") if own else read_kiwi_config(folders["mllm"])
            config = replace(config, **settings)
            with naming(own or folders["mllm"]), torch.device("meta"):
                connector = Connector(config)
            if config.lora_rank:
                add_lora(mllm, config.lora_rank, config.lora_alpha)
            model = cls(config, mllm, processor, connector, dit, vae)
        else:
            model = cls.untrained(mllm, processor, dit, vae, **settings)
        if own:
            model.load(own / "model.safetensors", device, dtype)
        elif is_kiwi:
            model.load_kiwi(folders["mllm"] / KIWI_FILE, device, dtype)
        if is_kiwi and dit.source_embedding is None:  # a trained DiT has its own
            model.load_kiwi_embeddings(folders["mllm"].parent, device, dtype)
        read_dit = partial(dit_block, folders["dit"], dtype)
        if quantize:
            quantize_blocks(model.dit, read_dit, device)
        elif offload:
            offload_blocks(model.dit.blocks, read_dit, device)
        if offload:
            for name in ("visual.blocks", "model.layers"):
                read = partial(mllm_block, folders["mllm"], name, dtype)
                offload_blocks(mllm.get_submodule(name), read, device)
        return model.eval()

    @classmethod
    def untrained(cls, mllm, processor, dit, vae, **settings):
        """Official models with new queries, connector and LoRA: the start of stage 1.

        The models determine the widths. The new weights come from a fixed seed.
        """
        width = dit.config.text_dim or dit.config.dim
        widths = {"mllm_dim": mllm.config.hidden_size, "hidden_dim": width, "context_dim": width}
        defaults = widths | {"text_embedding": bool(dit.config.text_dim)}
        config = InstructXConfig(**defaults | settings)
        weight = dit.patch_embedding.weight
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            connector = Connector(config).initialize().to(weight.device, weight.dtype)
            if config.lora_rank:
                add_lora(mllm, config.lora_rank, config.lora_alpha)
        return cls(config, mllm, processor, connector, dit, vae, trained=False)

    def load(self, file, device="cpu", dtype=None):
        """Loads connector and LoRA from an InstructX file. Raises ValueError unless all fit."""
        tensors = read_safetensors(file, device, dtype)
        prefix = "connector."
        connector = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        lora = {name: t for name, t in tensors.items() if not name.startswith(prefix)}
        with naming(file):
            self.connector.load_state_dict(connector, assign=True)
            if lora or self.config.lora_rank:
                load_lora(self.mllm, lora)

    def load_kiwi(self, file, device="cpu", dtype=None):
        """Loads the connector from Kiwi-Edit's file. Raises ValueError unless all tensors fit."""
        tensors = {
            name.replace("ref_", "reference_").replace("connector.", "mlp."): tensor
            for name, tensor in read_safetensors(file, device, dtype).items()
        }
        with naming(file):
            self.connector.load_state_dict(tensors, assign=True)

    def load_kiwi_embeddings(self, folder, device="cpu", dtype=None):
        """Loads the DiT's embeddings of source and references from Kiwi-Edit's folder.

        Raises FileNotFoundError for a missing file, ValueError for one that does not fit.
        """
        read = partial(read_kiwi_embedding, config=self.dit.config, device=device, dtype=dtype)
        flags = {"source_embedding": True, "source_bias": True, "source_scaled": True}
        self.dit.source_embedding = read(folder / "source_embedder")
        if self.config.reference_queries:  # else it is the variant without references
            self.dit.reference_embedding = read(folder / "ref_embedder")
            first = read_json(folder / "ref_embedder" / "config.json").get("ref_pad_first")
            flags |= {"reference_embedding": True, "references_first": bool(first)}
        self.dit.config = replace(self.dit.config, **flags)

    def save_pretrained(self, folder, dit=False, mllm=False, dtype=None):
        """Writes an `instructx` folder: config.json and model.safetensors.

        `dit` and `mllm` add these models to it. They then replace the official ones on loading.
        `dtype` is that of connector, LoRA and DiT in the files. None keeps theirs.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if mllm:
            self.mllm.save_pretrained(folder / "mllm")
            self.processor.save_pretrained(folder / "mllm")
        if dit:
            self.dit.save_pretrained(folder / "dit", dtype)
        tensors = {f"connector.{name}": t for name, t in self.connector.state_dict().items()}
        tensors |= lora_state_dict(self.mllm)
        tensors = {name: t.detach().to("cpu", dtype).contiguous() for name, t in tensors.items()}
        # Write to another name first: the tensors may be mapped from the existing file.
        partial_file = folder / "model.safetensors.partial"
        save_file(tensors, partial_file, metadata={"format": "pt"})
        config = {"_class_name": "InstructX", **asdict(self.config)}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        # safetensors makes its files readable by the owner only.
        shutil.copymode(folder / "config.json", partial_file)
        os.replace(partial_file, folder / "model.safetensors")


def read_safetensors(file, device, dtype):
    """{name: tensor} of a file. Raises FileNotFoundError, or ValueError if it is damaged."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing")
    tensors = mllm_module.read_tensors(file)  # none of these names is one that it changes
    return {name: tensor.to(device, dtype) for name, tensor in tensors.items()}


@contextlib.contextmanager
def naming(file):
    """Errors inside, of sizes or tensors that do not fit, become ValueErrors that name `file`."""
    try:
        yield
    except (RuntimeError, TypeError, OverflowError, ValueError) as error:
        raise ValueError(f"{file}: {' '.join(str(error).split())[:600]}") from None


KIWI_FILE = "diffusion_pytorch_model.safetensors"
KIWI_SYSTEM = "You will be given an image and instruction. Please describe the content of the image"
KIWI_SYSTEM += " in detail based on instruction in your own words."


def read_kiwi_config(folder):
    """InstructXConfig of Kiwi-Edit (github.com/showlab/Kiwi-Edit), from its mllm_encoder/."""
    file = folder / "config.json"
    raw = read_json(file)
    try:
        with safe_open(folder / KIWI_FILE, "pt") as stored:
            takes_reference = "ref_queries" in stored.keys()
        config = InstructXConfig(
            mllm_dim=raw["hidden_size"],
            hidden_dim=raw["dit_dim"],
            context_dim=raw["dit_dim"],
            image_queries=raw["num_image_queries"],
            video_queries=raw["num_video_queries"],
            reference_queries=raw["num_ref_queries"] if takes_reference else 0,
            mllm_frames=raw["max_frames"],
            frame_pixels=12845056,
            text_embedding=False,
            lora_rank=0,  # merged into the MLLM
            guidance=1.0,  # trained without empty instructions
            solver="euler",
            system_prompt=KIWI_SYSTEM,
            max_references=int(takes_reference),
            source_first=True,
            reference_words=" Use the reference input from last frame.",
            reference_pixels=602112,
            reference_padded=True,
            # Multiples of 56, not of Qwen's 28: a mistake that the weights were trained with.
            frame_resizes=(("pillow", 56, 12544, 262144), ("torch", 28, 100352, 262144)),
            mllm_fps=2.0,
            area=921600,
        )
    except (KeyError, SafetensorError, OSError) as error:
        raise ValueError(f"{folder} is no mllm_encoder of Kiwi-Edit: {error!r}") from None
    check_types(config, file)
    return config


def read_kiwi_embedding(folder, config, device, dtype):
    """The embedding of source or references in a folder of Kiwi-Edit's, for a DiT of `config`."""
    file = folder / KIWI_FILE
    for needed in (file, folder / "config.json"):
        if not needed.is_file():
            raise FileNotFoundError(f"{needed} is missing; the DiT sees pictures through it")
    tensors = read_safetensors(file, device, dtype)
    tensors = {n.removeprefix("patch_embedding."): t for n, t in tensors.items()}
    with naming(file):
        with torch.device("meta"):
            embedding = PatchEmbedding(config)
        embedding.load_state_dict(tensors, assign=True)
    return embedding


def check_frames(frames):
    """Frames as a contiguous array. Raises ValueError unless they are uint8 (T, H, W, 3)."""
    frames = np.ascontiguousarray(frames)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
        raise ValueError(f"frames are {frames.dtype} {frames.shape}, not uint8 (T, H, W, 3)")
    return frames


def pad(frames, side, stride):
    """Repeats the last row, column and frame up to sides n * `side`, length n * `stride` + 1."""
    length, height, width, _ = frames.shape
    extra = ((0, (1 - length) % stride), (0, -height % side), (0, -width % side), (0, 0))
    return np.pad(frames, extra, mode="edge")


def fit_reference(picture, area):
    """A PIL image or uint8 (H, W, 3) -> uint8 (H, W, 3) of at most `area` pixels.

    A reference then costs no more tokens than a frame of the source.
    """
    image = to_pil(picture)
    height, width = reference_size(image.height, image.width, area)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(image)


def reference_size(height, width, area):
    """(height, width) of a reference in an edit whose frames have `area` pixels."""
    scale = min(1.0, (area / (height * width)) ** 0.5)
    return max(1, round(height * scale)), max(1, round(width * scale))


def with_known(velocity, known):
    """Changes velocity(z, t) so that the first frames end exactly at the latents `known`.

    Their velocity is that of the straight line from z, at noise level t / 1000, to `known`. On the
    way these frames are as noisy as the others, as in training.
    """

    def changed(z, t):
        count = known.shape[2]
        straight = (z[:, :, :count] - known) / (t[0] / 1000)
        return torch.cat([straight, velocity(z, t)[:, :, count:]], dim=2)

    return changed


def watched(velocity, watch):
    """velocity(z, t), which calls watch(x) with the data that it points to: x = z - t / 1000 v."""

    def changed(z, t):
        v = velocity(z, t)
        watch(z - t[0] / 1000 * v)
        return v

    return changed


def check_finite(tensor, name):
    """Raises FloatingPointError for NaN or infinity, which would become a black picture."""
    if not tensor.isfinite().all():
        advice = "try dtype float32, or the weights are damaged"
        raise FloatingPointError(f"the {name} is not finite (NaN); {advice}")


def read_config(file):
    """Reads InstructXConfig from a config.json. Raises ValueError for bad keys and types."""
    raw = read_json(file)
    if raw.pop("_class_name", "InstructX") != "InstructX":
        raise ValueError(f"{file} is not the config.json of an InstructX folder")
    names = [field.name for field in fields(InstructXConfig)]
    unknown = sorted(raw.keys() - set(names))
    if unknown:
        raise ValueError(f"{file}: unknown settings {unknown}; there are {', '.join(names)}")
    raw = {name: to_tuple(value) for name, value in raw.items()}
    config = InstructXConfig(**raw)
    check_types(config, file)
    return config


def check_configs(folders):
    """Raises ValueError for wrong values in the config.json of MLLM, DiT and VAE."""
    mllm_config = mllm_module.read_config(folders["mllm"], folders.get("mllm_config"))
    vae_file = vae_module.checkpoint_file(folders["vae"])
    check_types(mllm_config, folders["mllm"])
    check_types(mllm_config.vision_config, folders["mllm"])
    check_types(dit_module.read_config(folders["dit"]), folders["dit"])
    check_types(vae_module.read_config(vae_file.parent / "config.json"), folders["vae"])


def check_processor(processor, config, folder):
    """Raises ValueError if an MLLM and its processor are of different models."""
    tokens = 1 + max(processor.tokenizer.get_vocab().values())
    if tokens > config.vocab_size:
        known = f"tokenizer.json numbers {tokens} tokens, the model {config.vocab_size}"
        raise ValueError(f"{folder}: {known}; they are of different models")
    vision, ids = config.vision_config, processor.ids
    for name, given, needed in (
        ("patch_size", processor.patch_size, vision.patch_size),
        ("temporal_patch_size", processor.temporal_patch_size, vision.temporal_patch_size),
        ("merge_size", processor.merge_size, vision.spatial_merge_size),
        ("image_token_id", ids["<|image_pad|>"], config.image_token_id),
        ("video_token_id", ids["<|video_pad|>"], config.video_token_id),
    ):
        if given != needed:
            problem = f"{name} is {given} by the processor's files and {needed} by the model's"
            raise ValueError(f"{folder}: {problem}")


def check_types(config, file):
    """Raises ValueError for a type that differs from the default's, and for numbers below 0.

    What is named dim or size is 1 or more, but for two, where 0 means none.
    """
    for field in fields(config):
        is_size = field.name.endswith(("dim", "size"))
        least = int(is_size and field.name not in ("text_dim", "decoder_dim"))
        value, default = getattr(config, field.name), getattr(type(config)(), field.name)
        allowed = (int, float) if isinstance(default, float) else type(default)
        if not isinstance(value, allowed) or isinstance(value, bool) != isinstance(default, bool):
            raise ValueError(f"{file}: {field.name} is {value!r}, not like {default!r}")
        if isinstance(value, (int, float)) and value < least:
            raise ValueError(f"{file}: {field.name} is {value!r}, below {least}")


def to_tuple(value):
    """Turns the lists of JSON into the tuples of configs."""
    return tuple(map(to_tuple, value)) if isinstance(value, list) else value


CLASSES = {
    "Qwen2_5_VLForConditionalGeneration": "mllm",
    "qwen2_5_vl": "mllm",
    "WanModel": "dit",
    "WanTransformer3DModel": "dit",
    "AutoencoderKLWan": "vae",
    "VAE": "vae",  # this and the next are Kiwi-Edit's
    "MLLMEncoder": "mllm",
    "InstructX": "instructx",
}


def locate(folder, instructx=None):
    """Paths of the models: {"mllm", "dit", "vae" and, after training, "instructx": path}.

    Kiwi-Edit has two more, "processor" and "mllm_config". Folders named mllm, dit, vae and
    instructx come first. Otherwise config.json identifies the model of a folder, so the official
    downloads can lie side by side unchanged. The VAE may be a file Wan2.?_VAE.*. `instructx`
    replaces the one in `folder`. Raises FileNotFoundError for a missing model, ValueError for a
    duplicate.
    """
    folder = Path(folder)
    if not folder.is_dir():
        problem = "does not exist, or is no folder"
        raise FileNotFoundError(f"{folder} {problem}; it should hold mllm/, dit/ and vae/")
    if (folder / "config.json").is_file() and "hidden_dim" in read_json(folder / "config.json"):
        advice = "name it by --instructx, and the folder with mllm/ and vae/ by --weights"
        raise ValueError(f"{folder} is what training wrote (instructx/); {advice}")
    candidates = {}
    for file in sorted([*folder.glob("*/config.json"), *folder.glob("*/*/config.json")]):
        config = read_json(file)
        model = CLASSES.get(str(config.get("_class_name", config.get("model_type"))))
        if model and file.parent.parent.name != "instructx":
            candidates.setdefault(model, []).append(file.parent)
    vae_files = sorted([*folder.glob("Wan2.?_VAE.*"), *folder.glob("*/Wan2.?_VAE.*")])
    candidates.setdefault("vae", vae_files)
    folders = {}
    for model in ("mllm", "dit", "vae", "instructx"):
        found = [folder / model] if (folder / model).is_dir() else candidates.get(model, [])
        if len(found) > 1:
            names = ", ".join(map(str, found))
            raise ValueError(f"{folder} holds {model} more than once: {names}; name one {model}/")
        if found:
            folders[model] = found[0]
    if instructx is not None:
        folders["instructx"] = Path(instructx)
        if not (folders["instructx"] / "config.json").is_file():
            raise FileNotFoundError(f"{instructx} holds no config.json: training did not write it")
    for model in ("mllm", "dit"):  # trained versions come first
        trained = folders.get("instructx", folder / "instructx") / model
        if trained.is_dir():
            folders[model] = trained
    for model, name in (("mllm", "Qwen2.5-VL"), ("dit", "the DiT"), ("vae", "Wan's VAE")):
        if model not in folders:
            missing = f"no {model}/ with {name} (see weights/README.md)"
            raise FileNotFoundError(f"{folder} holds {missing}")
    encoder_config = folders["mllm"] / "config.json"
    if encoder_config.is_file() and read_json(encoder_config).get("_class_name") == "MLLMEncoder":
        folders["processor"] = folders["mllm"].parent / "processor"
        folders["mllm_config"] = folders["processor"] / "qwen_config.json"
        for file, purpose in (
            (folders["mllm"] / KIWI_FILE, "it holds Kiwi-Edit's queries and connector"),
            (folders["mllm_config"], "it says which Qwen2.5-VL Kiwi-Edit has"),
        ):
            if not file.is_file():
                raise FileNotFoundError(f"{file} is missing; {purpose}")
    return folders


# Machines. These functions change loaded models from outside; no forward mentions them.


def compile_blocks(blocks):
    """Compiles the forward of blocks; an edit spends nearly all its time in those of the DiT.

    Names in state_dict() stay the same. Blocks of a kind share one compilation, which takes
    seconds. The hooks of `offload_blocks` run before and after the compiled forward.
    """
    for block in blocks:
        block.forward = torch.compile(block.forward)


def recompute_blocks(blocks):
    """Gradient checkpointing: a block keeps only its input and runs again in the backward pass.

    Training takes less memory and a third more time.
    """
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def dit_block(path, dtype, i):
    """Reads block i from the DiT's files: {name: (tensor, dtype to run in)}."""
    prefix, weights = f"blocks.{i}.", {}
    for name, tensor in dit_module.read_tensors(path, prefix).items():
        stored = dit_module.stored_dtype(name, tensor.dtype, dtype)
        weights[name.removeprefix(prefix)] = tensor, stored
    return weights


def mllm_block(path, tower, dtype, i):
    """Reads block i of a tower from the MLLM's files: {name: (tensor, dtype to run in)}."""
    prefix, weights = f"{tower}.{i}.", {}
    for name, tensor in mllm_module.read_tensors(path, prefix).items():
        weights[name.removeprefix(prefix)] = tensor, dtype or tensor.dtype
    return weights


def offload_blocks(blocks, read, device):
    """Keeps the weights of `blocks` in their files: the same result with far less memory.

    read(i) -> {name: (tensor, dtype)} of block i. While one block runs, a thread copies the
    weights of the next. Two buffers take turns, so no memory is allocated between blocks. For a GPU
    the weights pass through pinned memory, from which it copies several times faster.
    """
    device = torch.device(device)
    reader, pending, buffers, pinned = ThreadPoolExecutor(1), {}, [{}, {}], {}
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def fetch(i, ready):
        buffer = buffers[i % 2]
        with torch.cuda.stream(stream):  # in parallel with the GPU's work; a no-op on the CPU
            if ready:
                stream.wait_event(ready)  # until the block that used this buffer is done
            for name, (tensor, dtype) in read(i).items():
                if name not in buffer:
                    buffer[name] = torch.empty(tensor.shape, dtype=dtype, device=device)
                if stream:
                    if name not in pinned:
                        pinned[name] = torch.empty(tensor.shape, dtype=dtype, pin_memory=True)
                    tensor = pinned[name].copy_(tensor)
                buffer[name].copy_(tensor, non_blocking=bool(stream))
        if stream:
            stream.synchronize()
        return buffer

    def before(block, inputs, i):
        ready = torch.cuda.current_stream(device).record_event() if stream else None
        future = pending.pop(i, None) or reader.submit(fetch, i, ready)
        pending.clear()  # a failed edit may have left another block here
        weights = future.result()
        if i + 1 < len(blocks):
            pending[i + 1] = reader.submit(fetch, i + 1, ready)
        block.load_state_dict(weights, strict=False, assign=True)  # not strict: LoRA stays

    def after(block, inputs, output, i):
        weights = {name: tensor.to("meta") for name, tensor in buffers[i % 2].items()}
        block.load_state_dict(weights, strict=False, assign=True)
        if i + 1 == len(blocks):  # leaves the memory to the VAE
            buffers[0].clear()
            buffers[1].clear()

    for i, block in enumerate(blocks):
        block.register_forward_pre_hook(partial(before, i=i))
        block.register_forward_hook(partial(after, i=i))


class QuantizedLinear(nn.Module):
    """A Linear with an int8 weight and a scale per output: half the memory of bfloat16.

    The product runs in the weight's original dtype, which represents all 255 integers exactly.
    Rounded weights do not train.
    """

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / 127
        self.register_buffer("weight", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale[:, 0])
        self.bias, self.dtype = linear.bias, linear.weight.dtype

    @torch.no_grad()
    def forward(self, x):
        y = F.linear(x.to(self.dtype), self.weight.to(self.dtype))
        return torch.addcmul(self.bias, y, self.scale, out=y)


def quantize_blocks(dit, read, device):
    """Rounds the matrices of the DiT's blocks to int8, block by block as they are read.

    `read` is that of `offload_blocks`. The result of an edit changes a little.
    """
    for i, block in enumerate(dit.blocks):
        weights = {name: tensor.to(device, dtype) for name, (tensor, dtype) in read(i).items()}
        block.load_state_dict(weights, assign=True)
        for name, layer in list(block.named_modules()):
            if isinstance(layer, nn.Linear):
                block.set_submodule(name, QuantizedLinear(layer))


def tile(vae, side):
    """Makes the VAE process overlapping squares of `side` pixels, one after the other.

    `side` is rounded down to whole latents, of which a tile has 4 or more. Apart from the result,
    memory no longer grows with height and width. A clip is decoded in one piece. The result changes
    a little: convolutions see zeros beyond the border of a tile, and attention sees one tile only.
    """
    stride = vae.spatial_stride
    latents = max(side // stride, 4)
    encode, decode_stream = vae.encode, vae.decode_stream

    def encode_tiles(video, chunk=1):
        return in_tiles(partial(encode, chunk=chunk), video, latents * stride, stride, 1 / stride)

    def decode_tiles(z, chunk=1):
        def decode(part):
            return torch.cat(list(decode_stream(part, chunk)), dim=2)

        yield in_tiles(decode, z, latents, 1, stride)

    vae.encode, vae.decode_stream = encode_tiles, decode_tiles


def in_tiles(run, x, side, multiple, scale):
    """Computes run(x) on squares of x (..., H, W), blended over a quarter of their side.

    `multiple` divides `side` and the sides of x. The result is `scale` times as large as x.
    """
    overlap = side // multiple // 4 * multiple
    result = weight = None
    for top in tile_starts(x.shape[-2], side, overlap):
        for left in tile_starts(x.shape[-1], side, overlap):
            y = run(x[..., top : top + side, left : left + side])
            if result is None:
                height, width = round(x.shape[-2] * scale), round(x.shape[-1] * scale)
                result = y.new_zeros(*y.shape[:-2], height, width)
                weight = y.new_zeros(height, width)
            rows = slice(round(top * scale), round(top * scale) + y.shape[-2])
            columns = slice(round(left * scale), round(left * scale) + y.shape[-1])
            edge = round(overlap * scale)
            fade = tile_fade(y.shape[-2], edge).to(y)[:, None] * tile_fade(y.shape[-1], edge).to(y)
            result[..., rows, columns] += y * fade
            weight[rows, columns] += fade
    return result / weight


def tile_starts(length, side, overlap):
    """Starts of the tiles along one axis. The last tile ends at the end of the axis."""
    last = max(length - side, 0)
    return [min(start, last) for start in range(0, max(length - overlap, 1), side - overlap)]


def tile_fade(length, overlap):
    """Weights (length,) that rise to 1 over `overlap` steps and fall at the end; never 0."""
    steps = torch.arange(1, length + 1)
    return torch.minimum(steps, steps.flip(0)).clamp(max=overlap) / overlap


def main():
    """Prints the contents of a weights folder, and the shapes of editing an image and a clip."""
    shapes = Path(__file__).resolve().parent / "weights" / "shapes"
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", nargs="?", default=shapes, help="a weights folder")
    args = parser.parse_args()
    try:
        model = InstructX.from_pretrained(args.folder)
    except (ValueError, OSError) as error:
        parser.exit(2, f"connector.py: {error}\n")
    for name in ("mllm", "connector", "dit", "vae"):
        parameters = list(getattr(model, name).parameters())
        millions = sum(p.numel() for p in parameters) / 1e6
        print(f"{name:10} {millions:9.2f} M parameters   {parameters[0].dtype}")
    side = 4 * model.multiple()
    for length in (1, 1 + 2 * model.vae.temporal_stride):
        frames = np.zeros((length, side, side, 3), np.uint8)
        with torch.inference_mode():
            inputs = model.prompt(frames, "make it night")
            context, source = model.context(inputs, length > 1), model.encode(frames)
            z, t = torch.randn(source.shape), torch.full((1,), 500.0)
            velocity = model.dit(z, t, context, source)
        print(f"\nframes {frames.shape} -> latents {tuple(source.shape)}")
        print(f"prompt {tuple(inputs['input_ids'].shape)} -> context {tuple(context.shape)}")
        print(f"velocity {tuple(velocity.shape)}")


if __name__ == "__main__":
    main()
