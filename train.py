"""Trains InstructX in the three stages of the paper (arXiv 2510.08485, section 3.3), from one straight script.

    python train.py --stage 1 --data data/train.jsonl --weights DIR --out runs/stage1
    python train.py --stage 2 --data data/train.jsonl --weights DIR --start runs/stage1/instructx --out runs/stage2
    python train.py --stage 3 --data data/clean.jsonl --weights DIR --start runs/stage2/instructx --out runs/stage3

    stage   trains                                   data              the DiT sees
    1       queries, LoRA, connector                 images            noisy latents
    2       these, the DiT and the source embedding  images and clips  noisy latents + source latents, reference latents
    3       as stage 2                               a clean subset    as stage 2

Data are JSON lines with `source`, `target`, `instruction` and, if any, `references`; paths are relative to the file. CSV files with
the columns of the open neighbors are read too: src_video, tgt_video, prompt, ref_image.

What is unusual: which samples a step sees, their noise, σ and dropped instructions are functions of (seed, step) alone. So there
is no loader state to save, reading ahead cannot change anything, and a run that was killed goes on with the very same numbers.

Precision: trained weights, their gradients and the optimizer are float32; matrix products run in `--precision` through autocast, which
stands in one place below; frozen weights are kept in `--precision`. Letters as in connector.py.
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
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, UnidentifiedImageError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from connector import InstructX, InstructXConfig, locate
from dit import WanDiT
from dit import read_config as dit_config
from edit import ANIMATED_FORMATS, IMAGE_FORMATS, IMAGE_OPTIONS, MediaError, Parser, decode, list_frames, number, read_frames
from mllm import Processor, Qwen2_5_VL, lora_layers, merge_lora
from mllm import read_config as mllm_config
from sampler import FlowSampler
from vae import WanVAE
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
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="JSON lines or CSV files")
    parser.add_argument("--weights", type=Path, required=True, help="weights folder with mllm/, dit/, vae/")
    parser.add_argument("--out", type=Path, required=True, help="checkpoints, metrics, curves and the result, instructx/")
    add("--start", None, "instructx/ folder of the stage before", Path, shown="the one in --weights, else fresh queries")
    add("--config", [], "KEY=VALUE settings of instructx/config.json (InstructXConfig in connector.py), such as image_queries=64 "
        "lora_rank=16 of a fresh start, or steps=20 guidance=3 of sampling", nargs="+", shown="as released, or as --start says")
    add("--steps", None, "optimizer steps", count, shown="paper: 20000, 20000, 5000 for stage 1, 2, 3")
    add("--image-batch", 128, "images per step; paper: 128", count)
    add("--video-batch", 32, "clips per step; paper: 32", count)
    add("--micro-batch", 8, "samples, all of one shape, that go through the models at once; a batch is the sum of several", count)
    add("--video-share", 0.6, "share of the steps of stage 2 or 3 that take clips; paper: 0.6", share)
    add("--lr", 1e-5, "learning rate; paper: 1e-5", positive)
    add("--warmup", 500, "steps until the learning rate is reached", number(int, 0, 10**9))
    add("--schedule", "constant", "of the learning rate after that; linear and cosine end at 0", choices=("constant", "linear", "cosine"))
    add("--weight-decay", 0.01, "of matrices; queries, word embeddings, norms, biases and modulation have none", positive)
    add("--clip", 1.0, "largest norm of the gradient", positive)
    add("--drop", 0.1, "probability of an empty instruction, for guidance", share)
    add("--sigma", "logit-normal", "how σ is drawn, before it is shifted", choices=("logit-normal", "uniform"))
    add("--image-shift", 3.0, "shift of σ for images", number(float, 0.01, 100))
    add("--video-shift", 5.0, "shift of σ for clips", number(float, 0.01, 100))
    add("--change-weight", 0.0, "how much more the loss counts where source and target differ; 0 is plain flow matching", positive)
    add("--area", 480 * 832, "larger pictures are scaled down to about this many pixels", count)
    add("--frames", 81, "longer clips are cut to this many frames", count)
    add("--cache", None, "folder for VAE latents, each computed once, and for the sizes of the data", Path, shown="none")
    add("--save-every", 500, "steps between checkpoints", count)
    add("--keep", 2, "checkpoints to keep", count)
    parser.add_argument("--check-data", action="store_true", help="only read every file of the data once, and list what is broken and why")
    add("--seed", 0, "of data order, noise, σ and dropped instructions", number(int, 0, 2**62))
    add("--workers", 2, "threads that read ahead", count)
    add("--device", "cuda" if torch.cuda.is_available() else "cpu", "where to train")
    add("--precision", None, "of matrix products and frozen weights", choices=("float32", "bfloat16"), shown="bfloat16 on CUDA, else float32")
    parser.add_argument("--train-all", action="store_true", help="train the whole language model instead of LoRA: for tiny models")
    args = parser.parse_args(arguments)
    args.steps = args.steps or PAPER_STEPS[args.stage]
    args.precision = args.precision or ("bfloat16" if args.device.startswith("cuda") else "float32")
    args.config = config_settings(args.config)
    if args.change_weight and args.stage == 1:
        raise ValueError("--change-weight is for stages 2 and 3: in stage 1 the DiT does not see the source")
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
    """(T, H, W) of what read_frames reads at `path`, from headers alone where that will do; it raises the same errors."""
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
            source, target, *references = (folder / path for path in (row["source"], row["target"], *(row.get("references") or [])))
            if not isinstance(row["instruction"], str):
                raise TypeError("the instruction is no text")
            yield Pair(where, source, target, references, row["instruction"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            yield ValueError(f"{where}: not an edit with source, target and instruction ({error!r})")


class Pairs:
    """The pairs of all data files, in buckets of one shape each so that a batch can be stacked, and their order.

    Two pairs share a bucket when clip length, working size and the sizes of their references agree. An epoch of images, or of
    clips, visits each pair, in chunks of one bucket; chunks are shuffled, so that the steps mix shapes.
    """

    def __init__(self, args, multiple, stride):
        self.args, self.multiple, self.stride = args, multiple, stride
        self.pairs, self.broken, self.buckets = [], {}, {False: {}, True: {}}      # broken: {where: why}, buckets: pair numbers
        for pair in (pair for file in args.data for pair in read_lines(file)):
            if isinstance(pair, Pair):
                self.pairs.append(pair)
            else:
                self.broken[str(pair).partition(": ")[0]] = str(pair)
        self.index = Index((args.cache or args.out) / "sizes.json")
        with ThreadPoolExecutor(args.workers) as pool:
            bar = tqdm(pool.map(self.try_shape, self.pairs), desc="sizes", total=len(self.pairs), disable=None, leave=False)
            self.shapes = list(bar)
        self.index.save()
        for i, shape in enumerate(self.shapes):
            if shape and (args.stage > 1 or shape[0][0] == 1):
                bucket = shape if args.stage > 1 else shape[:1]         # in stage 1 the DiT sees no references
                self.buckets[shape[0][0] > 1].setdefault(bucket, []).append(i)

    def summary(self):
        images, clips = (sum(map(len, self.buckets[video].values())) for video in (False, True))
        return f"{images} images and {clips} clips in {sum(map(len, self.buckets.values()))} buckets; {len(self.broken)} pairs are broken"

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
            raise ValueError(f"{pair.source} is {width}x{height}, {pair.target} {target[1]}x{target[0]}: another aspect, so no pair")
        length = min(length, target_length, self.args.frames)
        source = (length - 1) // self.stride * self.stride + 1, *self.working(height, width, self.args.area)
        if length > 1 and source[0] == 1:
            raise ValueError(f"{pair.source} has {length} frames; a clip should have {self.stride + 1} or more")
        area = source[1] * source[2]        # a reference costs at most as many tokens as a frame of the source
        return source, *((1, *self.working(*self.index(path)[1:], area)) for path in pair.references)

    def working(self, height, width, area):
        """The size that a picture is scaled to: no larger than it is, about `area` at most, sides in multiples for the models.

        Eight lengths from each power of two to the next, so that pictures of all sizes fall into few buckets.
        """
        scale = min(1.0, (area / (height * width)) ** 0.5)

        def side(pixels):
            units = max(1.0, pixels * scale / self.multiple)
            step = 2 ** max(0, int(math.log2(units)) - 3)
            return round(units / step) * step * self.multiple

        return side(height), side(width)

    def is_video(self, step):
        """Whether `step` takes clips, and how many steps before it took the same kind of data. Evenly spread, with no chance in it."""
        share = float(bool(self.buckets[True])) if not (self.buckets[True] and self.buckets[False]) else self.args.video_share
        clips = math.floor(share * step + 1e-9)
        video = math.floor(share * (step + 1) + 1e-9) > clips
        return video, clips if video else step - clips

    @functools.lru_cache(maxsize=4)
    def epoch(self, video, epoch):
        """[[pair number]], the chunks of one epoch. The last chunk of a bucket is filled up with others of that bucket."""
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
        count = max(1, round(batch / self.args.micro_batch))
        places = (divmod(before * count + i, chunks) for i in range(count))
        return video, [self.epoch(video, epoch)[i] for epoch, i in places]


def read(path, shape):
    """The frames at `path` in a working shape, uint8 (T, H, W, 3), and their rate. Raises ValueError where there are fewer."""
    length, height, width = shape
    media = read_frames(path, limit=length, size=(width, height))
    if len(media.frames) < length:
        raise ValueError(f"{path} has {len(media.frames)} frames that can be read, and {length} by its header")
    return media.frames[:length], float(media.fps or 16)


def outline(args):
    """The InstructX that `args` name on the meta device: everything about it but its weights, which are not read."""
    place = locate(args.weights, args.start)
    file = lambda name: (place[name] if place[name].is_dir() else place[name].parent) / "config.json"
    with torch.device("meta"):
        mllm, dit, vae = Qwen2_5_VL(mllm_config(file("mllm"))), WanDiT(dit_config(file("dit"))), WanVAE(vae_config(file("vae")))
    config = asdict(InstructXConfig.from_file(file("instructx"))) if "instructx" in place else {}
    return InstructX.untrained(mllm, Processor.from_pretrained(place["mllm"]), dit, vae, **config | args.config)


def check_data(args):
    """Reads every file of the data, and prints which pairs are broken and why. Returns whether all are whole."""
    model = outline(args)
    pairs = Pairs(args, model.multiple(), model.vae.temporal_stride)

    def examine(pair, shape):
        try:
            if shape:
                read(pair.target, shape[0])
                model.prompt(read(pair.source, shape[0])[0], pair.instruction, [read(*rest)[0][0] for rest in zip(pair.references, shape[1:])])
        except Exception as error:
            pairs.broken[pair.where] = f"{pair.where}: {error}"

    with ThreadPoolExecutor(args.workers) as pool:
        for _ in tqdm(pool.map(examine, pairs.pairs, pairs.shapes), desc="pairs", total=len(pairs.pairs), disable=None, leave=False):
            pass
    print("\n".join([*sorted(pairs.broken.values()), pairs.summary()]))
    return not pairs.broken


@dataclass
class Picture:
    """A picture on its way into the DiT: its latents if they are known, else its frames, and where to keep the latents."""

    z: torch.Tensor | None          # (1, 16, F, h, w)
    frames: np.ndarray | None       # uint8 (T, H, W, 3)
    file: Path | None


class Latents:
    """Encodes pictures, each once where there is a folder for it.

    The key is the content of the media file, the working shape and the VAE, so latents can't go stale, and with known latents a
    clip need not even be decoded. Each is encoded alone: in a batch the last bits could depend on what else was in it.
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
        return torch.cat([self.encode(picture) if picture.z is None else picture.z.to(self.vae.conv1.weight.device) for picture in pictures])

    def encode(self, picture):
        video = torch.tensor(picture.frames, device=self.vae.conv1.weight.device).permute(3, 0, 1, 2)[None]     # (1, 3, T, H, W)
        z = self.vae.encode(video.to(self.vae.conv1.weight.dtype) / 127.5 - 1)
        if picture.file:
            picture.file.parent.mkdir(parents=True, exist_ok=True)
            partial = picture.file.with_suffix(f".{os.getpid()}.partial")
            save_file({"z": z.cpu().contiguous()}, partial)
            os.replace(partial, picture.file)
        return z


@dataclass
class Sample:
    """One pair, read and made ready."""

    where: str
    seed: int               # of its noise and σ
    inputs: dict            # of the MLLM
    target: Picture
    source: Picture | None  # in stage 1 the MLLM alone sees the source and the references
    references: list


# Training.


def trainable(model, stage, train_all):
    """{name: parameter} that this stage trains, made float32; all others are frozen."""
    if train_all and lora_layers(model.mllm):
        merge_lora(model.mllm)
        model.config.lora_rank = 0
    if stage > 1:
        model.dit.add_source_embedding()                # starts as a copy: the paper's addition, exactly
    model.requires_grad_(False)
    prefixes = ("connector.", *(["dit."] if stage > 1 else []), *(["mllm.model."] if train_all else []))
    chosen = {}
    for name, parameter in model.named_parameters():
        if name.startswith(prefixes) or ".lora_" in name:
            parameter.data = parameter.data.float().clone()     # a clone, since loaded weights are mapped files
            chosen[name] = parameter.requires_grad_()
    return chosen


def flow_loss(dit, context, z, source, references, sigma, noise, sampler, change_weight=0.0):
    """Flow matching: the error of the DiT's velocity against ε - x at x_σ = (1-σ)x + σε. Returns one loss per sample, (B,).

    z, source and noise (B, 16, F, h, w), references [(B, 16, 1, h', w')], sigma (B,), context (B, Q, C).
    """
    velocity = dit(sampler.add_noise(z, noise, sigma), 1000 * sigma, context, source=source, references=references)
    error = (velocity - sampler.target(z, noise)).square()                                  # (B, 16, F, h, w)
    if change_weight:
        # An edit changes little of the picture, and all the rest is learnt first; weights have mean 1 over each sample.
        change = (z - source).square().mean(dim=1, keepdim=True)                                    # (B, 1, F, h, w)
        weight = 1 + change_weight * change / change.amax(dim=(2, 3, 4), keepdim=True).clamp(min=1e-6)
        error = error * (weight / weight.mean(dim=(2, 3, 4), keepdim=True))
    return error.flatten(1).mean(dim=1)


class Stop(Exception):
    """What ends a run that was going well."""


def hash_of(*values):
    """A 63-bit seed from integers, so that neighboring steps have unrelated noise."""
    return int.from_bytes(hashlib.sha256(repr(values).encode()).digest()[:8], "little") >> 1


def learning_rate(step, args):
    """Linear warm-up, then constant (paper), or falling to 0 along a line or a cosine."""
    done = min(1, max(0, step + 1 - args.warmup) / max(1, args.steps - args.warmup))
    falling = {"constant": 1, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[args.schedule]
    return args.lr * min(1, (step + 1) / max(1, args.warmup)) * falling


class Trainer:
    """One training run: the models, the optimizer, and what a step does with them."""

    def __init__(self, args):
        self.args, self.device, self.compute = args, torch.device(args.device), getattr(torch, args.precision)
        place = locate(args.weights, args.start)
        self.model = InstructX.from_pretrained(args.weights, args.device, self.compute, args.start, **args.config)
        # What is exported beside queries, connector and LoRA: what is trained here, or was before.
        self.export = {name: place[name].parent == place.get("instructx") for name in ("mllm", "dit")}
        self.export = {"mllm": self.export["mllm"] or args.train_all, "dit": self.export["dit"] or args.stage > 1}
        self.parameters = trainable(self.model, args.stage, args.train_all)
        # Decay would wear down the embeddings of words that are not seen, and draw queries, norms, biases and modulation to zero.
        plain = [name for name, p in self.parameters.items() if p.ndim < 2 or any(x in name for x in ("queries", "modulation", "embed_tokens"))]
        groups = [{"params": [p for name, p in self.parameters.items() if name not in plain], "weight_decay": args.weight_decay},
                  {"params": [self.parameters[name] for name in plain], "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
        self.pairs = Pairs(args, self.model.multiple(), self.model.vae.temporal_stride)
        if not any(self.pairs.buckets.values()):
            why = next(iter(self.pairs.broken.values()), "these are clips, and stage 1 takes images")
            raise ValueError(f"no usable pair in {', '.join(map(str, args.data))}: {why}")
        self.latents = Latents(self.model.vae, args.cache)
        self.step, self.unusable = 0, 0

    def load(self, step):
        """What a step needs from disk: (is_video, [[Sample]]). A pair that is broken is left out, and named in `broken`."""
        video, plan = self.pairs.plan(step)
        batches = [[self.sample(number, hash_of(self.args.seed, step, i, j)) for j, number in enumerate(numbers)]
                   for i, numbers in enumerate(plan)]
        return video, [samples for batch in batches if (samples := [sample for sample in batch if sample])]

    def sample(self, number, seed):
        """One pair as a Sample, or None if it is broken."""
        pair, shape = self.pairs.pairs[number], self.pairs.shapes[number]
        words = pair.instruction if np.random.default_rng(seed).random() >= self.args.drop else ""
        try:
            frames, fps = read(pair.source, shape[0])
            pictures = [read(path, one)[0] for path, one in zip(pair.references, shape[1:])]
            inputs = self.model.prompt(frames, words, [picture[0] for picture in pictures], fps)
            target, source, references = self.latents.look_up(pair.target, shape[0]), None, []
            if self.args.stage > 1:
                source = self.latents.look_up(pair.source, shape[0], frames)
                references = [self.latents.look_up(*rest) for rest in zip(pair.references, shape[1:], pictures)]
            return Sample(pair.where, seed, inputs, target, source, references)
        except Exception as error:              # whatever is wrong with one file, the run goes on
            self.pairs.broken[pair.where] = f"{pair.where}: {error}"

    def loss(self, samples, video):
        """Losses and σ of one micro-batch, each (B,). All random numbers come from the samples' seeds, on the CPU."""
        args = self.args
        z = self.latents([sample.target for sample in samples]).float()                             # (B, 16, F, h, w)
        source = self.latents([sample.source for sample in samples]).float() if args.stage > 1 else None
        references = [self.latents(pictures).float() for pictures in zip(*(sample.references for sample in samples))]
        sampler = FlowSampler(shift=args.video_shift if video else args.image_shift)
        generators = [torch.Generator().manual_seed(sample.seed) for sample in samples]
        sigma = torch.cat([sampler.draw_sigma(1, generator, args.sigma == "uniform") for generator in generators]).to(self.device)
        noise = torch.stack([torch.randn(z.shape[1:], generator=generator) for generator in generators]).to(self.device)
        inputs = self.model.processor.collate([sample.inputs for sample in samples])
        with torch.autocast(self.device.type, self.compute, enabled=self.compute != torch.float32):
            context = self.model.context(inputs, video)
            losses = flow_loss(self.model.dit, context, z, source, references, sigma, noise, sampler, args.change_weight)
        return losses, sigma

    def update(self, video, batches):
        """One optimizer step -> its figures. A step whose loss or gradient is not finite changes nothing and says so."""
        args, count = self.args, sum(map(len, batches))
        losses, sigmas = [], []
        for samples in batches:
            loss, sigma = self.loss(samples, video)
            (loss.sum() / count).backward()
            losses.append(loss.detach())
            sigmas.append(sigma)
        losses, sigmas = (torch.cat(values).cpu() if values else torch.empty(0) for values in (losses, sigmas))
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), args.clip).item()
        used = count > 0 and math.isfinite(norm) and bool(losses.isfinite().all())
        rate = learning_rate(self.step, args)
        if used:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.unusable = 0 if used else self.unusable + 1
        bins = (sigmas * SIGMA_BINS).long().clamp(max=SIGMA_BINS - 1)
        by_sigma = [losses[bins == i].mean().item() if (bins == i).any() else None for i in range(SIGMA_BINS)]
        return {"step": self.step, "video": video, "samples": count, "loss": losses.mean().item() if count else None,
                "by_sigma": by_sigma, "gradient": norm, "lr": rate, "used": used, "broken": len(self.pairs.broken)}

    def run(self):
        """Steps until --steps, with a checkpoint every --save-every and at the end."""
        args, ahead = self.args, deque()
        self.metrics = Metrics(args.out, self.step)
        start = time.time()
        with ThreadPoolExecutor(args.workers) as pool, tqdm(initial=self.step, total=args.steps, desc=f"stage {args.stage}", disable=None) as bar:
            try:
                while self.step < args.steps:
                    while len(ahead) <= args.workers and self.step + len(ahead) < args.steps:
                        ahead.append(pool.submit(self.load, self.step + len(ahead)))
                    began = time.perf_counter()
                    video, batches = ahead.popleft().result()
                    waited = time.perf_counter() - began
                    figures = self.update(video, batches)
                    seconds = time.perf_counter() - began
                    self.metrics.write({**figures, "seconds": round(seconds, 3), "waited": round(waited, 3),
                                        "samples_per_second": round(figures["samples"] / seconds, 2), "memory": memory(self.device)})
                    self.step += 1
                    bar.update()
                    bar.set_postfix(loss=figures["loss"], gradient=figures["gradient"], refresh=False)
                    if self.unusable:
                        self.complain(figures, batches)
                    if self.step % args.save_every == 0 or self.step == args.steps:
                        self.save()
                        self.metrics.draw()
            finally:
                pool.shutdown(cancel_futures=True)

    def complain(self, figures, batches):
        """Says why a step was skipped. Raises Stop if it is the tenth in a row."""
        names = ", ".join(sample.where for samples in batches for sample in samples) or next(iter(self.pairs.broken.values()), "no data")
        what = f"loss {figures['loss']}, gradient {figures['gradient']}" if figures["samples"] else "no sample could be read"
        if self.unusable >= PATIENCE:
            raise Stop(f"{PATIENCE} steps in a row were unusable; the last is step {figures['step']}: {what}; its batch: {names}")
        tqdm.write(f"train.py: step {figures['step']} skipped: {what}; its batch: {names}", file=sys.stderr)

    def save(self):
        """Writes checkpoints/step-N, which appears whole or not at all, and removes those before the last `--keep`."""
        final = self.args.out / "checkpoints" / f"step-{self.step:07d}"
        partial = final.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            tensors = {name: p.detach() for name, p in self.parameters.items()}
            for name, parameter in self.parameters.items():
                tensors |= {f"{key} {name}": value for key, value in self.optimizer.state.get(parameter, {}).items()}
            save_file(tensors, partial / "state.safetensors")
            state = {"step": self.step, "unusable": self.unusable, "settings": lasting(self.args)}
            (partial / "state.json").write_text(json.dumps(state, indent=2))
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
        except Exception as error:              # of a full disk, safetensors has an error type of its own
            shutil.rmtree(partial, ignore_errors=True)
            raise Stop(f"checkpoint {final} could not be written, the one before is whole ({error})") from None
        for old in [*checkpoints(self.args.out)[:-self.args.keep], *final.parent.glob("*.partial")]:
            shutil.rmtree(old)

    def resume(self):
        """Goes on from the last checkpoint, if there is one. Raises ValueError when it was made with other settings."""
        found = checkpoints(self.args.out)
        if not found:
            return
        state, now = json.loads((found[-1] / "state.json").read_text()), lasting(self.args)
        odd = [f"{name} was {state['settings'].get(name)} and is {value}" for name, value in now.items() if state["settings"].get(name) != value]
        if odd:
            raise ValueError(f"{found[-1]} was made with other settings ({'; '.join(odd)}); give the same, or another --out")
        tensors = load_file(found[-1] / "state.safetensors")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[name])
        moments = {}
        for key, value in tensors.items():
            kind, _, name = key.rpartition(" ")
            if kind:
                moments.setdefault(name, {})[kind] = value.to(self.device, copy=True)
        for name, values in moments.items():
            self.optimizer.state[self.parameters[name]] = values
        self.step, self.unusable = state["step"], state["unusable"]
        print(f"train.py: goes on at step {self.step}, from {found[-1]}", file=sys.stderr)

    def finish(self):
        """Writes the result, OUT/instructx, which appears when it is whole."""
        final = self.args.out / "instructx"
        partial = final.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        self.model.save_pretrained(partial, **self.export)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        return final


def lasting(args):
    """The settings that a resumed run must share with its checkpoint: all that the result depends on."""
    free = {"weights", "start", "out", "data", "device", "workers", "keep", "save_every", "cache"}
    free |= {"steps"} if args.schedule == "constant" else set()
    return {name: value for name, value in sorted(vars(args).items()) if name not in free}


def checkpoints(out):
    """Whole checkpoints, oldest first."""
    return sorted(path for path in (out / "checkpoints").glob("step-*") if path.suffix != ".partial")


# What a trainer sees.


def memory(device):
    """Peak GB so far: of the GPU, else of the process."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e9, 2)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9, 2)


class Metrics:
    """OUT/metrics.jsonl, one line for each step, and OUT/curves.png. Lines from `step` on are dropped: they will come again."""

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
        kinds = {name: lambda row, video=video: row["loss"] if row["video"] == video else None for name, video in (("images", False), ("clips", True))}
        bins = {f"σ {i / SIGMA_BINS:.2f} to {(i + 1) / SIGMA_BINS:.2f}": lambda row, i=i: row["by_sigma"][i] for i in range(SIGMA_BINS)}
        panels = {"loss": kinds, "loss by σ": bins, "norm of the gradient": {"": lambda row: row["gradient"]},
                  "learning rate": {"": lambda row: row["lr"]}}
        for i, (title, curves) in enumerate(panels.items()):
            panel(ImageDraw.Draw(page), (600 * (i % 2), 400 * (i // 2)), title,
                  {name: [(row["step"], value(row)) for row in self.rows] for name, value in curves.items()})
        page.save(self.file.with_name("curves.partial"), format="PNG")
        os.replace(self.file.with_name("curves.partial"), self.file.with_name("curves.png"))


COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")


def panel(draw, corner, title, curves, width=600, height=400, points=150):
    """One plot: {name: [(x, y or None)]}, each averaged down to at most `points` points."""
    left, top, right, bottom = corner[0] + 70, corner[1] + 40, corner[0] + width - 20, corner[1] + height - 40
    lines = {}
    for name, pairs in curves.items():
        pairs = np.array([(x, y) for x, y in pairs if y is not None and math.isfinite(y)], float).reshape(-1, 2)
        lines[name] = [part.mean(axis=0) for part in np.array_split(pairs, min(points, max(1, len(pairs)))) if len(part)]
    everything = np.array([point for line in lines.values() for point in line]).reshape(-1, 2)
    if not len(everything):
        return
    (x0, y0), (x1, y1) = everything.min(axis=0), everything.max(axis=0)
    y0, x1 = min(0.0, y0), max(x1, x0 + 1)
    y1 = max(y1, y0 + 1e-12)
    draw.text((left, corner[1] + 12), title, "black", font_size=16)
    for i in range(5):
        y = bottom - i * (bottom - top) / 4
        draw.line((left, y, right, y), "#dddddd")
        draw.text((left - 8, y), f"{y0 + i * (y1 - y0) / 4:.3g}", "black", anchor="rm", font_size=12)
        x = left + i * (right - left) / 4
        draw.text((x, bottom + 8), f"{x0 + i * (x1 - x0) / 4:.0f}", "black", anchor="mt", font_size=12)
    for i, (name, line) in enumerate(lines.items()):
        place = [(left + (x - x0) / (x1 - x0) * (right - left), bottom - (y - y0) / (y1 - y0) * (bottom - top)) for x, y in line]
        draw.line(place, COLORS[i], 2)
        draw.text((right, top + 4 + 16 * i), name, COLORS[i], anchor="rt", font_size=13)


def main(arguments=None):
    try:
        args = settings(arguments)
        args.out.mkdir(parents=True, exist_ok=True)
        if args.check_data:
            return 0 if check_data(args) else 1
        trainer = Trainer(args)
        for problem in list(trainer.pairs.broken.values())[:10]:
            print(f"train.py: left out: {problem}", file=sys.stderr)
        weights = sum(p.numel() for p in trainer.parameters.values())
        print(f"train.py: {trainer.pairs.summary()}; {weights / 1e6:.2f} M weights train", file=sys.stderr)
        trainer.resume()
        trainer.run()
        print(trainer.finish())
        return 0
    except (ValueError, OSError, Stop) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
