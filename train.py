"""Trains InstructX in the three stages of the paper (arXiv 2510.08485, section 3.3), from one straight script.

    python train.py --stage 1 --data data/train.jsonl --weights DIR --out runs/stage1
    python train.py --stage 2 --data data/train.jsonl --weights DIR --start runs/stage1/instructx --out runs/stage2
    python train.py --stage 3 --data data/clean.jsonl --weights DIR --start runs/stage2/instructx --out runs/stage3

    stage   trains                                   data              the DiT sees
    1       queries, LoRA, connector                 images            noisy latents
    2       these, the DiT and the source embedding  images and clips  noisy latents + source latents, reference latents
    3       as stage 2                               a clean subset    as stage 2

Data are JSON lines with `source`, `target`, `instruction` and, if any, `references`; paths are relative to the file.

What is unusual: which samples a step sees, their noise, σ and dropped instructions are functions of (seed, step) alone. So there
is no loader state to save, reading ahead cannot change anything, and a run that was killed goes on with the very same numbers.

Precision: trained weights, their gradients and the optimizer are float32; matrix products run in `--precision` through autocast, which
stands in one place below; frozen weights are kept in `--precision`. Letters as in connector.py.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from connector import InstructX
from edit import read_frames
from sampler import FlowSampler

PAPER_STEPS = {1: 20000, 2: 20000, 3: 5000}
SIGMA_BINS = 4


def settings():
    """Every setting with its meaning; "paper" marks the paper's value, all others are ours."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = lambda name, default, text, **more: parser.add_argument(
        name, default=default, type=more.pop("type", type(default)), help=f"{text} (default: {more.pop('shown', default)})", **more)
    parser.add_argument("--stage", type=int, choices=(1, 2, 3), required=True)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="JSON lines files")
    parser.add_argument("--weights", type=Path, required=True, help="weights folder with mllm/, dit/, vae/")
    parser.add_argument("--out", type=Path, required=True, help="checkpoints, metrics, curves and the result, instructx/")
    add("--start", None, "instructx/ folder of the previous stage", type=Path, shown="the one in --weights, else fresh queries")
    add("--steps", None, "optimizer steps", type=int, shown="paper: 20000, 20000, 5000 for stage 1, 2, 3")
    add("--image-batch", 128, "images per step; paper: 128")
    add("--video-batch", 32, "clips per step; paper: 32")
    add("--micro-batch", 8, "samples that go through the models at once; the rest of a batch is accumulated")
    add("--video-share", 0.6, "probability that a step of stage 2 or 3 takes clips; paper: 0.6")
    add("--lr", 1e-5, "learning rate; paper: 1e-5")
    add("--warmup", 500, "steps until the learning rate is reached")
    add("--decay", 0, "last steps over which it falls to zero; 0 keeps it constant")
    add("--weight-decay", 0.01, "of matrices; queries, norms and biases have none")
    add("--clip", 1.0, "largest norm of the gradient")
    add("--ema", 0.0, "decay of the averaged weights that are exported; 0 exports the weights themselves")
    add("--drop", 0.1, "probability of an empty instruction, for guidance")
    add("--image-shift", 3.0, "shift of σ for images")
    add("--video-shift", 5.0, "shift of σ for clips")
    add("--change-weight", 0.0, "how much more the loss counts where source and target differ; 0 is plain flow matching")
    add("--area", 480 * 832, "larger pictures are scaled down to this many pixels")
    add("--frames", 81, "longer clips are cut to this many frames")
    add("--queries", None, "queries of a fresh start, image and video; paper: 256 512", type=int, nargs=2)
    add("--lora-rank", 64, "of a fresh start")
    add("--cache", None, "folder for VAE latents, each computed once", type=Path)
    add("--validate", None, "JSON lines file of which the first edits are rendered now and then", type=Path)
    add("--validate-every", 1000, "steps between renderings")
    add("--validate-count", 8, "edits to render")
    add("--save-every", 500, "steps between checkpoints")
    add("--keep", 2, "checkpoints to keep")
    add("--log-every", 10, "steps between lines of metrics.jsonl")
    add("--seed", 0, "of data order, noise, σ and fresh weights")
    add("--workers", 2, "threads that read ahead")
    add("--device", "cuda" if torch.cuda.is_available() else "cpu", "where to train")
    add("--precision", None, "of matrix products and frozen weights", choices=("float32", "bfloat16"), type=str,
        shown="bfloat16 on CUDA, else float32")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="recompute the DiT's blocks in the backward pass: less memory")
    args = parser.parse_args()
    args.steps = args.steps or PAPER_STEPS[args.stage]
    args.precision = args.precision or ("bfloat16" if args.device.startswith("cuda") else "float32")
    return args


@dataclass
class Sample:
    """One pair, read and made ready: what the MLLM sees, and the pictures as the VAE takes them."""

    inputs: dict                # of the processor
    source: np.ndarray          # uint8 (T, H, W, 3)
    target: np.ndarray
    references: list = field(default_factory=list)


class Pairs:
    """JSON lines of edits, sorted into buckets of one shape each so that a batch can be stacked.

    Two pairs share a bucket when clip length, working size and the sizes of their references agree.
    """

    def __init__(self, files, multiple, stride, area, frames):
        self.multiple, self.stride, self.area, self.frames = multiple, stride, area, frames
        self.rows, self.broken, self.buckets = [], {}, {False: {}, True: {}}
        for file in files:
            for number, line in enumerate(Path(file).read_text().splitlines(), 1):
                self.rows.append(self.row(file, number, line))
        for i in tqdm(range(len(self.rows)), desc="data", disable=None):
            try:
                shape = self.shape(i)
            except Exception as error:
                self.broken[i] = str(error)
            else:
                self.buckets[shape[0][0] > 1].setdefault(shape, []).append(i)

    @staticmethod
    def row(file, number, line):
        try:
            row = json.loads(line)
            folder = Path(file).parent
            return {"instruction": row["instruction"], "source": folder / row["source"], "target": folder / row["target"],
                    "references": [folder / path for path in row.get("references") or []]}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}, line {number}: not an edit with source, target and instruction ({error!r})") from None

    def working(self, length, height, width):
        """(frames, height, width) of a picture as it is trained on: cut to 4n + 1 frames, at most `area`, sides a multiple."""
        scale = min(1.0, (self.area / (height * width)) ** 0.5)
        side = lambda pixels: max(self.multiple, round(pixels * scale / self.multiple) * self.multiple)
        return (min(length, self.frames) - 1) // self.stride * self.stride + 1, side(height), side(width)

    def shape(self, i):
        """Bucket of row i: working shapes of source and references."""
        row = self.rows[i]
        return tuple(self.working(*read_frames(path, limit=self.frames).frames.shape[:3]) for path in (row["source"], *row["references"]))

    def read(self, path, shape):
        """The frames at `path` in a working shape. Raises ValueError where the clip is shorter than that."""
        length, height, width = shape
        frames = read_frames(path, limit=length).frames
        if len(frames) < length:
            raise ValueError(f"{path} has {len(frames)} frames, its pair has {length}")
        if frames.shape[1:3] == (height, width):
            return frames[:length]
        resize = lambda frame: np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS))
        return np.stack([resize(frame) for frame in frames[:length]])

    def load(self, i, shape, instruction, prompt):
        """Row i as a Sample; `prompt` is InstructX.prompt."""
        row = self.rows[i]
        source, target = self.read(row["source"], shape[0]), self.read(row["target"], shape[0])
        references = [self.read(path, one)[0] for path, one in zip(row["references"], shape[1:])]
        return Sample(prompt(source, instruction, references), source, target, references)

    def draw(self, step, args):
        """What `step` sees: (is_video, [(bucket, [(row, keeps its instruction)])]), one entry for each micro-batch."""
        rng = np.random.default_rng([args.seed, step])
        is_video = args.stage > 1 and rng.random() < args.video_share
        is_video = is_video if self.buckets[is_video] else not is_video
        buckets = self.buckets[is_video]
        total, plan = args.video_batch if is_video else args.image_batch, []
        shares = np.array([len(rows) for rows in buckets.values()], float)
        while total > 0:
            shape = list(buckets)[rng.choice(len(shares), p=shares / shares.sum())]
            count = min(total, args.micro_batch)
            plan.append((shape, [(int(rng.choice(buckets[shape])), bool(rng.random() >= args.drop)) for _ in range(count)]))
            total -= count
        return is_video, plan


class Latents:
    """Encodes pictures, each once where `--cache` names a folder. The key is the picture's content and the VAE's: it can't go stale."""

    def __init__(self, model, folder):
        self.model, self.folder = model, folder
        weight = model.vae.conv1.weight.detach().float().cpu().numpy().tobytes()
        self.vae_key = hashlib.sha256(weight + repr(model.vae.config).encode()).digest()
        if folder:
            folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, pictures):
        """[uint8 (T, H, W, 3)] of one shape -> (B, 16, F, h, w) on the model's device."""
        device = next(self.model.vae.parameters()).device
        if not self.folder:
            return self.encode(pictures)
        keys = [hashlib.sha256(self.vae_key + repr(frames.shape).encode() + frames.tobytes()).hexdigest()[:32] for frames in pictures]
        files = [self.folder / key[:2] / f"{key}.safetensors" for key in keys]
        missing = [i for i, file in enumerate(files) if not file.exists()]
        for i, z in zip(missing, self.encode([pictures[i] for i in missing]) if missing else ()):
            files[i].parent.mkdir(exist_ok=True)
            save_file({"z": z.cpu().contiguous()}, f"{files[i]}.partial")
            os.replace(f"{files[i]}.partial", files[i])
        return torch.stack([load_file(file)["z"] for file in files]).to(device)

    @torch.no_grad()
    def encode(self, pictures):
        parameter = next(self.model.vae.parameters())
        video = torch.from_numpy(np.stack(pictures)).to(parameter.device).permute(0, 4, 1, 2, 3)    # (B, 3, T, H, W)
        return self.model.vae.encode(video.to(parameter.dtype) / 127.5 - 1)


def trainable(model, stage):
    """{name: parameter} that this stage trains, made float32; all others are frozen."""
    model.requires_grad_(False)
    if stage > 1 and model.dit.source_embedding is None:
        model.dit.add_source_embedding()                # starts as a copy: the paper's addition, exactly
    chosen = {}
    for name, parameter in model.named_parameters():
        ours = name.startswith("connector.") or ".lora_" in name or (stage > 1 and name.startswith("dit."))
        if ours:
            parameter.data = parameter.data.float().clone()     # a clone, since loaded weights are mapped files
            chosen[name] = parameter.requires_grad_()
    return chosen


def flow_loss(model, context, z, source, references, sigma, noise, sampler, change_weight=0.0):
    """Flow matching: the error of the DiT's velocity against ε - x at x_σ = (1-σ)x + σε. Returns one loss per sample, (B,).

    z, source and noise (B, 16, F, h, w), references [(B, 16, 1, h', w')], sigma (B,), context (B, Q, C).
    """
    velocity = model.dit(sampler.add_noise(z, noise, sigma), 1000 * sigma, context, source=source, references=references)
    error = (velocity.float() - sampler.target(z, noise)).square()                                  # (B, 16, F, h, w)
    if change_weight and source is not None:
        # An edit changes little of the picture, and all the rest is learnt first; weights have mean 1 over each sample.
        change = (z - source).square().mean(dim=1, keepdim=True)                                    # (B, 1, F, h, w)
        weight = 1 + change_weight * change / change.amax(dim=(2, 3, 4), keepdim=True).clamp(min=1e-6)
        error = error * (weight / weight.mean(dim=(2, 3, 4), keepdim=True))
    return error.flatten(1).mean(dim=1)


class Trainer:
    """One training run: the models, the optimizer, and what a step does with them."""

    def __init__(self, args):
        self.args = args
        self.compute = getattr(torch, args.precision)
        self.model = load_model(args, self.compute)
        self.parameters = trainable(self.model, args.stage)
        self.model.dit.gradient_checkpointing = args.gradient_checkpointing
        decayed = [p for name, p in self.parameters.items() if p.ndim > 1 and "queries" not in name and "modulation" not in name]
        plain = [p for p in self.parameters.values() if not any(p is other for other in decayed)]
        groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
        self.ema = {name: p.detach().clone() for name, p in self.parameters.items()} if args.ema else None
        stride, multiple = self.model.vae.temporal_stride, self.model.multiple()
        self.pairs = Pairs(args.data, multiple, stride, args.area, args.frames)
        self.latents = Latents(self.model, args.cache)
        self.step, self.unusable = 0, 0

    def load_batch(self, step):
        """The samples of a step, read from disk: (is_video, [[Sample]]). A broken pair is left out, counted and named."""
        is_video, plan = self.pairs.draw(step, self.args)
        micro_batches = []
        for shape, chosen in plan:
            samples = []
            for i, keeps in chosen:
                try:
                    words = self.pairs.rows[i]["instruction"] if keeps else ""
                    samples.append(self.pairs.load(i, shape, words, self.model.prompt))
                except Exception as error:              # whatever is wrong with one file, the run goes on
                    self.pairs.broken[i] = str(error)
            if samples:
                micro_batches.append(samples)
        return is_video, micro_batches

    def loss(self, samples, is_video, generator):
        """Losses and σ of one micro-batch, each (B,). All random numbers come from `generator`, on the CPU."""
        args, device = self.args, args_device(self.args)
        z = self.latents([sample.target for sample in samples])                                     # (B, 16, F, h, w)
        source, references = None, ()
        if args.stage > 1:
            source = self.latents([sample.source for sample in samples])
            references = [self.latents([image[None] for image in images]) for images in zip(*(s.references for s in samples))]
        sampler = FlowSampler(shift=args.video_shift if is_video else args.image_shift)
        sigma = sampler.draw_sigma(len(samples), generator).to(device)
        noise = torch.randn(z.shape, generator=generator).to(device)
        inputs = self.model.processor.collate([sample.inputs for sample in samples])
        inputs = {name: value.to(device) for name, value in inputs.items()}
        with torch.autocast(device.type, self.compute, enabled=self.compute != torch.float32):
            context = self.model.context(inputs, is_video)
            losses = flow_loss(self.model, context, z.float(), source, references, sigma, noise, sampler, args.change_weight)
        return losses, sigma

    def update(self, is_video, micro_batches):
        """One optimizer step. Returns its figures; a step whose loss or gradient is not finite changes nothing and says so."""
        args = self.args
        generator = torch.Generator().manual_seed(hash_of(args.seed, self.step))
        count = sum(map(len, micro_batches))
        losses, sigmas = [], []
        for samples in micro_batches:
            loss, sigma = self.loss(samples, is_video, generator)
            (loss.sum() / count).backward()
            losses.append(loss.detach())
            sigmas.append(sigma)
        losses, sigmas = torch.cat(losses).cpu(), torch.cat(sigmas).cpu()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), args.clip).item()
        finite = math.isfinite(norm) and bool(losses.isfinite().all())
        rate = learning_rate(self.step, args)
        if finite:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
            for name, average in (self.ema or {}).items():
                average.lerp_(self.parameters[name].detach(), 1 - args.ema)
        self.optimizer.zero_grad()
        bins = (sigmas * SIGMA_BINS).long().clamp(max=SIGMA_BINS - 1)
        by_sigma = [losses[bins == i].mean().item() if (bins == i).any() else None for i in range(SIGMA_BINS)]
        return {"step": self.step, "video": is_video, "samples": count, "loss": losses.mean().item(), "by_sigma": by_sigma,
                "gradient": norm, "lr": rate, "finite": finite}

    @contextlib.contextmanager
    def averaged(self):
        """Inside, the model has its averaged weights, where there are any."""
        kept = {name: self.parameters[name].data for name in self.ema or {}}
        for name in kept:
            self.parameters[name].data = self.ema[name]
        yield
        for name, value in kept.items():
            self.parameters[name].data = value

    def save(self):
        """Writes checkpoints/step-N, which appears whole or not at all, and removes those before the last `--keep`."""
        final = self.args.out / "checkpoints" / f"step-{self.step:07d}"
        partial = final.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            tensors = {name: p.detach().cpu() for name, p in self.parameters.items()}
            tensors |= {f"ema.{name}": value.cpu() for name, value in (self.ema or {}).items()}
            for name, parameter in self.parameters.items():
                tensors |= {f"{key}.{name}": value.cpu() for key, value in self.optimizer.state.get(parameter, {}).items()}
            save_file(tensors, partial / "state.safetensors")
            (partial / "state.json").write_text(json.dumps({"step": self.step, "settings": fixed(self.args)}, indent=2))
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise SystemExit(f"train.py: error: checkpoint {final} could not be written ({error}); the one before is whole")
        for old in checkpoints(self.args.out)[:-self.args.keep]:
            shutil.rmtree(old)

    def resume(self):
        """Goes on from the last checkpoint, if there is one. Raises ValueError when it was made with other settings."""
        found = checkpoints(self.args.out)
        if not found:
            return
        state = json.loads((found[-1] / "state.json").read_text())
        now = fixed(self.args)
        odd = [f"{name} {state['settings'].get(name)} then, {value} now" for name, value in now.items() if state["settings"].get(name) != value]
        if odd:
            raise ValueError(f"{found[-1]} was made with other settings ({'; '.join(odd)}); give them again, or another --out")
        tensors = load_file(found[-1] / "state.safetensors")
        for name, parameter in self.parameters.items():
            parameter.data.copy_(tensors[name])
            moments = {key: tensors[f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in tensors}
            if moments:
                self.optimizer.state[parameter] = {
                    key: value.to("cpu" if key == "step" and parameter.device.type == "cpu" else parameter.device)
                    for key, value in moments.items()}
        for name, average in (self.ema or {}).items():
            average.copy_(tensors[f"ema.{name}"])
        self.step = state["step"]
        print(f"resumed at step {self.step} from {found[-1]}")


def args_device(args):
    return torch.device(args.device)


def hash_of(*values):
    """A 63-bit seed from integers, so that neighboring steps have unrelated noise."""
    return int.from_bytes(hashlib.sha256(repr(values).encode()).digest()[:8], "little") >> 1


def learning_rate(step, args):
    """Linear warm-up, constant (paper), and where asked a linear decay at the end."""
    rising = (step + 1) / max(1, args.warmup)
    falling = (args.steps - step) / args.decay if args.decay else 1
    return args.lr * min(1, rising, falling)


def load_model(args, dtype):
    model = InstructX.from_pretrained(args.weights, args.device, dtype, instructx=args.start)
    if not model.trained and (args.queries or args.lora_rank != model.config.lora_rank):
        raise ValueError("--queries and --lora-rank are for a fresh start")
    return model


def fixed(args):
    """The settings that a resumed run must share with its checkpoint: all that the result depends on."""
    free = {"out", "device", "workers", "keep", "save_every", "log_every", "validate", "validate_every", "validate_count", "cache"}
    plain = lambda value: [str(v) for v in value] if isinstance(value, list) else str(value) if isinstance(value, Path) else value
    return {name: plain(value) for name, value in sorted(vars(args).items()) if name not in free}


def checkpoints(out):
    """Whole checkpoints, oldest first."""
    return sorted(path for path in (out / "checkpoints").glob("step-*") if path.suffix != ".partial")
