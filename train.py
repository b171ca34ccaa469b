"""Trains InstructX in the three stages of the paper (arXiv 2510.08485, section 3.3), from one straight script.

    python train.py --stage 1 --data data/train.jsonl --weights DIR --out runs/stage1
    python train.py --stage 2 --data data/train.jsonl --weights DIR --start runs/stage1/instructx --out runs/stage2
    python train.py --stage 3 --data data/clean.jsonl --weights DIR --start runs/stage2/instructx --out runs/stage3

    stage   trains                                   data              the DiT sees
    1       queries, LoRA, connector                 images            noisy latents
    2       these, the DiT and the source embedding  images and clips  noisy latents + source latents, reference latents
    3       as stage 2                               a clean subset    as stage 2

Data are JSON lines with `source`, `target`, `instruction` and, if any, `references`; paths are relative to the file.
CSV files with the columns of the open neighbors are read too: src_video, tgt_video, prompt, ref_image.

What is unusual: which samples a step sees, their noise, σ and dropped instructions are functions of (seed, step) alone.
So there is no loader state to save, reading ahead cannot change anything, a run that was killed goes on with the very
same numbers, and so does one with another number of processes (torchrun --nproc-per-node 8 -- train.py ...).

Precision: trained weights, their gradients, averages and moments are float32; matrix products run in `--precision`
through autocast; frozen weights are kept in `--precision`, the VAE in its own. Letters as in connector.py.
"""

import argparse
import contextlib
import csv
import functools
import hashlib
import json
import math
import os
import resource
import shutil
import sys
import time
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from PIL import Image, ImageDraw, UnidentifiedImageError
from safetensors.torch import load_file, save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from connector import InstructX, InstructXConfig, locate
from dit import PRESETS, WanDiT, stored_dtype
from dit import read_config as dit_config
from edit import (ANIMATED_FORMATS, IMAGE_FORMATS, IMAGE_OPTIONS, MediaError, Parser, decode, list_frames, number,
                  read_frames)
from mllm import LoRALinear, Processor, Qwen2_5_VL, Qwen2_5_VLConfig, lora_layers, merge_lora
from mllm import read_config as mllm_config
from sampler import FlowSampler, guided
from vae import VAEConfig, WanVAE
from vae import read_config as vae_config

PAPER_STEPS = {1: 20000, 2: 20000, 3: 5000}
SIGMA_BINS = 4
PATIENCE = 10           # unusable steps in a row that stop the run


def settings(arguments=None):
    """Every setting with its meaning; "paper" marks the paper's value, all others are ours."""
    parser = Parser(prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    count, share, positive = number(int, 1, 10**9), number(float, 0, 1), number(float, 0, 1e9)

    def add(name, default, text, type=None, shown=None, **more):
        parser.add_argument(name, default=default, type=type, help=f"{text} (default: {shown or default})", **more)

    parser.add_argument("--stage", type=int, choices=(1, 2, 3), required=True)
    parser.add_argument("--data", type=Path, nargs="+", help="JSON lines or CSV files")
    parser.add_argument("--weights", type=Path, help="weights folder with mllm/, dit/, vae/")
    parser.add_argument("--out", type=Path, help="checkpoints, metrics, curves and the result, instructx/")
    add("--start", None, "instructx/ folder of the stage before", Path, "the one in --weights, else fresh queries")
    add("--config", [], "KEY=VALUE settings of instructx/config.json (InstructXConfig in connector.py), such as "
        "image_queries=64 lora_rank=16 of a fresh start, or steps=20 guidance=3 of sampling", nargs="+",
        shown="as released, or as --start says")
    add("--steps", None, "optimizer steps", count, shown="paper: 20000, 20000, 5000 for stage 1, 2, 3")
    add("--image-batch", 128, "images per step; paper: 128", count)
    add("--video-batch", 32, "clips per step; paper: 32", count)
    add("--micro-batch", 8, "samples of one shape that go through the models at once, over all processes together; "
        "a batch is the sum of several", count)
    add("--video-share", 0.6, "share of the steps of stage 2 or 3 that take clips; paper: 0.6", share)
    add("--lr", 1e-5, "learning rate; paper: 1e-5", positive)
    add("--warmup", 500, "steps until the learning rate is reached", number(int, 0, 10**9))
    add("--schedule", "constant", "of the learning rate after that; linear and cosine end at 0",
        choices=("constant", "linear", "cosine"))
    add("--muon-lr", 0.0, "learning rate of Muon (kellerjordan.github.io/posts/muon) for the matrices of the DiT's "
        "blocks, about 20 times that of AdamW, which trains all else; 0: AdamW trains them too", positive)
    add("--weight-decay", 0.01, "of matrices; queries, word embeddings, norms, biases, modulation have none", positive)
    add("--clip", 1.0, "largest norm of the gradient", positive)
    add("--drop", 0.1, "probability of an empty instruction, for guidance", share)
    add("--sigma", "logit-normal", "how σ is drawn, before it is shifted", choices=("logit-normal", "uniform"))
    add("--image-shift", 3.0, "shift of σ for images", number(float, 0.01, 100))
    add("--video-shift", 5.0, "shift of σ for clips", number(float, 0.01, 100))
    add("--change-weight", 0.0, "how much more the loss counts where source and target differ; 0: plain flow matching",
        positive)
    add("--area", 480 * 832, "larger pictures are scaled down to about this many pixels", count)
    add("--frames", 81, "longer clips are cut to this many frames", count)
    add("--cache", None, "folder for VAE latents, each computed once, and for the sizes of the data", Path, "none")
    add("--ema", 0.0, "decay of the averaged weights that are rendered and exported; 0: the weights themselves", share)
    add("--dit-lora", 0, "rank of low-rank matrices that train in place of the DiT, and are merged in the end; "
        "0 trains the DiT", number(int, 0, 10**4))
    add("--validate", None, "JSON lines or CSV file of which the first edits are rendered now and then", Path, "none")
    add("--validate-every", 1000, "steps between renderings", count)
    add("--validate-count", 8, "edits to render", count)
    add("--save-every", 500, "steps between checkpoints", count)
    add("--keep", 2, "checkpoints to keep", count)
    parser.add_argument("--check-data", action="store_true",
                        help="only read every file of the data once, and list what is broken and why")
    parser.add_argument("--plan", nargs="?", const="14B", choices=PRESETS,
                        help="only print parameters, memory and days of the stage, for the sizes in --weights "
                        "(config.json files will do), else as released, with the DiT named (default: 14B)")
    add("--gpus", 1, "how many, for --plan", count)
    add("--gpu-memory", 80.0, "GB of each, for --plan", positive)
    add("--gpu-tflops", 400.0, "what each reaches, for --plan: about 40 percent of its peak", number(float, 0.001, 1e6))
    add("--seed", 0, "of data order, noise, σ and dropped instructions", number(int, 0, 2**62))
    add("--workers", 2, "threads that read ahead", count)
    add("--device", "cuda" if torch.cuda.is_available() else "cpu", "where to train")
    add("--precision", None, "of matrix products and frozen weights", choices=("float32", "bfloat16"),
        shown="bfloat16 on CUDA, else float32")
    parser.add_argument("--gradient-checkpointing", action="store_true",
                        help="compute each layer again in the backward pass: less memory, a third more time")
    parser.add_argument("--train-all", action="store_true",
                        help="train the whole language model instead of LoRA: for tiny models")
    args = parser.parse_args(arguments)
    if missing := [name for name in ("data", "weights", "out") if getattr(args, name) is None and not args.plan]:
        raise ValueError(f"--{missing[0]} is missing")
    args.steps = args.steps or PAPER_STEPS[args.stage]
    args.precision = args.precision or ("bfloat16" if args.plan or args.device.startswith("cuda") else "float32")
    args.config = config_settings(args.config)
    for batch in (args.image_batch, args.video_batch)[:1 if args.stage == 1 else 2]:
        if batch % min(batch, args.micro_batch):
            raise ValueError(f"a batch of {batch} is no multiple of --micro-batch {args.micro_batch}")
    for name in ("change_weight", "dit_lora", "muon_lr"):
        if getattr(args, name) and args.stage == 1:
            raise ValueError(f"--{name.replace('_', '-')} is for stages 2 and 3: "
                             "stage 1 neither trains the DiT nor shows it the source")
    if args.muon_lr and args.dit_lora:
        raise ValueError("--muon-lr is for the matrices of the DiT, which --dit-lora leaves as they are")
    return args


def config_settings(pairs):
    """["steps=20", ...] -> {"steps": 20, ...}. Raises ValueError for what InstructXConfig does not have."""
    kinds, chosen = InstructXConfig.__annotations__, {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        if name not in kinds or name in ("mllm_dim", "context_dim"):
            raise ValueError(f"--config {pair}: there is no setting {name!r}; known are {', '.join(kinds)}")
        try:
            chosen[name] = {"true": True, "false": False}[value] if kinds[name] is bool else kinds[name](value)
        except (ValueError, KeyError):
            raise ValueError(f"--config {pair}: {value!r} should be of the kind {kinds[name].__name__}") from None
    return chosen


# Data: what there is, in which order, and reading it.


def media_shape(path):
    """(T, H, W) of what read_frames reads at `path`, from headers where that will do; it raises the same errors."""
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_OPTIONS)
        if not files:
            raise MediaError(f"{path} is a folder without images")
        return len(files), *media_shape(files[0])[1:]
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            frames = image.n_frames if image.format in ANIMATED_FORMATS else 1
            # PIL would decode a whole PNG to look for EXIF behind its pixels.
            exif = image.getexif() if image.format != "PNG" or "exif" in image.info else {}
            turned = frames == 1 and exif.get(0x0112, 1) > 4
            return frames, *(image.size if turned else image.size[::-1])
    except UnidentifiedImageError:
        with contextlib.closing(decode(path, 1)) as frames:
            frame = next(frames, None)
        if frame is None:
            raise MediaError(f"{path} is neither an image nor a video that can be read") from None
        return len(list_frames(path)[1]), *frame.shape[:2]


class Index:
    """media_shape, remembered in a JSON file as long as size and time of the media file do not change."""

    def __init__(self, file):
        self.file, self.known, self.new = file, json.loads(file.read_text()) if file.exists() else {}, 0

    def __call__(self, path):
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist")
        stat = path.stat()
        stamp = [stat.st_size, stat.st_mtime_ns]
        found = self.known.get(str(path))
        if found is None or found[:2] != stamp:
            found = self.known[str(path)] = [*stamp, *media_shape(path)]
            self.new += 1
        return tuple(found[2:])

    def save(self):
        if self.new:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            partial = self.file.with_name(f"{self.file.name}.{os.getpid()}.partial")
            partial.write_text(json.dumps(self.known))
            os.replace(partial, self.file)


@dataclass
class Pair:
    """One line of the data."""

    where: str              # file and line
    source: Path
    target: Path
    references: list
    instruction: str

    def paths(self):
        return self.source, self.target, *self.references


# The columns of the CSV files of open trainers of video editors.
COLUMNS = {"source": "src_video", "target": "tgt_video", "instruction": "prompt", "references": "ref_image"}


def read_rows(file):
    """Yields (line, text of a JSON line, or dict of a CSV row) of a data file."""
    if file.suffix.lower() != ".csv":
        yield from enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        return
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream)
        for row in reader:
            row = {name: row.get(column) or row.get(name) for name, column in COLUMNS.items()}
            yield reader.line_num, row | {"references": [row["references"]] if row["references"] else []}


def read_lines(file):
    """Yields a Pair, or the ValueError that says what is wrong with it, for each line of a data file."""
    for line, row in read_rows(file):
        where = f"{file}:{line}"
        try:
            row, folder = json.loads(row) if isinstance(row, str) else row, file.parent
            paths = row["source"], row["target"], *(row.get("references") or [])
            source, target, *references = (folder / path for path in paths)
            if not isinstance(row["instruction"], str):
                raise TypeError("the instruction is no text")
            yield Pair(where, source, target, references, row["instruction"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            yield ValueError(f"{where}: not an edit with source, target and instruction ({error!r})")


class Pairs:
    """The pairs of all data files, in buckets of one shape each so that a batch can be stacked, and their order.

    Two pairs share a bucket when clip length, working size and the sizes of their references agree. An epoch of images,
    or of clips, visits each pair, in chunks of one bucket; chunks are shuffled, so that the steps mix shapes.
    """

    def __init__(self, args, files, multiple, stride):
        self.args, self.multiple, self.stride = args, multiple, stride
        self.pairs, self.broken = [], {}                                # broken: {where: why}
        self.buckets = {False: {}, True: {}}                            # {is_video: {shape: [number in pairs]}}
        for pair in (pair for file in files for pair in read_lines(file)):
            if isinstance(pair, Pair):
                self.pairs.append(pair)
            else:
                self.broken[str(pair).partition(": ")[0]] = str(pair)
        self.index = Index((args.cache or args.out) / "sizes.json")
        with ThreadPoolExecutor(args.workers) as pool:
            shapes = pool.map(self.try_shape, self.pairs)
            self.shapes = [*tqdm(shapes, desc="sizes", total=len(self.pairs), disable=None, leave=False)]
        self.index.save()
        rows = [(pair.where.rpartition(":")[2], pair.instruction, shape)
                for pair, shape in zip(self.pairs, self.shapes)]
        self.digest = hashlib.sha256(repr(rows).encode()).hexdigest()
        for i, shape in enumerate(self.shapes):
            if shape and (args.stage > 1 or shape[0][0] == 1):
                bucket = shape if args.stage > 1 else shape[:1]         # in stage 1 the DiT sees no references
                self.buckets[shape[0][0] > 1].setdefault(bucket, []).append(i)

    def summary(self):
        images, clips = (sum(map(len, self.buckets[video].values())) for video in (False, True))
        buckets = sum(map(len, self.buckets.values()))
        return f"{images} images and {clips} clips in {buckets} buckets; {len(self.broken)} pairs are broken"

    def try_shape(self, pair):
        try:
            return self.shape(pair)
        except Exception as error:          # whatever is wrong with one file, the run goes on
            self.broken[pair.where] = f"{pair.where}: {error}"

    def shape(self, pair):
        """The bucket of a pair: working shapes of the source, which the target shares, and of the references."""
        (length, height, width), (target_length, *target) = self.index(pair.source), self.index(pair.target)
        if (length > 1) != (target_length > 1):
            raise ValueError(f"one of {pair.source} and {pair.target} is an image, the other a clip")
        if abs(math.log(height / width * target[1] / target[0])) > 0.1:
            size = f"{target[1]}x{target[0]}"
            raise ValueError(f"{pair.source} is {width}x{height}, {pair.target} is {size}: another aspect")
        length = min(length, target_length, self.args.frames)
        source = (length - 1) // self.stride * self.stride + 1, *self.working(height, width, self.args.area)
        if length > 1 and source[0] == 1:
            raise ValueError(f"{pair.source} has {length} frames; a clip should have {self.stride + 1} or more")
        area = source[1] * source[2]        # a reference costs at most as many tokens as a frame of the source
        return source, *((1, *self.working(*self.index(path)[1:], area)) for path in pair.references)

    def working(self, height, width, area):
        """The size that a picture is scaled to: no larger than it is, about `area` at most, sides that the models take.

        There are eight lengths from each power of two to the next, so that pictures of all sizes fall into few buckets.
        """
        scale = min(1.0, (area / (height * width)) ** 0.5)

        def side(pixels):
            units = max(1.0, pixels * scale / self.multiple)
            step = 2 ** max(0, int(math.log2(units)) - 3)
            return round(units / step) * step * self.multiple

        return side(height), side(width)

    def is_video(self, step):
        """Whether `step` takes clips, and how many steps before it took its kind: spread evenly, without chance."""
        share = self.args.video_share if all(self.buckets.values()) else float(bool(self.buckets[True]))
        clips = math.floor(share * step + 1e-9)
        video = math.floor(share * (step + 1) + 1e-9) > clips
        return video, clips if video else step - clips

    @functools.lru_cache(maxsize=4)
    def epoch(self, video, epoch):
        """[[pair number]], the chunks of one epoch. The last of a bucket is filled up with others of that bucket."""
        rng, chunks = np.random.default_rng([self.args.seed, video, epoch]), []
        size = min(self.args.micro_batch, self.args.video_batch if video else self.args.image_batch)
        for numbers in self.buckets[video].values():
            order = rng.permutation(numbers).tolist()
            order += order[:-len(order) % size] if len(order) > size else []
            chunks += [order[start:start + size] for start in range(0, len(order), size)]
        return [chunks[i] for i in rng.permutation(len(chunks))]

    def plan(self, step):
        """What `step` sees: (is_video, [[pair number]]), one entry for each micro-batch."""
        video, before = self.is_video(step)
        batch, chunks = self.args.video_batch if video else self.args.image_batch, len(self.epoch(video, 0))
        count = max(1, batch // self.args.micro_batch)
        places = (divmod(before * count + i, chunks) for i in range(count))
        return video, [self.epoch(video, epoch)[i] for epoch, i in places]


def read(path, shape):
    """The frames at `path` in a working shape, uint8 (T, H, W, 3), and their rate. ValueError where there are fewer."""
    length, height, width = shape
    media = read_frames(path, limit=length, size=(width, height))
    if len(media.frames) < length:
        raise ValueError(f"{path} has {len(media.frames)} frames that can be read, and {length} by its header")
    return media.frames[:length], float(media.fps or 16)


def check_data(args):
    """Reads every file of the data, and prints which pairs are broken and why. Returns whether all are whole."""
    with torch.device("meta"):
        model = skeleton(args)
    pairs = Pairs(args, args.data, model.multiple(), model.vae.temporal_stride)

    def examine(pair, shape):
        try:
            if shape:
                source, _, *references = (read(*both)[0] for both in zip(pair.paths(), (shape[0], *shape)))
                model.prompt(source, pair.instruction, [frames[0] for frames in references])
        except Exception as error:
            pairs.broken[pair.where] = f"{pair.where}: {error}"

    with ThreadPoolExecutor(args.workers) as pool:
        done = pool.map(examine, pairs.pairs, pairs.shapes)
        deque(tqdm(done, desc="pairs", total=len(pairs.pairs), disable=None, leave=False), maxlen=0)
    print("\n".join([*sorted(pairs.broken.values()), pairs.summary()]))
    return not pairs.broken


@dataclass
class Picture:
    """A picture on its way into the DiT: its latents if they are known, else its frames, and where to keep latents."""

    z: torch.Tensor | None          # (1, 16, F, h, w)
    frames: np.ndarray | None       # uint8 (T, H, W, 3)
    file: Path | None


class Latents:
    """Encodes pictures, each once where there is a folder for it.

    The key is the content of the media file, the working shape and the VAE, so latents can't go stale, and with known
    latents a clip need not even be decoded. Each is encoded alone: in a batch its last bits could depend on the others.
    """

    def __init__(self, vae, folder):
        self.vae, self.folder = vae, folder
        self.vae_key = hashlib.sha256(repr(vae.config).encode())
        for tensor in vae.encoder.state_dict().values():
            self.vae_key.update(tensor.detach().float().cpu().numpy().tobytes())

    def look_up(self, path, shape, frames=None):
        """The Picture at `path`; `frames` if they are read already. Thread-safe: the VAE is not used."""
        if self.folder is None:
            return Picture(None, read(path, shape)[0] if frames is None else frames, None)
        key = self.vae_key.copy()
        key.update(repr(shape).encode())
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            key.update(file.read_bytes())
        file = self.folder / key.hexdigest()[:2] / f"{key.hexdigest()[2:34]}.safetensors"
        if file.exists():
            return Picture(load_file(file)["z"], None, file)
        return Picture(None, read(path, shape)[0] if frames is None else frames, file)

    def __call__(self, pictures):
        """[Picture] of one shape -> (B, 16, F, h, w) on the VAE's device."""
        return torch.cat([self.encode(picture) if picture.z is None else picture.z.to(self.vae.conv1.weight.device)
                          for picture in pictures]).float()

    def encode(self, picture):
        video = torch.tensor(picture.frames).permute(3, 0, 1, 2)[None]                      # (1, 3, T, H, W)
        z = self.vae.encode(video.to(self.vae.conv1.weight) / 127.5 - 1)
        if picture.file:
            picture.file.parent.mkdir(parents=True, exist_ok=True)
            partial = picture.file.with_suffix(f".{os.getpid()}.partial")
            save_file({"z": z.cpu().contiguous()}, partial)
            os.replace(partial, picture.file)
        return z


@dataclass
class Sample:
    """One pair, read and made ready. A blank has weight 0: it stands where nothing could be read, teaching nothing."""

    where: str
    place: tuple            # (chunk, number in it) of its step
    seed: int               # of its noise and σ
    inputs: dict            # of the MLLM
    target: Picture
    source: Picture | None  # in stage 1 the MLLM alone sees the source and the references
    references: list
    weight: float = 1.0


# Training.


def adapt(dit, args):
    """Gives the DiT what a stage adds: the source embedding, a copy at first, and where asked low-rank matrices."""
    if args.stage > 1:
        dit.add_source_embedding()
    for name, linear in [*dit.blocks.named_modules()] if args.dit_lora else []:
        if isinstance(linear, nn.Linear):
            parent, _, leaf = name.rpartition(".")
            setattr(dit.blocks.get_submodule(parent), leaf, LoRALinear(linear, args.dit_lora, args.dit_lora))


def trainable(model, args, compute):
    """Says what trains: trained parameters become float32, all others but the VAE's are frozen in `compute`."""
    if args.train_all and lora_layers(model.mllm):
        merge_lora(model.mllm)
        model.config.lora_rank = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        adapt(model.dit, args)
    model.requires_grad_(False)
    dit = "dit.source_embedding." if args.dit_lora else "dit."
    prefixes = ("connector.", *([dit] if args.stage > 1 else []), *(["mllm.model."] if args.train_all else []))
    for name, parameter in model.named_parameters():
        if name.startswith(prefixes) or ".lora_" in name:
            parameter.data = parameter.data.float().clone()         # a clone, since loaded weights are mapped files
            parameter.requires_grad_()
        elif name.startswith("dit."):
            parameter.data = parameter.data.to(stored_dtype(name.removeprefix("dit."), parameter.dtype, compute))
        elif name.startswith("mllm."):
            parameter.data = parameter.data.to(compute)


def flow_loss(dit, context, z, source, references, sigma, noise, sampler, change_weight=0.0):
    """Flow matching: the error of the DiT's velocity against ε - x at x_σ = (1-σ)x + σε -> one loss per sample, (B,).

    z, source and noise (B, 16, F, h, w), references [(B, 16, 1, h', w')], sigma (B,), context (B, Q, C).
    """
    velocity = dit(sampler.add_noise(z, noise, sigma), 1000 * sigma, context, source=source, references=references)
    error = (velocity - sampler.target(z, noise)).square()                                  # (B, 16, F, h, w)
    if change_weight:
        # An edit changes little of the picture, and all the rest is learnt first; weights have mean 1 over each sample.
        change = (z - source).square().mean(dim=1, keepdim=True)                            # (B, 1, F, h, w)
        weight = 1 + change_weight * change / change.amax(dim=(2, 3, 4), keepdim=True).clamp(min=1e-6)
        error = error * (weight / weight.mean(dim=(2, 3, 4), keepdim=True))
    return error.flatten(1).mean(dim=1)


class Stop(Exception):
    """What ends a run that was going well."""


def hash_of(*values):
    """A 63-bit seed from integers, so that neighboring steps have unrelated noise."""
    return int.from_bytes(hashlib.sha256(repr(values).encode()).digest()[:8], "little") >> 1


def by_muon(name, parameter, args):
    """Whether Muon trains a parameter of InstructX: it is for matrices between hidden states, not for embeddings."""
    return args.muon_lr > 0 and name.startswith("dit.blocks.") and parameter.ndim == 2


def learning_rate(step, args, highest):
    """Linear warm-up, then constant (paper), or falling to 0 along a line or a cosine."""
    done = min(1, max(0, step + 1 - args.warmup) / max(1, args.steps - args.warmup))
    falling = {"constant": 1, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[args.schedule]
    return highest * min(1, (step + 1) / max(1, args.warmup)) * falling


class Processes:
    """The processes of one run under torchrun, or this one alone. Each takes its share of every chunk of samples.

    The DiT is sharded with FSDP2, block by block. MLLM and connector are small against it: each process has them whole,
    and their gradients are averaged here.
    """

    def __init__(self, device):
        self.count, self.device = int(os.environ.get("WORLD_SIZE", 1)), torch.device(device)
        if self.count > 1:
            if self.device.type == "cuda":
                self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
                torch.cuda.set_device(self.device)
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo")
        self.rank = dist.get_rank() if self.count > 1 else 0

    def shard(self, model):
        """Shards the DiT of a model that lies on the CPU, and moves the rest of it to the device."""
        if self.count > 1:
            mesh = init_device_mesh(self.device.type, (self.count,))
            for part in (*model.dit.blocks, model.dit):
                fully_shard(part, mesh=mesh)
        for part in (model.mllm, model.connector, model.vae, *([] if self.count > 1 else [model.dit])):
            part.to(self.device)

    def average_gradients(self, parameters):
        """Means over all processes, of gradients that FSDP does not take care of; one message for all of them."""
        gradients = [p.grad for p in parameters if p.grad is not None and not isinstance(p, DTensor)]
        if self.count > 1 and gradients:
            flat = torch.cat([gradient.flatten() for gradient in gradients]) / self.count
            dist.all_reduce(flat)
            for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
                gradient.copy_(part.view_as(gradient))

    def gather(self, rows):
        """The rows of all processes, in order."""
        parts = [rows]
        if self.count > 1:
            parts = [None] * self.count
            dist.all_gather_object(parts, rows)
        return sorted(row for part in parts for row in part)

    def wait(self):
        if self.count > 1:
            dist.barrier()


class Trainer:
    """One training run: the models, the optimizers, and what a step does with them."""

    def __init__(self, args):
        self.args, self.compute, self.processes = args, getattr(torch, args.precision), Processes(args.device)
        self.device = self.processes.device
        place = locate(args.weights, args.start)
        self.model = self.build()
        # What is exported beside queries, connector and LoRA: what is trained here, or was before.
        own = [name for name in ("mllm", "dit") if place[name].parent == place.get("instructx")]
        self.export = {"mllm": "mllm" in own or args.train_all, "dit": "dit" in own or args.stage > 1}
        self.processes.shard(self.model)
        self.model.dit.gradient_checkpointing = self.model.mllm.gradient_checkpointing = args.gradient_checkpointing
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizers = self.make_optimizers()
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()} if args.ema else {}
        self.pairs = self.read_pairs(args.data)
        if not any(self.pairs.buckets.values()):
            why = next(iter(self.pairs.broken.values()), "these are clips, and stage 1 takes images")
            raise ValueError(f"no usable pair in {', '.join(map(str, args.data))}: {why}")
        self.latents = Latents(self.model.vae, args.cache)
        self.shown = self.read_shown() if args.validate else []
        self.step, self.unusable = 0, 0

    def build(self):
        """The models as the stage starts from them, with what trains marked."""
        model = InstructX.from_pretrained(self.args.weights, instructx=self.args.start, **self.args.config)
        trainable(model, self.args, self.compute)
        return model

    def make_optimizers(self):
        """AdamW, and Muon if it is asked for.

        Decay would wear down embeddings of words that are not seen, and pull norms and biases to zero. Muon rounds its
        steps to bfloat16, so with it runs of one and of several processes agree less closely: to 1e-4, not to 1e-5.
        """
        groups, matrices = {}, []                       # what is sharded and what is not can't be in one group
        for name, p in self.parameters.items():
            if by_muon(name, p, self.args):
                matrices.append(p)
                continue
            decays = p.ndim > 1 and not any(part in name for part in ("queries", "modulation", "embed_tokens"))
            groups.setdefault((isinstance(p, DTensor), decays), []).append(p)
        groups = [{"params": list_of, "weight_decay": decays * self.args.weight_decay}
                  for (_, decays), list_of in groups.items()]
        optimizers = [torch.optim.AdamW(groups, lr=self.args.lr, betas=(0.9, 0.95), fused=True)]
        if matrices:
            optimizers.append(torch.optim.Muon(matrices, lr=self.args.muon_lr, weight_decay=self.args.weight_decay))
        return optimizers

    def moments(self, name):
        """{kind: tensor}: what its optimizer remembers of a parameter; nothing before the first step."""
        parameter = self.parameters[name]
        return self.optimizers[by_muon(name, parameter, self.args)].state[parameter]

    def read_pairs(self, files):
        """The pairs in data files. The first process looks up their sizes, the others find what it wrote."""
        for rank in (0, 1):
            if min(self.processes.rank, 1) == rank:
                pairs = Pairs(self.args, files, self.model.multiple(), self.model.vae.temporal_stride)
            self.processes.wait()
        return pairs

    def read_shown(self):
        """[(pair, shape)] to render. Each is read once: better an error now than in the middle of the run."""
        pairs = self.read_pairs([self.args.validate])
        if pairs.broken:
            raise ValueError(f"--validate: {next(iter(pairs.broken.values()))}")
        shown = [*zip(pairs.pairs, pairs.shapes)][:self.args.validate_count]
        for pair, shape in shown:
            self.sample(pair, shape, pair.instruction)
        return shown

    def load(self, step):
        """What a step needs from disk: (is_video, [[Sample]]), the share of this process in each chunk, or a blank."""
        video, plan = self.pairs.plan(step)
        chunks = []
        for i, numbers in enumerate(plan):
            samples = [self.load_sample((i, j), numbers[j], hash_of(self.args.seed, step, i, j))
                       for j in range(self.processes.rank, len(numbers), self.processes.count)]
            chunks.append([sample for sample in samples if sample] or [self.blank(self.pairs.shapes[numbers[0]])])
        return video, chunks

    def load_sample(self, place, number, seed):
        """A pair as a Sample, or None if it is broken: it is then named in `broken`."""
        pair, shape = self.pairs.pairs[number], self.pairs.shapes[number]
        words = pair.instruction if np.random.default_rng(seed).random() >= self.args.drop else ""
        try:
            return self.sample(pair, shape, words, place, seed)
        except Exception as error:              # whatever is wrong with one file, the run goes on
            self.pairs.broken[pair.where] = f"{pair.where}: {error}"

    def sample(self, pair, shape, words, place=(0, 0), seed=0):
        frames, fps = read(pair.source, shape[0])
        pictures = [read(path, one)[0] for path, one in zip(pair.references, shape[1:])]
        inputs = self.model.prompt(frames, words, [picture[0] for picture in pictures], fps)
        target, source, references = self.latents.look_up(pair.target, shape[0]), None, []
        if self.args.stage > 1:
            source = self.latents.look_up(pair.source, shape[0], frames)
            references = [self.latents.look_up(*rest) for rest in zip(pair.references, shape[1:], pictures)]
        return Sample(pair.where, place, seed, inputs, target, source, references)

    def blank(self, shape):
        frames = [np.zeros((*one, 3), np.uint8) for one in shape]
        pictures = [Picture(None, picture, None) for picture in frames]
        inputs = self.model.prompt(frames[0], "", [picture[0] for picture in frames[1:]])
        source, references = (pictures[0], pictures[1:]) if self.args.stage > 1 else (None, [])
        return Sample("", (0, 0), 0, inputs, pictures[0], source, references, weight=0.0)

    def autocast(self):
        return torch.autocast(self.device.type, self.compute, enabled=self.compute != torch.float32)

    def conditions(self, samples):
        """Latents of the sources, (B, 16, F, h, w), and of the references, [(B, 16, 1, h', w')]; in stage 1 neither."""
        references = [self.latents(pictures) for pictures in zip(*(sample.references for sample in samples))]
        return self.latents([sample.source for sample in samples]) if self.args.stage > 1 else None, references

    def loss(self, samples, video):
        """Losses and σ of samples of one shape, each (B,). All random numbers come from their seeds, on the CPU."""
        args, z = self.args, self.latents([sample.target for sample in samples])            # (B, 16, F, h, w)
        sampler = FlowSampler(shift=args.video_shift if video else args.image_shift)
        generators = [torch.Generator().manual_seed(sample.seed) for sample in samples]
        sigma = [sampler.draw_sigma(1, generator, args.sigma == "uniform") for generator in generators]
        noise = [torch.randn(z.shape[1:], generator=generator) for generator in generators]
        sigma, noise = torch.cat(sigma).to(self.device), torch.stack(noise).to(self.device)
        inputs = self.model.processor.collate([sample.inputs for sample in samples])
        with self.autocast():
            context = self.model.context(inputs, video)
            losses = flow_loss(self.model.dit, context, z, *self.conditions(samples), sigma, noise, sampler,
                               args.change_weight)
        return losses, sigma

    def update(self, video, chunks):
        """One optimizer step -> its figures. A step whose loss or gradient is not finite changes nothing."""
        args, parts = self.args, []
        count = len(self.processes.gather([sample.place for samples in chunks for sample in samples if sample.weight]))
        for samples in chunks:
            losses, sigmas = self.loss(samples, video)
            weights = torch.tensor([sample.weight for sample in samples], device=self.device)
            ((losses * weights).sum() * self.processes.count / max(1, count)).backward()
            parts.append((samples, losses.detach(), sigmas))
        rows = self.processes.gather([(sample.place, loss, sigma, sample.where) for samples, losses, sigmas in parts
                                      for sample, loss, sigma in zip(samples, losses.tolist(), sigmas.tolist())
                                      if sample.weight])
        norm = self.clip_gradients()
        used = count > 0 and math.isfinite(norm) and all(math.isfinite(loss) for _, loss, _, _ in rows)
        rates = [learning_rate(self.step, args, highest) for highest in (args.lr, args.muon_lr)]
        if used:
            for optimizer, rate in zip(self.optimizers, rates):
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
            decay = min(args.ema, (1 + self.step) / (10 + self.step))       # or the start would stay in it for long
            for name, average in self.average.items():
                average.lerp_(self.parameters[name].detach(), 1 - decay)
        self.model.zero_grad()
        self.unusable = 0 if used else self.unusable + 1
        self.names = [where for _, _, _, where in rows]
        bins = [[] for _ in range(SIGMA_BINS)]
        for _, loss, sigma, _ in rows:
            bins[min(SIGMA_BINS - 1, int(sigma * SIGMA_BINS))].append(loss)
        mean = lambda values: sum(values) / len(values) if values else None
        return {"step": self.step, "video": video, "samples": count, "loss": mean([loss for _, loss, _, _ in rows]),
                "by_sigma": [mean(values) for values in bins], "gradient": norm, "lr": rates[0], "used": used}

    def clip_gradients(self):
        """Scales all gradients down to a norm of --clip together. Returns the norm before."""
        self.processes.average_gradients(self.parameters.values())
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        parts = [[g for g in gradients if isinstance(g, DTensor) == sharded] for sharded in (False, True)]
        norms = [torch.nn.utils.get_total_norm(part) for part in parts if part]
        norm = math.hypot(*(n.full_tensor().item() if isinstance(n, DTensor) else n.item() for n in norms))
        if math.isfinite(norm) and norm > self.args.clip:
            for part in filter(None, parts):
                torch._foreach_mul_(part, self.args.clip / norm)
        return norm

    def run(self):
        """Steps until --steps, with a checkpoint every --save-every and at the end."""
        args, ahead, first = self.args, deque(), self.processes.rank == 0
        metrics = Metrics(args.out, self.step) if first else None
        bar = tqdm(initial=self.step, total=args.steps, desc=f"stage {args.stage}", disable=None if first else True)
        with ThreadPoolExecutor(args.workers) as pool, bar, contextlib.ExitStack() as stack:
            stack.callback(pool.shutdown, cancel_futures=True)
            while self.step < args.steps:
                while len(ahead) <= args.workers and self.step + len(ahead) < args.steps:
                    ahead.append(pool.submit(self.load, self.step + len(ahead)))
                began = time.perf_counter()
                video, chunks = ahead.popleft().result()
                waited = time.perf_counter() - began
                figures = self.update(video, chunks)
                seconds = time.perf_counter() - began
                self.step += 1
                if first:
                    metrics.write({**figures, "broken": len(self.pairs.broken), "seconds": round(seconds, 3),
                                   "waited": round(waited, 3), "memory": memory(self.device),
                                   "samples_per_second": round(figures["samples"] / seconds, 2)})
                    bar.set_postfix(loss=figures["loss"], gradient=figures["gradient"], refresh=False)
                    bar.update()
                if self.unusable >= PATIENCE:
                    raise Stop(f"{PATIENCE} steps in a row were unusable, the last is step {self.step - 1}: "
                               f"{self.complaint(figures)}")
                if self.unusable and first:
                    bar.write(f"train.py: step {self.step - 1} skipped: {self.complaint(figures)}", file=sys.stderr)
                if self.shown and (self.step % args.validate_every == 0 or self.step == args.steps):
                    self.validate()
                if self.step % args.save_every == 0 or self.step == args.steps:
                    self.save()
                    if first:
                        metrics.draw()

    def complaint(self, figures):
        if not figures["samples"]:
            return f"no sample could be read ({next(iter(self.pairs.broken.values()), 'by other processes')})"
        return f"loss {figures['loss']}, gradient {figures['gradient']}; its batch: {', '.join(self.names)}"

    @contextlib.contextmanager
    def averaged(self):
        """Inside, the model has its averaged weights, where there are any."""
        kept = {name: self.parameters[name].detach().clone() for name in self.average}
        with torch.no_grad():
            for name, average in self.average.items():
                self.parameters[name].copy_(average)
            yield
            for name, value in kept.items():
                self.parameters[name].copy_(value)

    @torch.no_grad()
    def validate(self):
        """Renders the first edits of --validate to OUT/validation: source, result, target; always with one noise."""
        rows = []
        with self.averaged(), self.autocast():
            for pair, shape in self.shown:
                source, target = (read(path, shape[0])[0] for path in (pair.source, pair.target))
                rows.append((pair.instruction, source, self.render(pair, shape), target))
        if self.processes.rank == 0:
            file = self.args.out / "validation" / f"step-{self.step:07d}.png"
            file.parent.mkdir(exist_ok=True)
            sheet(rows).save(file.with_suffix(".partial"), format="PNG")
            os.replace(file.with_suffix(".partial"), file)

    def render(self, pair, shape):
        """The edit of a pair as InstructX.edit makes it, but by the DiT's forward (FSDP); in stage 1 without source."""
        config, dit, video = self.model.config, self.model.dit, shape[0][0] > 1
        wanted = [pair.instruction] if config.guidance == 1 else [pair.instruction, ""]
        samples = [self.sample(pair, shape, words) for words in wanted]
        context = self.model.context(self.model.processor.collate([sample.inputs for sample in samples]), video)
        source, references = self.conditions(samples[:1])
        like = self.latents([samples[0].target])
        noise = torch.randn(like.shape, generator=torch.Generator().manual_seed(self.args.seed)).to(self.device)
        velocity = guided(lambda z, t: dit(z, t, context, source, references), config.guidance)
        z = FlowSampler(config.steps, config.shift).sample(velocity, noise)
        return np.concatenate(list(self.model.decode(z, (*shape[0], 3))))

    def state(self):
        """{name: tensor} of what a checkpoint holds: weights, "ema NAME", and of the optimizers "exp_avg NAME"."""
        tensors = {name: p.detach() for name, p in self.parameters.items()}
        tensors |= {f"ema {name}": average for name, average in self.average.items()}
        for name in self.parameters:
            tensors |= {f"{kind} {name}": value for kind, value in self.moments(name).items()}
        return tensors

    def save(self):
        """Writes checkpoints/step-N, which appears whole or not at all, and removes those before the last `--keep`.

        Each process writes its shards, as safetensors; any number of processes can go on from them.
        """
        final, first = self.args.out / "checkpoints" / f"step-{self.step:07d}", self.processes.rank == 0
        partial = final.with_suffix(".partial")
        try:
            if first:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            self.processes.wait()
            writer = HuggingFaceStorageWriter(partial, save_distributed=True)
            checkpoint.save(self.state(), storage_writer=writer, no_dist=self.processes.count == 1)
            if first:
                state = {"step": self.step, "unusable": self.unusable, "settings": lasting(self.args),
                         "data": self.pairs.digest}
                (partial / "state.json").write_text(json.dumps(state, indent=2))
                shutil.rmtree(final, ignore_errors=True)
                os.replace(partial, final)
                for old in [*checkpoints(self.args.out)[:-self.args.keep], *final.parent.glob("*.partial")]:
                    shutil.rmtree(old)
        except (Exception, CheckpointException) as error:
            shutil.rmtree(partial, ignore_errors=True)
            reason = " ".join(str(error).split())[-300:]
            raise Stop(f"checkpoint {final} could not be written, the one before is whole ({reason})") from None

    def resume(self):
        """Goes on from the last checkpoint, if there is one. Raises ValueError when it was made with other settings."""
        found = checkpoints(self.args.out)
        if not found:
            return
        state, now = json.loads((found[-1] / "state.json").read_text()), lasting(self.args)
        odd = [f"{name} was {state['settings'].get(name)} and is {value}" for name, value in now.items()
               if state["settings"].get(name) != value]
        if odd:
            raise ValueError(f"{found[-1]} was made with other settings: {'; '.join(odd)}; or take another --out")
        reader = HuggingFaceStorageReader(found[-1])
        for key in reader.read_metadata().state_dict_metadata:      # there are no moments before the first step
            kind, _, name = key.rpartition(" ")
            if kind in ("step", "exp_avg", "exp_avg_sq", "momentum_buffer"):
                parameter = self.parameters[name]
                empty = torch.zeros((), device=self.device) if kind == "step" else torch.zeros_like(parameter).detach()
                self.moments(name)[kind] = empty
        checkpoint.load(self.state(), storage_reader=reader, no_dist=self.processes.count == 1)
        self.step, self.unusable = state["step"], state["unusable"]
        if self.processes.rank == 0:
            print(f"train.py: goes on at step {self.step}, from {found[-1]}", file=sys.stderr)
            if state["data"] != self.pairs.digest:
                print("train.py: the data are not those of the checkpoint: from here on it is another run",
                      file=sys.stderr)

    def finish(self):
        """Writes the result, OUT/instructx, put together, with low-rank matrices merged; it appears when whole."""
        final = self.args.out / "instructx"
        partial = final.with_suffix(".partial")
        with self.averaged():
            dit = self.whole_dit() if self.processes.count > 1 else self.model.dit
            if self.processes.rank == 0:
                for name, layer in lora_layers(dit):
                    parent, _, leaf = name.rpartition(".")
                    setattr(dit.get_submodule(parent), leaf, layer.merged())
                self.model.dit = dit
                shutil.rmtree(partial, ignore_errors=True)
                self.model.save_pretrained(partial, **self.export)
                shutil.rmtree(final, ignore_errors=True)
                os.replace(partial, final)
        self.processes.wait()
        return final

    def whole_dit(self):
        """The sharded DiT put together again, on the CPU of the first process."""
        tensors = get_model_state_dict(self.model.dit, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if self.processes.rank == 0:
            with torch.device("meta"):
                dit = WanDiT(self.model.dit.config)
                dit.text_embedding = dit.text_embedding if self.model.config.text_embedding else nn.Identity()
                adapt(dit, self.args)
            dit.load_state_dict(tensors, assign=True)
            return dit


def lasting(args):
    """The settings that a resumed run must share with its checkpoint: all that the result depends on."""
    free = {"weights", "start", "out", "data", "device", "workers", "keep", "save_every", "cache", "check_data",
            "gradient_checkpointing", *(name for name in vars(args) if name.startswith(("validate", "plan", "gpu")))}
    free |= {"steps"} if args.schedule == "constant" else set()
    return {name: value for name, value in sorted(vars(args).items()) if name not in free}


def checkpoints(out):
    """Whole checkpoints, oldest first."""
    return sorted(path for path in (out / "checkpoints").glob("step-*") if path.suffix != ".partial")


# Planning.


def cost_of_layers(build, call, layers):
    """[FLOP forward, FLOP backward, bytes kept between them] of call(model), for so many layers, and what one adds.

    Models of one and two layers, which build(n) makes on the meta device, run on fake tensors, which have shapes and no
    content. So this counts what PyTorch would do and keep; and all further layers are alike.
    """
    points = []
    for n in (1, 2):
        model, kept, forward, backward = build(n), {}, FlopCounterMode(display=False), FlopCounterMode(display=False)
        keep = lambda tensor: kept.setdefault(tensor.untyped_storage()._cdata, tensor) is None or tensor
        with FakeTensorMode():
            for module in model.modules():
                for name, p in module._parameters.items():
                    if p is not None:
                        module._parameters[name] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad)
            with forward, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                result = call(model)
            with backward:
                result.sum().backward()
            weights = {p.untyped_storage()._cdata for p in model.parameters()}
            size = sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in weights)
        points.append(np.array([forward.get_total_flops(), backward.get_total_flops(), size], float))
    return points[0] + (points[1] - points[0]) * (layers - 1), points[1] - points[0]


def skeleton(args, layers=None):
    """InstructX of the sizes in --weights, or as released with the DiT of --plan; `layers` for another depth."""
    place = locate(args.weights, args.start) if args.weights else {}
    file = lambda name: (place[name] if place[name].is_dir() else place[name].parent) / "config.json"
    mllm, dit = (read(file(name)) if name in place else PRESETS[args.plan] if name == "dit" else Qwen2_5_VLConfig()
                 for name, read in (("mllm", mllm_config), ("dit", dit_config)))
    vae = vae_config(file("vae")) if place else VAEConfig()
    if layers:
        mllm, dit = replace(mllm, num_hidden_layers=layers), replace(dit, num_layers=layers)
    config = asdict(InstructXConfig.from_file(file("instructx"))) if "instructx" in place else {}
    processor = Processor.from_pretrained(place["mllm"]) if args.check_data else None
    return InstructX.untrained(Qwen2_5_VL(mllm), processor, WanDiT(dit), WanVAE(vae), **config | args.config)


def held_bytes(parameters, args):
    """Of weights {name: parameter} and, where they train, gradients, two moments and averages, all float32. Muon has
    one moment."""
    copies = lambda name, p: (5 if args.ema else 4) - by_muon(name, p, args)
    return sum(p.numel() * (4 * copies(name, p) if p.requires_grad else p.element_size())
               for name, p in parameters.items())


def plan(args):
    """Prints parameters, FLOP, memory of each GPU and days of a stage. No weight is needed, nor any memory."""
    compute, gpus = getattr(torch, args.precision), args.gpus
    with torch.device("meta"):
        model = skeleton(args)
        trainable(model, args, compute)
    print(f"{'':10}{'parameters':>12}{'trained':>12}{'GB per GPU':>12}   (weights, gradients, moments)")
    # Sharded, the weights of a block and of the next one are gathered while it runs.
    held = 2 * 4 * sum(p.numel() for p in model.dit.blocks[0].parameters()) if gpus > 1 else 0
    for name in ("mllm", "connector", "dit", "vae"):
        parameters = {f"{name}.{part}": p for part, p in getattr(model, name).named_parameters()}
        size = held_bytes(parameters, args) / (gpus if name == "dit" else 1)
        held += size
        count, trained = (sum(p.numel() for p in parameters.values() if p.requires_grad or every)
                          for every in (True, False))
        print(f"{name:10}{count / 1e6:10.1f} M{trained / 1e6:10.1f} M{size / 1e9:12.2f}")
    seconds, clips = [], args.video_share if args.stage > 1 else 0.0
    for kind, batch, frames, share in (("image", args.image_batch, 1, 1 - clips),
                                       ("clip", args.video_batch, args.frames, clips)):
        if share:
            chunk = min(batch, args.micro_batch)
            each = -(-chunk // gpus)
            flop, kept, tokens = step_cost(args, model, frames, each, compute)
            seconds.append(share * flop * batch / chunk / (args.gpu_tflops * 1e12))
            print(f"{kind} step: {batch} of {tokens} tokens, {each} at once on each GPU; "
                  f"{flop / each * batch / 1e15:.3f} PFLOP, {seconds[-1] / share:.2f} s; "
                  f"{kept / 1e9:.2f} GB kept for the backward pass, {(held + kept) / 1e9:.2f} GB in all")
            if chunk < gpus:
                print(f"    {gpus - chunk} of {gpus} GPUs have nothing to do; a larger --micro-batch gives them work")
            if held + kept > args.gpu_memory * 1e9:
                print(f"    more than {args.gpu_memory:g} GB: try --gradient-checkpointing, a smaller --micro-batch, "
                      "--dit-lora, more GPUs")
    days = args.steps * sum(seconds) / 86400
    print(f"stage {args.stage}: {args.steps} steps of {sum(seconds):.2f} s, {days:.2f} days with {gpus} GPUs at "
          f"{args.gpu_tflops:g} TFLOP/s each")


def step_cost(args, full, frames, batch, compute):
    """(FLOP, bytes kept, tokens in the DiT) of some samples on one GPU. The frozen vision tower is left out."""
    config, vae = full.config, full.vae
    side = round(args.area ** 0.5 / full.multiple()) * full.multiple() // vae.spatial_stride
    shape = (batch, full.dit.config.in_dim, (frames - 1) // vae.temporal_stride + 1, side, side)
    queries = config.video_queries if frames > 1 else config.image_queries
    merged = (full.mllm.config.vision_config.patch_size * full.mllm.config.vision_config.spatial_merge_size) ** 2
    shown = -(-min(frames, config.mllm_frames) // 2) if frames > 1 else 1       # two frames of a clip to a patch
    prompt = 64 + shown * args.area // merged                                   # 64 words
    cast = lambda: torch.autocast("cpu", compute, enabled=compute != torch.float32)

    def build(n):
        with torch.device("meta"):
            model = skeleton(args, n)
            trainable(model, args, compute)
        return model

    def understand(model):
        x = torch.randn(batch, prompt + queries, config.mllm_dim, dtype=compute, requires_grad=True)
        with torch.autocast("cpu", compute, enabled=compute != torch.float32):
            return model.connector(model.mllm.model(x, torch.zeros(3, batch, prompt + queries))[:, -queries:])

    def denoise(model):
        z, context = torch.randn(shape), torch.randn(batch, queries, config.context_dim, requires_grad=True)
        with torch.autocast("cpu", compute, enabled=compute != torch.float32):
            return model.dit(z, torch.zeros(batch), context, z if args.stage > 1 else None)

    flop = kept = 0
    inputs = {understand: batch * (prompt + queries) * config.mllm_dim * compute.itemsize,      # of one layer, in bytes
              denoise: batch * math.prod(full.dit.grid(shape)) * full.dit.config.dim * 4}
    for call, layers in ((understand, full.mllm.config.num_hidden_layers), (denoise, full.dit.config.num_layers)):
        (forward, backward, size), one = cost_of_layers(build, call, layers)
        again = args.gradient_checkpointing
        flop += forward + backward + (one[0] * layers if again else 0)
        kept += size - one[2] * (layers - 1) + inputs[call] * layers if again else size
    return flop, kept, math.prod(full.dit.grid(shape))


# What a trainer sees.


def memory(device):
    """Peak GB so far: of the GPU, else of the process."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e9, 2)
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 2)


class Metrics:
    """OUT/metrics.jsonl, a line for each step, and OUT/curves.png. Lines from `step` on are dropped: they return."""

    def __init__(self, out, step):
        self.file, self.rows = out / "metrics.jsonl", []
        for line in self.file.read_text().splitlines() if self.file.exists() else []:
            with contextlib.suppress(ValueError):       # the run may have been killed in the middle of a line
                self.rows.append(json.loads(line))
        self.rows = [row for row in self.rows if row["step"] < step]
        self.file.with_suffix(".partial").write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        os.replace(self.file.with_suffix(".partial"), self.file)
        self.stream = self.file.open("a", buffering=1)

    def write(self, row):
        self.rows.append(row)
        self.stream.write(json.dumps(row) + "\n")

    def draw(self):
        """Four panels over the steps: loss of images and clips, loss by σ, norm of the gradient, learning rate."""
        page = Image.new("RGB", (1200, 800), "white")
        kinds = {"images": lambda row: None if row["video"] else row["loss"],
                 "clips": lambda row: row["loss"] if row["video"] else None}
        bins = {f"{i / SIGMA_BINS:.2f} to {(i + 1) / SIGMA_BINS:.2f}": lambda row, i=i: row["by_sigma"][i]
                for i in range(SIGMA_BINS)}
        panels = {"loss": kinds, "loss by sigma": bins, "norm of the gradient": {"": lambda row: row["gradient"]},
                  "learning rate": {"": lambda row: row["lr"]}}
        for i, (title, curves) in enumerate(panels.items()):
            panel(ImageDraw.Draw(page), (600 * (i % 2), 400 * (i // 2)), title,
                  {name: [(row["step"], value(row)) for row in self.rows] for name, value in curves.items()})
        page.save(self.file.with_name("curves.partial"), format="PNG")
        os.replace(self.file.with_name("curves.partial"), self.file.with_name("curves.png"))


COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")


def panel(draw, corner, title, curves, width=600, height=400, points=150, floor=0.0):
    """One plot: {name: [(x, y or None)]}, each averaged down to at most `points` points. The y axis starts at `floor`,
    or where the lowest curve does if that is lower, or floor None."""
    left, top, right, bottom = corner[0] + 70, corner[1] + 40, corner[0] + width - 20, corner[1] + height - 40
    lines = {}
    for name, pairs in curves.items():
        pairs = np.array([(x, y) for x, y in pairs if y is not None and math.isfinite(y)], float).reshape(-1, 2)
        parts = np.array_split(pairs, min(points, max(1, len(pairs))))
        lines[name] = [part.mean(axis=0) for part in parts if len(part)]
    everything = np.array([point for line in lines.values() for point in line]).reshape(-1, 2)
    if not len(everything):
        return
    (x0, y0), (x1, y1) = everything.min(axis=0), everything.max(axis=0)
    y0, x1 = y0 if floor is None else min(floor, y0), max(x1, x0 + 1)
    y1 = max(y1, y0 + 1e-12)
    draw.text((left, corner[1] + 12), title, "black", font_size=16)
    for i in range(5):
        y = bottom - i * (bottom - top) / 4
        draw.line((left, y, right, y), "#dddddd")
        draw.text((left - 8, y), f"{y0 + i * (y1 - y0) / 4:.3g}", "black", anchor="rm", font_size=12)
        x = left + i * (right - left) / 4
        draw.text((x, bottom + 8), f"{x0 + i * (x1 - x0) / 4:.0f}", "black", anchor="mt", font_size=12)
    for i, (name, line) in enumerate((name, line) for name, line in lines.items() if line):
        draw.line([(left + (x - x0) / (x1 - x0) * (right - left), bottom - (y - y0) / (y1 - y0) * (bottom - top))
                   for x, y in line], COLORS[i], 2)
        draw.text((right, top + 4 + 16 * i), name, COLORS[i], anchor="rt", font_size=13)


def sheet(rows, side=128):
    """[(instruction, source, result, target)] -> a row for each; of a clip the first, middle and last frame."""
    columns = max([9 if len(source) > 1 else 3 for _, source, *_ in rows], default=1)
    page = Image.new("RGB", (columns * side, (side + 20) * max(1, len(rows))), "white")
    for i, (instruction, *clips) in enumerate(rows):
        ImageDraw.Draw(page).text((4, i * (side + 20) + 4), instruction, "black", font_size=11)
        frames = [clip[j] for clip in clips for j in sorted({0, len(clip) // 2, len(clip) - 1})]
        for j, frame in enumerate(frames):
            page.paste(Image.fromarray(frame).resize((side, side)), (j * side, i * (side + 20) + 20))
    return page


def main(arguments=None, kind=Trainer):
    """One stage from its command line; `kind` makes the Trainer. Returns the exit code."""
    try:
        args = settings(arguments)
        if args.plan:
            plan(args)
            return 0
        args.out.mkdir(parents=True, exist_ok=True)
        if args.check_data:
            return 0 if check_data(args) else 1
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")      # DCP, in a single process
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")   # a view, and not changed in place
        trainer = kind(args)
        trainer.resume()
        if trainer.processes.rank == 0:
            for problem in list(trainer.pairs.broken.values())[:10]:
                print(f"train.py: left out: {problem}", file=sys.stderr)
            weights = sum(p.numel() for p in trainer.parameters.values())
            print(f"train.py: {trainer.pairs.summary()}; {weights / 1e6:.2f} M weights train", file=sys.stderr)
        trainer.run()
        final = trainer.finish()
        if trainer.processes.rank == 0:
            print(final)
        if trainer.processes.count > 1:
            trainer.processes.wait()    # one that left while another still talks to it would be taken down with an error
            dist.destroy_process_group()
        return 0
    except (ValueError, OSError, Stop) as error:
        print(f"train.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train.py: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
