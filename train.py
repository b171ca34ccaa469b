"""Trains InstructX in the three stages of the paper (arXiv 2510.08485, section 3.3), in one script.

    python train.py --stage 1 --data all.jsonl   --weights DIR --out runs/1
    python train.py --stage 2 --data all.jsonl   --weights DIR --out runs/2 --start runs/1/instructx
    python train.py --stage 3 --data clean.jsonl --weights DIR --out runs/3 --start runs/2/instructx
    torchrun --nproc-per-node 8 -- train.py ...             # the same run on eight GPUs

    stage   trains                             data              the DiT sees
    1       queries, connector, LoRA           images            noisy latents
    2       these, DiT and source embedding    images, clips     and latents of source, references
    3       as stage 2                         a clean subset    as stage 2

Data are JSON lines, one edit each: {"source": FILE, "target": FILE, "instruction": TEXT} and
optionally "references": [FILE, ...], or CSV in Kiwi-Edit's format. Paths are relative to the data
file. A clip is a video file or a folder of frames. A broken edit is reported and skipped. --out
receives metrics.jsonl, curves.png, validation/, checkpoints/ and at the end instructx/, which
edit.py takes as --instructx.

What is unusual: the samples of a step, their noise, σ and dropped instructions depend on (seed,
step) alone. So there is no loader state to save, and reading ahead changes nothing. The same
command resumes from the last checkpoint, on any number of processes, with the numbers of an
uninterrupted run.

Precision: trained weights, gradients and the optimizer's moments are float32. Matrix products run
in --precision through autocast, and frozen weights are stored in it. The VAE keeps its dtype.

Letters: B samples, F latent frames, H W pixels, h w = H/8 W/8, Q queries.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback

import argparse
import contextlib
import fcntl
import functools
import hashlib
import json
import math
import os
import shutil
import sys
import time
import warnings
from collections import defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

from edit import (
    MediaError,
    Parser,
    check_device,
    is_out_of_memory,
    media_shape,
    number,
    peak_memory,
    read_frames,
    read_lines,
    read_row,
    sweep,
    whole,
)
from edit import say as print_line

PAPER_STEPS = {1: 20000, 2: 20000, 3: 5000}
CLIP_NORM = 1.0  # upper bound of the gradient's norm
WEIGHT_DECAY = 0.01  # of matrices only
SAVE_MINUTES = 10  # a checkpoint is written at least this often
KEEP = 2  # number of checkpoints kept
REPORTED = 20  # broken pairs reported on the terminal; metrics.jsonl counts all
PATIENCE = 10  # unusable steps in a row that end a run
READERS = 2  # threads that read ahead
HELD_OUT, RENDERED, DRAWS = 32, 8, 4  # --validate: edits in the loss, edits as pictures, noises
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets it and RANK
RANK = int(os.environ.get("RANK", 0)) if PROCESSES > 1 else 0
IS_FIRST = RANK == 0  # only this process writes files and messages
QUIET = None if IS_FIRST else True  # tqdm(disable=...): None shows a bar on a terminal only


def settings(arguments=None):
    """Parses the command line. A bad value ends the process with one line and exit code 2.

    "paper" marks values from the paper. The others are our choice.
    """
    help_format = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="train.py", description=__doc__, formatter_class=help_format)
    count, share = number(int, 1, 10**9), number(float, 0, 1)
    rate, shift = number(float, 0, 1e9), number(float, 0.01, 100)
    schedules, distributions = ("constant", "linear", "cosine"), ("logit-normal", "uniform")
    file, folder = {"type": Path, "metavar": "FILE"}, {"type": Path, "metavar": "DIR"}

    def add(name, help, default=None, type=None, **more):
        help += "" if default is None else " (default: %(default)s)"
        if "choices" not in more:
            more.setdefault("metavar", "N")
        group.add_argument(name, help=help, default=default, type=type, **more)

    group = parser.add_argument_group("data")
    add("--data", "JSON lines or .csv", nargs="+", required=True, **file)
    add("--video-share", "of the steps of stages 2 and 3 that take clips; paper: 0.6", 0.6, share)
    add("--area", "larger pictures are scaled down to about this many pixels", 480 * 832, count)
    add("--frames", "longer clips are cut to this many frames", 81, count)
    add("--cache", "folder that keeps latents and sizes of media files", **folder)
    add("--validate", f"held-out edits: loss of {HELD_OUT}, pictures of {RENDERED}", **file)
    add("--validate-every", "steps between validations", 500, count)

    group = parser.add_argument_group("stage and objective")
    add("--stage", "what trains on which data", type=int, choices=(1, 2, 3), required=True)
    add("--start", "instructx/ of the stage before (default: that of --weights, if any)", **folder)
    add("--config", "fields of InstructXConfig, such as steps=20", nargs="+", metavar="KEY=VALUE")
    add("--drop", "probability of an empty instruction, for guidance", 0.1, share)
    add("--sigma", "distribution of σ before it is shifted", "logit-normal", choices=distributions)
    add("--image-shift", "shift of σ for images", 3.0, shift)
    add("--video-shift", "shift of σ for clips", 5.0, shift)
    add("--change-weight", "extra weight of the loss where source and target differ", 0.0, rate)
    rank = number(int, 0, 10**4)
    add("--dit-lora", "rank of LoRA that trains in place of the DiT's weights; 0: none", 0, rank)

    group = parser.add_argument_group("optimizer")
    add("--steps", "(default: the paper's 20000, 20000, 5000 in stages 1, 2, 3)", type=count)
    add("--image-batch", "images per step; paper: 128", 16, count)
    add("--video-batch", "clips per step; paper: 32", 4, count)
    add("--micro-batch", "at most so many samples at once, over all processes", 8, count)
    add("--lr", "learning rate; paper: 1e-5 for the 14B; try 1e-3 for weights/shapes", 1e-5, rate)
    add("--muon-lr", "of Muon for the DiT's matrices, about 20 times --lr; 0: AdamW", 0.0, rate)
    add("--warmup", "steps until the learning rate is reached", 100, number(int, 0, 10**9))
    add("--schedule", "of the learning rate after that", "constant", choices=schedules)

    group = parser.add_argument_group("run")
    add("--weights", "with mllm/, dit/, vae/", required=True, **folder)
    add("--out", "for all results; the same command goes on there", required=True, **folder)
    add("--save-every", f"steps between checkpoints, or {SAVE_MINUTES} minutes", 500, count)
    add("--seed", "of data order, noise, σ and dropped instructions", 0, number(int, 0, 2**62))
    add("--device", "such as cpu or cuda (default: cuda where there is one)", metavar="NAME")
    text = "of matrix products and frozen weights (default: bfloat16 on CUDA, else float32)"
    add("--precision", text, choices=("float32", "bfloat16"))
    text = "compute each layer again in the backward pass: less memory, a third more time"
    group.add_argument("--gradient-checkpointing", help=text, action="store_true")

    args = parser.parse_args(arguments)
    args.steps = args.steps or PAPER_STEPS[args.stage]
    for name in ("change_weight", "dit_lora", "muon_lr"):
        if args.stage == 1 and getattr(args, name):
            option = "--" + name.replace("_", "-")
            parser.error(f"{option}: stage 1 neither trains the DiT nor shows it the source")
    if args.muon_lr and args.dit_lora:
        parser.error("--muon-lr trains the matrices of the DiT, which --dit-lora leaves frozen")
    return args


if __name__ == "__main__":
    settings()  # answers --help and mistyped options before torch is imported, which takes seconds

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from PIL import Image, ImageColor, ImageDraw
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from tqdm import tqdm

from connector import InstructX, InstructXConfig, locate, pad, recompute_blocks, reference_size
from dit import stored_dtype
from mllm import LoRALinear, lora_layers
from sampler import FlowSampler
from vae import to_video


class TrainingError(Exception):
    """An error after a run has started. The message gives the reason."""


def complete(args):
    """Fills in the settings that need torch and the models: device, precision, --config.

    Raises ValueError for a device that is not available and for an unusable value.
    """
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and PROCESSES > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    check_device(name)
    args.device = torch.device(name)
    args.precision = args.precision or ("bfloat16" if args.device.type == "cuda" else "float32")
    args.config = dict(config_setting(pair) for pair in args.config or [])
    for file in [*args.data, *filter(None, [args.validate])]:
        if not file.is_file():  # a pipe could block, and resuming reads the data again
            raise ValueError(f"there is no data file {file}")
    FlowSampler(solver=args.config.get("solver", "unipc"))  # raises for an unknown solver


def config_setting(pair):
    """Reads "steps=20" as ("steps", 20). Raises ValueError for unusable settings."""
    name, _, text = pair.partition("=")
    fixed = ("mllm_dim", "context_dim", "frame_resizes")  # by the models
    types = {key: kind for key, kind in InstructXConfig.__annotations__.items() if key not in fixed}
    if name not in types:
        raise ValueError(f"--config {pair}: unknown {name!r}; there are {', '.join(types)}")
    least = {"lora_rank": 0, "guidance": 1, "mllm_frames": 2}
    try:
        if types[name] is str:
            return name, text
        if types[name] is bool:
            return name, {"true": True, "false": False}[text]
        lowest = least.get(name, 1 if types[name] is int else 1e-3)
        return name, number(types[name], lowest, 10**6)(text)
    except KeyError:
        raise ValueError(f"--config {pair}: should be true or false") from None
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"--config {pair}: {error}") from None


# Data: the list of edits, the edits of a step, and reading them.


@dataclass
class Pair:
    """One edit of the data."""

    where: str  # file and line
    source: Path
    target: Path
    references: list
    instruction: str


class Pairs:
    """The edits of all data files, in buckets of one shape so that a batch can be stacked.

    Two edits share a bucket if they agree in length, working size and the sizes of their
    references. An epoch of images, or of clips, visits each edit once, in chunks of one bucket.
    Chunks are shuffled, so steps mix shapes.
    """

    def __init__(self, args, files, multiple, stride, padded_references=False):
        self.args, self.multiple, self.stride = args, multiple, stride
        self.padded_references = padded_references  # see InstructX.reference_for_dit
        self.pairs, self.broken = [], {}  # broken: {file and line: message}
        for file in files:
            for i, line in read_lines(file):
                self.add(f"{file}:{i}", file.parent, line)

        cache = (args.cache or args.out) / "sizes.json"
        self.sizes = {}
        with contextlib.suppress(Exception):  # none yet, or damaged
            [(digest, sizes)] = json.loads(cache.read_text()).items()
            self.sizes = sizes if digest == json_hash(sizes) else {}
        count = len(self.sizes)
        with ThreadPoolExecutor(READERS) as pool:
            shapes = pool.map(self.try_shape, self.pairs)
            bar = tqdm(shapes, "sizes", len(self.pairs), leave=False, disable=QUIET)
            self.shapes = list(bar)  # of each pair: (source's shape, references' shapes...) or None
        if len(self.sizes) > count:
            write_cache(cache, json.dumps({json_hash(self.sizes): self.sizes}).encode())
        rows = [(pair.instruction, shape) for pair, shape in zip(self.pairs, self.shapes)]
        self.digest = hashlib.sha256(repr(rows).encode()).hexdigest()

        self.buckets = {False: {}, True: {}}  # {is_video: {shape: [number in pairs]}}
        for i, shape in enumerate(self.shapes):
            if shape and (args.stage > 1 or shape[0][0] == 1):
                bucket = shape if args.stage > 1 else shape[:1]  # stage 1: no references in the DiT
                self.buckets[shape[0][0] > 1].setdefault(bucket, []).append(i)
        self.cached_order = functools.lru_cache(maxsize=4)(self.order)
        self.reported = 0 if IS_FIRST else len(self.broken)  # so far equal in all processes

    def add(self, where, folder, line):
        try:
            row = read_row(line, folder, ("source", "target"))
            names = ("source", "target", "references", "instruction")
            self.pairs.append(Pair(where, *(row[name] for name in names)))
        except ValueError as error:
            self.mark_broken(where, error)

    def mark_broken(self, where, error):
        self.broken[where] = f"{where}: {one_line(error)}"

    def report(self):
        """Reports new broken pairs, up to REPORTED in all."""
        for problem in list(self.broken.values())[self.reported : REPORTED]:
            print_line(f"train.py: left out: {problem}", sys.stderr)
        self.reported = len(self.broken)

    def summary(self):
        images, clips = (sum(map(len, self.buckets[video].values())) for video in (False, True))
        return f"{images} images and {clips} clips, and {len(self.broken)} broken pairs"

    def try_shape(self, pair):
        try:
            return self.shape(pair)
        except Exception as error:
            self.mark_broken(pair.where, error)

    def shape(self, pair):
        """((frames, height, width) of source and target, (1, height, width) of each reference)."""
        length, height, width, rate = self.size(pair.source)
        target_length, target_height, target_width, target_rate = self.size(pair.target)
        files = f"{pair.source} and {pair.target}"
        if (length > 1) != (target_length > 1):
            raise ValueError(f"{files}: one is an image, one a clip")
        if abs(math.log(height / width * target_width / target_height)) > 0.1:
            text = f"{width}x{height} and {target_width}x{target_height}: another aspect"
            raise ValueError(f"{files} are {text}")
        length = min(length, target_length, self.args.frames)
        # Frames are paired by index. Over the clip they may drift apart by half a frame.
        if rate and target_rate and abs(rate / target_rate - 1) * length > 0.5:
            text = f"{rate:.6g} and {target_rate:.6g} frames per second, not one rate"
            raise ValueError(f"{files} have {text}")
        frames = (length - 1) // self.stride * self.stride + 1
        if length > 1 and frames == 1:
            raise ValueError(f"{files} share {length} frames; a clip has {self.stride + 1} or more")
        source = frames, *self.working_size(height, width)
        references = []
        for path in pair.references:
            reference_frames, height, width, _ = self.size(path)
            if reference_frames > 1:
                raise ValueError(f"{path} is a clip; a reference is an image")
            size = reference_size(height, width, source[1] * source[2])
            references.append((1, *(source[1:] if self.padded_references else size)))
        return source, *references

    def size(self, path):
        """(frames, height, width, rate) of a media file, remembered until the file changes."""
        if not path.is_file() and not path.is_dir():
            raise MediaError(f"{path} does not exist, or is no file and no folder")
        stat = path.stat()
        key = f"{path} {stat.st_size} {stat.st_mtime_ns}"
        if key not in self.sizes:
            frames, height, width = media_shape(path)
            is_video_file = frames > 1 and path.is_file()
            rate = float(read_frames(path, limit=1).fps or 0) if is_video_file else 0.0
            self.sizes[key] = frames, height, width, rate
        return self.sizes[key]

    def working_size(self, height, width):
        """(height, width) for training: about --area or less, never enlarged, valid for the models.

        From one power of two to the next there are eight lengths, so that pictures of all sizes
        fall into few buckets.
        """
        scale = min(1.0, (self.args.area / (height * width)) ** 0.5)

        def side(pixels):
            units = max(1.0, pixels * scale / self.multiple)
            step = 2 ** max(0, int(math.log2(units)) - 3)
            return round(units / step) * step * self.multiple

        return side(height), side(width)

    def is_video(self, step):
        """(True if `step` takes clips, number of earlier steps of the same kind).

        Steps with clips are evenly spaced, not drawn at random.
        """
        mixed = self.buckets[False] and self.buckets[True]
        share = self.args.video_share if mixed else float(bool(self.buckets[True]))
        clips = math.floor(share * step + 1e-9)
        video = math.floor(share * (step + 1) + 1e-9) > clips
        return video, clips if video else step - clips

    def batch_sizes(self, video):
        """(samples per step, samples per chunk): the largest divisor up to --micro-batch."""
        batch = self.args.video_batch if video else self.args.image_batch
        sizes = range(1, min(batch, self.args.micro_batch) + 1)
        return batch, max(size for size in sizes if batch % size == 0)

    def order(self, video, epoch):
        """The chunks of an epoch, [[number of a pair]].

        The last chunk of a bucket is filled up with other pairs of that bucket.
        """
        rng, chunks = np.random.default_rng([self.args.seed, video, epoch]), []
        _, size = self.batch_sizes(video)
        for numbers in self.buckets[video].values():
            order = rng.permutation(numbers).tolist()
            order += order[: -len(order) % size] if len(order) > size else []
            chunks += [order[start : start + size] for start in range(0, len(order), size)]
        return [chunks[i] for i in rng.permutation(len(chunks))]

    def plan(self, step):
        """The pairs of `step`: (is_video, [[number of a pair]]), one list per micro-batch."""
        video, steps_before = self.is_video(step)
        batch, size = self.batch_sizes(video)
        count, chunks = batch // size, len(self.cached_order(video, 0))
        numbers = range(steps_before * count, (steps_before + 1) * count)
        return video, [self.cached_order(video, i // chunks)[i % chunks] for i in numbers]


def json_hash(value):
    """The SHA-256 of a value's JSON, in hexadecimal digits."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def one_line(error):
    """The message of an error on one line."""
    return " ".join(str(error).split())


def write_cache(file, content):
    """Writes a cache file. Returns False on failure: a run can go on without its cache."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole(file) as partial:
            partial.write_bytes(content)
        return True
    except OSError as error:
        say(f"{file} could not be written ({error}); going on without the cache")
        return False


def read(path, shape):
    """The frames at `path` in a working shape, uint8 (T, H, W, 3), and their rate.

    Raises ValueError if the file has fewer frames than its header states.
    """
    length, height, width = shape
    media = read_frames(path, limit=length, size=(width, height))
    readable = len(media.frames)
    if readable < length:
        raise ValueError(f"{path} has {readable} readable frames, and {length} by its header")
    return media.frames, float(media.fps or 16)


@dataclass
class Picture:
    """An image or clip on its way into the DiT."""

    z: torch.Tensor | None  # latents (1, 16, F, h, w), if cached
    frames: np.ndarray | None  # uint8 (T, H, W, 3), if not cached
    file: Path | None  # cache file of the latents


class Latents:
    """Encodes pictures. With a cache folder, each is encoded only once.

    The cache key is a hash of media file, working shape and VAE, so entries cannot go stale. Each
    picture is encoded alone, because in a batch its last bits depend on the others.
    """

    def __init__(self, vae, folder):
        self.vae, self.folder = vae, folder
        self.vae_hash = hashlib.sha256(repr(vae.config).encode())
        for tensor in vae.encoder.state_dict().values():
            self.vae_hash.update(tensor.detach().float().cpu().numpy().tobytes())
        for file in folder.rglob(".*") if folder else ():  # unfinished files of killed runs
            if file.is_file() and time.time() - file.stat().st_mtime > 86400:
                file.unlink(missing_ok=True)

    def look_up(self, path, shape, frames=None):
        """The Picture at `path`. Its `frames` may be passed in. Thread-safe: runs no VAE."""
        file = self.file(path, shape) if self.folder else None
        if file and file.is_file():
            with contextlib.suppress(Exception):  # damaged: encode again
                tensors = load_file(file)
                if torch.equal(tensors["sha256"], self.checksum(tensors["z"])):
                    return Picture(tensors["z"], None, file)
        return Picture(None, read(path, shape)[0] if frames is None else frames, file)

    @staticmethod
    def checksum(z):
        """SHA-256 of a latent on the CPU, uint8 (32,)."""
        content = repr((z.shape, z.dtype)).encode() + z.view(torch.uint8).numpy().tobytes()
        return torch.tensor(list(hashlib.sha256(content).digest()), dtype=torch.uint8)

    def file(self, path, shape):
        key = self.vae_hash.copy()
        key.update(repr(shape).encode())
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            if file.is_file() and not file.name.startswith("."):
                key.update(file.read_bytes())
        name = key.hexdigest()
        return self.folder / name[:2] / f"{name[2:34]}.safetensors"

    def __call__(self, pictures):
        """[Picture] of one shape -> (B, 16, F, h, w) float32, on the VAE's device."""
        weight = self.vae.conv1.weight
        for picture in pictures:
            if picture.z is None:
                picture.z = self.vae.encode(to_video(picture.frames, like=weight))
                self.store(picture, picture.z)
        return torch.cat([picture.z.to(weight.device) for picture in pictures]).float()

    def store(self, picture, z):
        """Writes latents (1, 16, F, h, w) to the cache, if there is one."""
        if picture.file and self.folder:
            stored = z.cpu().contiguous()
            content = to_bytes({"z": stored, "sha256": self.checksum(stored)})
            if not write_cache(picture.file, content):
                self.folder = None


@dataclass
class Sample:
    """One edit, read from disk."""

    where: str
    seed: int  # of its noise and σ
    inputs: dict  # of the MLLM
    target: Picture
    source: Picture | None  # None in stage 1: only the MLLM sees it
    references: list
    weight: float = 1.0  # 0 for a blank, which replaces unreadable samples


class Loader:
    """Reads this process's samples of each chunk of a step."""

    def __init__(self, args, model, pairs):
        self.args, self.model, self.pairs = args, model, pairs
        self.latents = Latents(model.vae, args.cache)

    def step(self, step):
        """Reads a step: (is_video, [[Sample]]), one list per chunk. No list is empty."""
        video, plan = self.pairs.plan(step)
        chunks = []
        for i, numbers in enumerate(plan):
            samples = []
            for j in range(RANK, len(numbers), PROCESSES):
                samples.append(self.try_sample(numbers[j], hash_of(self.args.seed, step, i, j)))
            readable = [sample for sample in samples if sample]
            chunks.append(readable or [self.blank(len(self.pairs.pairs[numbers[0]].references))])
        return video, chunks

    def try_sample(self, number, seed):
        """Reads a pair as a Sample. Returns None for a broken pair and marks it."""
        pair, shape = self.pairs.pairs[number], self.pairs.shapes[number]
        dropped = np.random.default_rng(seed).random() < self.args.drop
        try:
            return self.sample(pair, shape, "" if dropped else pair.instruction, seed)
        except Exception as error:
            self.pairs.mark_broken(pair.where, error)

    def sample(self, pair, shape, instruction, seed=0):
        frames, fps = read(pair.source, shape[0])  # (T, H, W, 3)
        images = [read_frames(path, limit=1).frames[0] for path in pair.references]
        images = [self.model.reference_for_mllm(image, shape[0]) for image in images]
        inputs = self.model.prompt(frames, instruction, images, fps)
        target = self.latents.look_up(pair.target, shape[0])
        source, references = None, []
        if self.args.stage > 1:
            source = self.latents.look_up(pair.source, shape[0], frames)
            for path, image in zip(pair.references, images):
                image = self.model.reference_for_dit(image, shape[0])  # (H, W, 3), as in an edit
                padded = pad(image[None], self.pairs.multiple, self.pairs.stride)
                key = "reference", *image.shape[:2]
                references.append(self.latents.look_up(path, key, padded))
        return Sample(pair.where, seed, inputs, target, source, references)

    def blank(self, references):
        """A sample of weight 0 for a process without any: all must take part, in all weights."""
        frames = np.zeros((1, self.pairs.multiple, self.pairs.multiple, 3), np.uint8)
        picture = Picture(None, frames, None)
        inputs = self.model.prompt(frames, "", references * [frames[0]])
        seen = (None, []) if self.args.stage == 1 else (picture, references * [picture])
        return Sample("", 0, inputs, picture, *seen, weight=0.0)


def hash_of(*values):
    """A 63-bit seed from integers, so that neighbouring steps have unrelated noise."""
    return int.from_bytes(hashlib.sha256(repr(values).encode()).digest()[:8], "little") >> 1


def read_ahead(load, first, last):
    """Yields (step, load(step)) for range(first, last). Threads read a few steps ahead.

    Each computes on one core: a team of threads for each reader would keep the models waiting.
    """
    single = {"initializer": torch.set_num_threads, "initargs": (1,)}
    pool, ahead = ThreadPoolExecutor(READERS, **single), deque()
    try:
        for step in range(first, last):
            while len(ahead) <= READERS and step + len(ahead) < last:
                ahead.append(pool.submit(load, step + len(ahead)))
            yield step, ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


# The model: trained weights of each stage, and the loss.


def build_model(args):
    """Loads the models at the start of the stage and marks the trained weights."""
    model = InstructX.from_pretrained(args.weights, instructx=args.start, **args.config)
    trainable(model, args)
    return model


def trainable(model, args):
    """Marks the weights that the stage trains, and makes them float32.

    All others are frozen. Those of MLLM and DiT get the dtype --precision.
    """
    if args.stage > 1:
        model.dit.add_source_embedding()  # a copy of the patch embedding at first
    if args.dit_lora:
        add_dit_lora(model.dit, args)
    trained = ("connector.",)  # queries and MLP
    if args.stage > 1:
        trained += ("dit.source_embedding.",) if args.dit_lora else ("dit.",)
    compute = getattr(torch, args.precision)
    for name, parameter in model.named_parameters():
        part, _, name_in_part = name.partition(".")
        parameter.requires_grad_(name.startswith(trained) or ".lora_" in name)
        if parameter.requires_grad:
            # On the CPU a copy, as loaded weights map files.
            parameter.data = parameter.data.to(torch.float32, copy=args.device.type == "cpu")
        elif part == "dit":
            dtype = stored_dtype(name_in_part, parameter.dtype, compute)
            parameter.data = parameter.data.to(dtype)
        elif part == "mllm":
            parameter.data = parameter.data.to(compute)


def add_dit_lora(dit, args):
    """Adds LoRA to all matrices of the blocks: the 14B then trains on one GPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        for name, layer in list(dit.blocks.named_modules()):
            if isinstance(layer, nn.Linear):
                dit.blocks.set_submodule(name, LoRALinear(layer, args.dit_lora, args.dit_lora))


def make_optimizers(parameters, args):
    """[AdamW], or [AdamW, Muon]: Muon is for matrices between hidden states.

    Muon rounds its steps to bfloat16: runs on one and on several processes agree to 1e-4 only.
    """
    matrices, others = [], defaultdict(list)
    for name, p in parameters.items():
        if args.muon_lr and name.startswith("dit.blocks.") and p.ndim == 2:
            matrices.append(p)
        else:
            # Decay would pull norms, biases, queries and modulation to zero.
            decays = p.ndim > 1 and "queries" not in name and "modulation" not in name
            decay = WEIGHT_DECAY if decays else 0.0
            others[isinstance(p, DTensor), decay].append(p)  # FSDP's need their own group
    groups = [{"params": tensors, "weight_decay": decay} for (_, decay), tensors in others.items()]
    optimizers = [torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=args.muon_lr, weight_decay=WEIGHT_DECAY))
    return optimizers


def learning_rate(step, args, highest):
    """Linear warm-up, then constant, or decay to 0 along a line or a cosine."""
    if step < args.warmup:
        return highest * ((step + 1) / args.warmup)
    done = min(1, (step + 1 - args.warmup) / max(1, args.steps - args.warmup))
    shares = {"constant": 1, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return highest * shares[args.schedule]


def flow_loss(dit, context, z, source, references, sigma, noise, sampler, change_weight=0.0):
    """Flow matching: the error of the velocity against ε - x at x_σ = (1-σ)x + σε.

    z, source and noise (B, 16, F, h, w), references [(B, 16, 1, h', w')], sigma (B,), context
    (B, Q, C) -> one loss per sample, (B,).
    """
    x = sampler.add_noise(z, noise, sigma)  # (B, 16, F, h, w)
    velocity = dit(x, 1000 * sigma, context, source=source, references=references)
    error = (velocity - sampler.target(z, noise)).square()  # (B, 16, F, h, w)
    if change_weight:
        # An edit changes little of a picture, and copying is learnt first. Weights have mean 1.
        change = (z - source).square().mean(dim=1, keepdim=True)  # (B, 1, F, h, w)
        largest = change.amax(dim=(2, 3, 4), keepdim=True).clamp(min=1e-6)
        weight = 1 + change_weight * change / largest
        error = error * (weight / weight.mean(dim=(2, 3, 4), keepdim=True))
    return error.flatten(1).mean(dim=1)


def sample_latents(latents, samples):
    """Targets (B, 16, F, h, w), sources alike (stage 1: None), references [(B, 16, 1, h', w')]."""
    z = latents([sample.target for sample in samples])
    sources = [sample.source for sample in samples]
    source = latents(sources) if sources[0] else None
    references = [latents(pictures) for pictures in zip(*(s.references for s in samples))]
    return z, source, references


def sample_losses(model, latents, samples, video, args):
    """Losses (B,) of samples of one shape. The seed of a sample determines σ and noise."""
    z, source, references = sample_latents(latents, samples)
    sampler = FlowSampler(shift=args.video_shift if video else args.image_shift)
    # On the CPU, so that devices agree.
    generators = [torch.Generator().manual_seed(sample.seed) for sample in samples]
    sigma = torch.cat([sampler.draw_sigma(1, g, args.sigma == "uniform") for g in generators])
    noise = torch.stack([torch.randn(z.shape[1:], generator=g) for g in generators])
    sigma, noise = sigma.to(z.device), noise.to(z.device)
    inputs = model.processor.collate([sample.inputs for sample in samples])
    with autocast(z.device, args):
        context = model.context(inputs, video)  # (B, Q, C)
        data = context, z, source, references, sigma, noise
        return flow_loss(model.dit, *data, sampler, args.change_weight)


def autocast(device, args):
    """The context in which a model computes in --precision; float32 leaves it as it is."""
    compute = getattr(torch, args.precision)
    # No cache: no weight is used twice, and the copies would outlast what checkpointing drops.
    enabled = compute != torch.float32
    return torch.autocast(device.type, compute, enabled, cache_enabled=False)


# The loop.


def train(args, build, validate):
    """Runs a stage to its end, resuming from its last checkpoint -> the result's folder."""
    model = build(args)
    distribute(model, args.device)
    if args.gradient_checkpointing:
        recompute_blocks([*model.dit.blocks, *model.mllm.model.layers])
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizers = make_optimizers(parameters, args)
    pairs = read_pairs(args, args.data, model)
    if "area" not in args.config:  # at which edit.py works: that of the largest training pictures
        sizes = [shape[0] for bucket in pairs.buckets.values() for shape in bucket]
        areas = [height * width for _, height, width in sizes]
        model.config.area = max(model.config.area, *areas)
    held_out = read_held_out(args, model) if args.validate else []
    loader = Loader(args, model, pairs)
    checkpoints = Checkpoints(args, parameters, optimizers, pairs.digest)
    first_step = checkpoints.resume()
    metrics = Metrics(args.out / "metrics.jsonl", first_step)
    pairs.report()
    weights = sum(p.numel() for p in parameters.values()) / 1e6
    say(f"{pairs.summary()}; {weights:.2f} M weights train")
    if held_out and first_step == 0:
        metrics.write(timed_validation(validate, args, model, loader, held_out, 0))

    bad_steps, peak, began = 0, 0, time.perf_counter()
    batches = read_ahead(loader.step, first_step, args.steps)
    bar = tqdm(batches, f"stage {args.stage}", args.steps, initial=first_step, disable=QUIET)
    with stop_signals() as signals:
        for step, (video, chunks) in bar:
            waited = time.perf_counter() - began
            rows = add_gradients(model, loader.latents, chunks, video, args)
            norm = clip_gradients(parameters.values())

            # One step of the optimizers, skipped unless loss and gradient are finite.
            loss = sum(loss for loss, _ in rows) / len(rows) if rows else math.nan
            finite = math.isfinite(loss) and math.isfinite(norm)
            for optimizer, highest in zip(optimizers, (args.lr, args.muon_lr)):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, args, highest)
                if finite:
                    optimizer.step()
            model.zero_grad()

            # A line of the log.
            row = dict(step=step, video=video, samples=len(rows), loss=loss if rows else None)
            row |= dict(gradient=norm, lr=learning_rate(step, args, args.lr), used=finite)
            peak = max(peak, peak_memory(str(args.device)))
            row |= dict(broken=len(pairs.broken), memory=round(peak / 1e9, 2))
            seconds = time.perf_counter() - began
            metrics.write(row | {"seconds": round(seconds, 3), "waited": round(waited, 3)})
            bar.set_postfix(loss=loss, gradient=norm, refresh=False)
            pairs.report()
            bad_steps = 0 if finite else bad_steps + 1
            if not finite:
                complain(args, step, loss, norm, rows, pairs, bad_steps)

            # At intervals, a validation and a checkpoint.
            done = step + 1
            is_last, stopping = done == args.steps, any(gather(bool(signals)))
            if held_out and (is_last or done % args.validate_every == 0):
                metrics.write(timed_validation(validate, args, model, loader, held_out, done))
            is_due = is_last or stopping or done % args.save_every == 0
            is_overdue = time.monotonic() - checkpoints.saved > 60 * SAVE_MINUTES
            if any(gather(is_due or is_overdue)):
                checkpoints.save(done)
                try:
                    metrics.draw()
                except Exception as error:  # such as a log that was edited by hand
                    say(f"curves.png could not be drawn ({one_line(error)})")
                say(f"step {done} of {args.steps}: loss {loss:.4f}, checkpoint written")
            if stopping and not is_last:
                say("stopped by a signal; the same command goes on from here")
                sys.exit(128 + (signals[0] if signals else signal.SIGTERM))
            began = time.perf_counter()

    result = export(args, model)
    gather(None)  # a process that exits early breaks the others' connections
    if PROCESSES > 1:
        dist.destroy_process_group()
    return result


def add_gradients(model, latents, chunks, video, args):
    """Adds up the gradient of a step's mean loss -> [(loss, where)] of all processes' samples."""
    count = sum(gather(sum(s.weight for samples in chunks for s in samples)))
    results = []
    for samples in chunks:
        losses = sample_losses(model, latents, samples, video, args)  # (B,)
        weights = torch.tensor([s.weight for s in samples], device=losses.device)
        loss = (losses * weights).sum() * PROCESSES / max(1, count)
        loss.backward()
        results += zip(samples, losses.detach())
    rows = [(loss.item(), sample.where) for sample, loss in results if sample.weight]
    return sum(gather(rows), [])


def clip_gradients(parameters):
    """Averages gradients over processes and clips their norm -> the norm before clipping."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    sharded = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    others = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    if PROCESSES > 1 and others:  # FSDP has averaged those that it sharded
        flat = torch.cat([gradient.flatten() for gradient in others]).div_(PROCESSES)
        dist.all_reduce(flat)
        for gradient, mean in zip(others, flat.split([g.numel() for g in others])):
            gradient.copy_(mean.view_as(gradient))
    norm = float(get_total_norm(others))
    if sharded:
        norm = math.hypot(norm, float(get_total_norm(sharded).full_tensor()))
    if math.isfinite(norm) and norm > CLIP_NORM:
        for gradient in gradients:
            gradient.mul_(CLIP_NORM / norm)
    return norm


def timed_validation(validate, args, model, loader, held_out, step):
    """A line of metrics.jsonl: held-out losses after `step` steps."""
    began = time.perf_counter()
    losses = validate(args, model, loader, held_out, step)
    say(f"step {step}: held-out loss " + ", ".join(f"{k} {v:.4f}" for k, v in losses.items()))
    return {"step": step, "held_out": losses, "seconds": round(time.perf_counter() - began, 3)}


@torch.no_grad()
def validate(args, model, loader, held_out, step):
    """Loss of held-out edits, always with the same noise -> {"images": loss, "clips": loss}.

    Writes OUT/validation/step-N.png: source, result and target of the first edits.
    """
    losses, rows = defaultdict(list), []
    for i, (pair, shape) in enumerate(held_out[:HELD_OUT]):
        video = shape[0][0] > 1
        sample = loader.sample(pair, shape, pair.instruction)
        samples = [replace(sample, seed=hash_of(args.seed, i, draw)) for draw in range(DRAWS)]
        values = sample_losses(model, loader.latents, samples, video, args)  # (DRAWS,)
        losses["clips" if video else "images"] += values.tolist()
        if i < RENDERED:
            source, target = (read(path, shape[0])[0] for path in (pair.source, pair.target))
            try:
                result = render(args, model, loader, pair, shape)
            except FloatingPointError:
                result = np.zeros_like(source)  # a picture of NaN is shown black
            rows.append((pair.instruction, source, result, target))
    if IS_FIRST:
        file = args.out / "validation" / f"step-{step:07d}.png"
        file.parent.mkdir(exist_ok=True)
        with whole(file) as partial:
            sheet(rows).save(partial, format="PNG")
    return {media: sum(values) / len(values) for media, values in losses.items()}


def render(args, model, loader, pair, shape):
    """The edit of a pair as InstructX.edit makes it, but without a source in stage 1."""
    instructions = [pair.instruction] if model.config.guidance == 1 else [pair.instruction, ""]
    samples = [loader.sample(pair, shape, instruction) for instruction in instructions]
    z, source, references = sample_latents(loader.latents, samples[:1])  # of z, only the shape
    with autocast(z.device, args):
        inputs = model.processor.collate([sample.inputs for sample in samples])
        context = model.context(inputs, shape[0][0] > 1)  # (1 or 2, Q, C)
        z = model.sample(context, z.shape, source, references, seed=args.seed)
    return np.concatenate(list(model.decode(z, (*shape[0], 3))))  # (T, H, W, 3)


def read_pairs(args, files, model):
    """The edits of data files. The first process looks up sizes, the others find what it wrote."""
    if not IS_FIRST:
        gather(None)  # waits
    stride, padded = model.vae.temporal_stride, model.config.reference_padded
    pairs = Pairs(args, files, model.multiple(), stride, padded)
    if IS_FIRST:
        gather(None)
    if not any(pairs.buckets.values()):
        nothing = "stage 1 takes images alone" if pairs.pairs else "there is none"
        reason = next(iter(pairs.broken.values()), nothing)
        raise ValueError(f"no usable edit in {', '.join(map(str, files))}: {reason}")
    return pairs


def read_held_out(args, model):
    """[(pair, shape)] of --validate that the stage can use. Raises ValueError for a broken one."""
    pairs = read_pairs(args, [args.validate], model)
    if pairs.broken:
        raise ValueError(f"--validate: {next(iter(pairs.broken.values()))}")
    edits = zip(pairs.pairs, pairs.shapes)
    return [(pair, shape) for pair, shape in edits if args.stage > 1 or shape[0][0] == 1]


# What the person who trains sees.


def say(text):
    """One line on stderr, from the first process alone and above a progress bar."""
    if IS_FIRST:
        print_line(f"train.py: {text}", sys.stderr)


def complain(args, step, loss, norm, rows, pairs, bad_steps):
    """Says why a step changed nothing. Raises TrainingError for PATIENCE in a row, or all steps."""
    reason = f"loss {loss}, gradient {norm}; its batch: {', '.join(where for _, where in rows)}"
    if not rows:
        broken = next(iter(pairs.broken.values()), "by other processes")
        reason = f"no sample could be read ({broken})"
    if bad_steps == min(PATIENCE, args.steps):
        text = f"{bad_steps} unusable steps in a row, the last is step {step}"
        raise TrainingError(f"{text}: {reason}")
    say(f"step {step} skipped: {reason}")


class Metrics:
    """metrics.jsonl, a line for each step and each validation, and curves.png beside it.

    Resuming drops the lines after the checkpoint: those steps run again.
    """

    def __init__(self, file, first_step):
        self.file, self.rows = file, []
        text = file.read_text(errors="replace") if file.exists() else ""
        for line in text.splitlines():
            with contextlib.suppress(Exception):  # killed inside a line, or edited by hand
                row = json.loads(line)
                validated = "held_out" in row and first_step > 0
                if row["step"] < first_step + validated:
                    self.rows.append(row)
        if IS_FIRST:
            with whole(file) as partial:
                partial.write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def write(self, row):
        self.rows.append(row)
        if IS_FIRST:
            with self.file.open("a") as stream:
                stream.write(json.dumps(row) + "\n")

    def draw(self):
        """Draws the losses of training and of held-out edits, gradient and learning rate."""
        if not IS_FIRST:
            return
        steps = [row for row in self.rows if "loss" in row]
        losses = defaultdict(list)
        for row in steps:
            losses["clips" if row["video"] else "images"].append((row["step"], row["loss"]))
        for row in self.rows:
            for name, loss in row.get("held_out", {}).items():
                losses[f"held-out {name}"].append((row["step"], loss))
        page = Image.new("RGB", (1200, 800), "white")
        draw = ImageDraw.Draw(page)
        panel(draw, (0, 0), "loss", losses, width=1200)
        gradient, rate = ([(row["step"], row[key]) for row in steps] for key in ("gradient", "lr"))
        panel(draw, (0, 400), "norm of the gradient", {"": gradient})
        panel(draw, (600, 400), "learning rate", {"": rate}, exact=True)
        with whole(self.file.with_name("curves.png")) as partial:
            page.save(partial, format="PNG")


COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b")


def panel(draw, corner, title, curves, width=600, height=400, exact=False):
    """One plot of {name: [(x, y or None)]}: smooth lines over faint ones, named at their ends.

    The y axis is logarithmic if the smooth lines span more than a factor of 3. With `exact` nothing
    is smoothed, and the axis is linear from 0.
    """
    lines = {}  # {name: (x, faint y, smooth y)}
    for name, curve in curves.items():
        finite = [(x, y) for x, y in curve if y is not None and math.isfinite(y)]
        if finite:
            x, y = np.array(finite, float).T
            lines[name] = (x, y, y) if exact else (x, smooth(y, 300), smooth(y, 15))
    if not lines:
        return
    xs, faint, smoothed = (np.concatenate(values) for values in zip(*lines.values()))
    first, last, low, high = xs.min(), xs.max(), smoothed.min(), smoothed.max()
    logarithmic = not exact and low > 0 and high > 3 * low
    scale = np.log10 if logarithmic else np.asarray
    if exact or not logarithmic and 0 < low < high / 2:
        low = 0.0
    else:  # room for the faint line, but not for all that stands out of it
        low = min(low, max(faint.min(), low / 1.5))
    high = max(high, min(faint.max(), 1.5 * high))
    longest = max(draw.textlength(name, font_size=13) for name in lines)
    left, right = corner[0] + 70, corner[0] + width - 20 - longest
    top, bottom = corner[1] + 40, corner[1] + height - 40

    def place(x, y):
        across = (x - first) / max(last - first, 1e-12)
        up = (scale(np.clip(y, low, high)) - scale(low)) / max(scale(high) - scale(low), 1e-12)
        return left + across * (right - left), bottom - up * (bottom - top)

    draw.text((left, corner[1] + 12), title, "black", font_size=16)
    for value in round_numbers(low, high, logarithmic):
        y = place(first, value)[1]
        draw.line((left, y, right, y), "#dddddd")
        draw.text((left - 8, y), f"{value:g}", "black", anchor="rm", font_size=12)
    for value in round_numbers(first, last):
        x = place(value, high)[0]
        draw.text((x, bottom + 8), f"{value:g}", "black", anchor="mt", font_size=12)

    def line(x, y, color, thickness):
        draw.line(np.stack(place(x, y), axis=1).flatten().tolist(), color, thickness)

    for (x, y, _), color in zip(lines.values(), COLORS):
        line(x, y, tuple(255 - (255 - level) // 3 for level in ImageColor.getrgb(color)), 1)
    ends = []
    for (name, (x, _, y)), color in zip(lines.items(), COLORS):
        line(x, y, color, 2)
        ends.append((float(place(x[-1], y[-1])[1]), name, color))
    free = bottom
    for y, name, color in sorted(ends, reverse=True):
        y = min(y, free)
        draw.text((right + 8, y), name, color, anchor="lm", font_size=13)
        free = y - 15  # no label on another


def smooth(values, parts):
    """Means over a window of 1 / `parts` of the curve, shorter at its ends."""
    count, half = len(values), len(values) // (2 * parts)
    sums = np.insert(np.cumsum(values), 0, 0.0)
    first = np.maximum(np.arange(count) - half, 0)
    last = np.minimum(np.arange(count) + half + 1, count)
    return (sums[last] - sums[first]) / (last - first)


def round_numbers(low, high, logarithmic=False):
    """Some round numbers from low to high: 1, 2 or 5 times a power of ten, or multiples of one."""
    candidates = [factor * 10.0**n for n in range(-12, 13) for factor in (1, 2, 5)]
    if logarithmic:
        return [value for value in candidates if low <= value <= high] or [low, high]
    step = next((value for value in candidates if value >= (high - low) / 5), high - low)
    return [step * n for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def sheet(rows, side=128):
    """[(instruction, source, result, target)] -> a picture with a row for each.

    Of a clip it shows the first, the middle and the last frame.
    """
    columns = max(9 if len(source) > 1 else 3 for _, source, _, _ in rows)
    page = Image.new("RGB", (columns * side, (side + 20) * len(rows)), "white")
    draw = ImageDraw.Draw(page)
    for i, (instruction, *clips) in enumerate(rows):
        top = i * (side + 20)
        draw.text((4, top + 4), instruction, "black", font_size=11)
        frames = [clip[j] for clip in clips for j in sorted({0, len(clip) // 2, len(clip) - 1})]
        for j, frame in enumerate(frames):
            page.paste(Image.fromarray(frame).resize((side, side)), (j * side, top + 20))
    return page


# Checkpoints and the result.


class Checkpoints:
    """OUT/checkpoints/step-N: all that changes in training. Each appears whole or not at all.

    Each process writes its part as safetensors; any number of processes can go on from them.
    """

    def __init__(self, args, parameters, optimizers, data_digest):
        self.args, self.parameters, self.optimizers = args, parameters, optimizers
        self.data_digest, self.saved = data_digest, time.monotonic()
        # DCP warns when it runs in one process, FSDP of views that nobody changes in place.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")

    def state(self):
        """{name: tensor}: weights, and what optimizers remember of them, such as "exp_avg NAME"."""
        tensors = {name: p.detach() for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            for optimizer in self.optimizers:
                memories = optimizer.state.get(p, {})
                tensors |= {f"{key} {name}": value for key, value in memories.items()}
        return tensors

    def save(self, step):
        """Writes the checkpoint of `step` and removes all but the last KEEP."""
        final = self.args.out / "checkpoints" / f"step-{step:07d}"
        partial = final.with_suffix(".partial")
        try:
            if IS_FIRST:
                shutil.rmtree(partial, ignore_errors=True)
            gather(None)  # waits, since DCP makes the folder anew
            writer = HuggingFaceStorageWriter(partial, save_distributed=True)
            tensors = self.state()
            dcp.save(tensors, storage_writer=writer)
            if IS_FIRST:
                state = {"step": step, "settings": lasting(self.args), "data": self.data_digest}
                state["tensors"] = len(tensors)
                (partial / "state.json").write_text(json.dumps(state, indent=2))
                shutil.rmtree(final, ignore_errors=True)
                os.replace(partial, final)
                unfinished = final.parent.glob("step-*.partial")
                for folder in [*list_checkpoints(self.args.out)[:-KEEP], *unfinished]:
                    shutil.rmtree(folder)
        except (Exception, CheckpointException) as error:
            shutil.rmtree(partial, ignore_errors=True)
            causes = [cause for cause, _ in getattr(error, "failures", {}).values()]  # DCP's
            if causes and isinstance(causes[0], KeyboardInterrupt):
                raise causes[0] from None
            text = f"checkpoint {final} could not be written, the one before is whole"
            raise TrainingError(f"{text} ({one_line([*causes, error][0])[-300:]})") from None
        self.saved = time.monotonic()

    def resume(self):
        """Loads the newest whole checkpoint and returns its step; 0 where there is none.

        Raises ValueError where it was made with other settings, or no checkpoint can be read.
        """
        folders = list_checkpoints(self.args.out)
        for folder in reversed(folders):
            try:
                state = json.loads((folder / "state.json").read_text())
                step, before, now = state["step"], state["settings"], lasting(self.args)
                if folder.name != f"step-{step:07d}":
                    raise ValueError(f"state.json says step {step}")
                changed = [name for name in now if before.get(name) != now[name]]
                if not changed:
                    self.load(folder, state["tensors"])
            except (Exception, CheckpointException) as error:
                say(f"{folder} is damaged ({one_line(error)[-200:]}); looking for one before it")
                continue
            if changed:
                changes = (f"{name} was {before.get(name)} and is {now[name]}" for name in changed)
                text = f"{folder} was made with other settings: {'; '.join(changes)}"
                raise ValueError(f"{text}; use those settings, or another --out")
            say(f"going on at step {step}, from {folder}")
            if state.get("data") != self.data_digest:
                say("the data are not those of the checkpoint: from here on it is another run")
            return step
        if folders:
            raise ValueError(f"no checkpoint in {folders[0].parent} can be read; move them away")
        return 0

    def load(self, folder, count):
        owners = {}
        for optimizer in self.optimizers:
            optimizer.state.clear()
            owners |= {p: optimizer for group in optimizer.param_groups for p in group["params"]}
        reader = HuggingFaceStorageReader(folder)
        for entry in reader.read_metadata().state_dict_metadata:
            key, _, name = entry.rpartition(" ")
            if key:  # a memory of an optimizer: there is none before the first gradient
                p = self.parameters[name]
                like = torch.zeros((), device=p.device) if key == "step" else torch.zeros_like(p)
                owners[p].state[p][key] = like.detach()
        tensors = self.state()
        if len(tensors) != count:
            raise ValueError(f"{len(tensors)} of {count} tensors are left")
        dcp.load(tensors, storage_reader=reader)
        parts = (t.to_local() if isinstance(t, DTensor) else t for t in tensors.values())
        if not all(gather(all(bool(part.isfinite().all()) for part in parts))):
            raise ValueError("its weights are not finite")


def lasting(args):
    """The settings that a resumed run must share with its checkpoint."""
    free = {"weights", "start", "out", "data", "device", "cache", "gradient_checkpointing"}
    free |= {"save_every", "validate", "validate_every"}
    free |= {"steps"} if args.schedule == "constant" else set()
    return {name: value for name, value in sorted(vars(args).items()) if name not in free}


def list_checkpoints(out):
    """Whole checkpoints, oldest first."""
    return sorted((out / "checkpoints").glob("step-" + 7 * "[0-9]"))


def export(args, model):
    """Writes OUT/instructx, with LoRA of the DiT merged -> its path. The model is spent then."""
    final = args.out / "instructx"
    partial, old = final.with_suffix(".partial"), final.with_suffix(".old")
    for name, tensor in model.dit.state_dict().items():
        if isinstance(tensor, DTensor):
            module, _, leaf = name.rpartition(".")
            tensor = nn.Parameter(tensor.full_tensor().cpu())  # of all processes, for the first
            if IS_FIRST:
                setattr(model.dit.get_submodule(module), leaf, tensor)
    if not IS_FIRST:
        return final
    for name, layer in lora_layers(model.dit):
        model.dit.set_submodule(name, layer.merged())
    folders = locate(args.weights, args.start)
    is_own_dit = args.stage > 1 or folders["dit"].parent == folders.get("instructx")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    try:
        model.save_pretrained(partial, dit=is_own_dit)
        shutil.copy(list_checkpoints(args.out)[-1] / "state.json", partial / "training.json")
    except Exception as error:  # safetensors has an error of its own
        raise TrainingError(f"{final} could not be written ({error})") from None
    if final.exists():
        final.rename(old)
    partial.rename(final)
    shutil.rmtree(old, ignore_errors=True)
    return final


def finished(args):
    """The result's folder if this very run is complete, else None."""
    with contextlib.suppress(Exception):  # there is none, or it is damaged
        state = json.loads((args.out / "instructx" / "training.json").read_text())
        if state["settings"] == lasting(args) and state["step"] >= args.steps:
            say(f"{args.out} is finished after {state['step']} steps; nothing is left to do")
            return args.out / "instructx"


# Processes of torchrun, signals, and the command line. One process alone joins nothing.


def distribute(model, device):
    """Joins the processes and moves the model to the device, the DiT in shards of FSDP2.

    MLLM and connector are small against it: each process has them whole.
    """
    if PROCESSES > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        # The first process may measure the media of a large set for hours.
        dist.init_process_group(backend, timeout=timedelta(days=1))
        mesh = init_device_mesh(device.type, (PROCESSES,))
        for module in (*model.dit.blocks, model.dit):
            fully_shard(module, mesh=mesh)

        def velocity(context, shape, source, references):
            return lambda z, t: model.dit(z, t, context, source, references)

        model.velocity = velocity  # FSDP gathers weights in `forward` alone
    model.to(device)


def gather(value):
    """[value of each process], in order."""
    values = [value] * PROCESSES
    if PROCESSES > 1:
        dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def stop_signals():
    """Gives a list to which a signal that asks for the end adds its number.

    That is Ctrl-C, of which a second one interrupts, SIGTERM, or a terminal that closes.
    """
    received = []

    def receive(number, frame):
        if number == signal.SIGINT and number in received:
            raise KeyboardInterrupt
        received.append(number)

    with contextlib.ExitStack() as stack:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                stack.callback(signal.signal, number, signal.signal(number, receive))
        yield received


@contextlib.contextmanager
def locked(out):
    """Keeps other runs out of a folder while this one lives, and removes what killed ones left."""
    with (out / ".lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            text = f"another run is training in {out}; let it end, or take another --out"
            raise ValueError(text) from None
        sweep(out)
        yield


def main(arguments=None, build=build_model, validate=validate):
    """One stage from its command line -> the exit code.

    `build(args)` and `validate(args, model, loader, held_out, step)` can be replaced to try other
    models and measures, as weights/shapes/claims.py does.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # see the top of this file
        signal.signal(signal.SIGINT, signal.default_int_handler)
    args = settings(arguments)
    try:
        complete(args)
        args.out.mkdir(parents=True, exist_ok=True)
        with locked(args.out) if IS_FIRST else contextlib.nullcontext():
            result = finished(args) or train(args, build, validate)
        if IS_FIRST:
            print(result)
        return 0
    except KeyboardInterrupt:
        say("interrupted; the same command goes on from the last checkpoint")
        return 130
    except (ValueError, OSError, TrainingError) as error:
        problem = one_line(error)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        problem = "out of memory; try --gradient-checkpointing, a smaller --micro-batch, --dit-lora"
    print(f"train.py: error: {problem}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    code = main()
    if PROCESSES > 1:  # at times torch's threads abort a process that ends in the usual way
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
