"""Small experiments on the design of InstructX (arXiv 2510.08485), in the world of shapes.

    python weights/shapes/claims.py a --weights runs/base --out runs/claims
    python weights/shapes/claims.py table --out runs/claims

Claims of the paper:
    a         LoRA and a two-layer MLP converge faster and end higher than a frozen MLLM with a
              large transformer as connector (MetaQuery's way), or with a Q-Former, whose queries
              read the last hidden states of the frozen MLLM (section 3.2, Fig. 4)
    transfer  after mixed training, kinds of edits that only the images had work on clips
              (section 3.3, Fig. 6); here the clips have no styles and tones
    c         separate queries for images and for clips beat one shared set (section 4.4, Fig. 9);
              here the one set has as many queries as each of the two
    d         all sampled frames, shown to the MLLM, beat the first frame alone (section 4.4,
              Fig. 9); see the clips called "late"
    quality   a short stage on clean data repairs texture (section 3.3, Fig. 5); here all targets
              of stage 2 have the artefacts of JPEG
Questions of our own, which the paper does not ask:
    b         Does a model that saw images alone edit clips?
    e         How should the latents of the source come in: through a copy of the patch embedding,
              through one that starts at zero, or not at all? Should noise levels be logit-normal
              or uniform before they are shifted?

Each is a few arms, which differ in what it is about and in nothing else. Each arm is trained by
train.py, in stage 1 and stage 2, once for each seed; the arms of `quality` go on with a stage 3 of
a quarter of the steps of stage 2, as in the paper. A seed decides the start of queries, connector
and LoRA, the order of the data, all noise and the dropped instructions, and is the same in every
arm. The learning rate is that of the baseline: it was tuned for none of the others. Arms that
several experiments share are trained once, and so is a stage that is the same.

What is unusual: clips called "late", of which nothing that the edit is about is there at first. It
comes in after the middle, so that the first frame does not show what the instruction names. They
are part of the data of every arm.

Short trainings succeed with few edits, so there are measures that say something before: the loss
of flow matching on cases that no training sees, noise and noise levels always the same, and the
errors that world.py's judge measures. Clips whose edit is a style or tone count among the clips,
and once more as "styled".

OUT/base holds the models that all arms start from, data and cache the data, ARM-SEED the runs:
stage1, stage2, stage3, edits (the results) and results.jsonl, which is there when all of it is
whole. The same command goes on where it was cut off. claim-a.png and claims.md show the results.
The DiT that ships has learnt to edit already, and all arms start from that; weights made by the
recipe in weights/shapes/README.md up to stage 1 show more.
"""

import argparse
import functools
import io
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import world

import train
from connector import Connector, InstructX, InstructXConfig, compile_blocks, locate
from dit import WanDiT
from edit import Parser, find_compiler, number, whole
from mllm import Processor, Qwen2_5_VL, add_lora
from sampler import FlowSampler
from vae import WanVAE

MEDIA = ("image", "clip", "late")
GROUPS = ("image", "clip", "styled", "late")  # of results
LATE_KINDS = ("swap", "color", "remove")  # name what they edit, which is there before or after
LOOKS = ("style", "tone")  # kinds of edits
FRAMES = 9
LEVELS = 8  # noise levels of the validation
CHUNK = 16  # cases that are validated at once
JPEG_QUALITY = 5  # of the faulty targets: squares of 8x8 pixels with waves along the edges


# The arms.


LAYER = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}


class Transformer(InstructX):
    """MetaQuery's way: a frozen MLLM and a transformer in which every query sees every other."""

    layers, layer = 6, nn.TransformerEncoderLayer

    def __init__(self, config, mllm, processor, connector, dit, vae, trained=True):
        D, heads = config.mllm_dim, mllm.config.num_attention_heads
        with connector.image_queries.device:
            layers = [self.layer(D, heads, 4 * D, **LAYER) for _ in range(self.layers)]
            last = nn.LayerNorm(D), nn.Linear(D, config.context_dim)
            connector.mlp = nn.Sequential(*layers, *last)
        super().__init__(config, mllm, processor, connector, dit, vae, trained)


class QFormer(Transformer):
    """Queries outside the frozen MLLM, which read its last hidden states by cross-attention."""

    # As many weights as the transformer has: a layer of this kind has two attentions.
    layers, layer = 4, nn.TransformerDecoderLayer

    def context(self, inputs, is_video):
        with torch.no_grad():
            hidden = self.mllm(**inputs)  # (B, L, D)
        x = self.connector.queries(is_video).expand(len(hidden), -1, -1)  # (B, Q, D)
        mask = inputs.get("attention_mask")
        padding = None if mask is None else (mask == 0).to(x.device)  # (B, L)
        *blocks, norm, linear = self.connector.mlp
        for block in blocks:
            x = block(x, hidden.type_as(x), memory_key_padding_mask=padding)
        return linear(norm(x))  # (B, Q, context_dim)


class OneSet(InstructX):
    """Clips have the queries of images."""

    def context(self, inputs, is_video):
        return super().context(inputs, is_video=False)


class FirstFrame(InstructX):
    """Of a clip the MLLM sees the first frame, as an image. The DiT sees the source as ever."""

    def prompt(self, frames, instruction, references=(), fps=16.0):
        return super().prompt(frames[:1], instruction, references, fps)


@dataclass(frozen=True)
class Arm:
    name: str
    label: str
    model: type = InstructX
    lora: bool = True
    clips: bool = True  # whether stages 2 and 3 have any
    source: str = "copy"  # how the source embedding starts; "none": zero, and not trained
    sigma: str = "logit-normal"
    data: str = "data"  # of stage 2: "data", "plain" (no looks in clips) or "faulty" (JPEG)
    quality: str = ""  # the data of stage 3; "": there is no stage 3
    stage1: str = "baseline"  # the arm whose stage 1 it goes on from; its own where that differs
    stage2: str = ""  # the arm whose stage 2 it goes on from; "": its own


ARMS = [
    Arm("baseline", "baseline"),
    Arm("transformer", "transformer", Transformer, lora=False, stage1="transformer"),
    Arm("qformer", "Q-Former", QFormer, lora=False, stage1="qformer"),
    Arm("oneset", "one set", OneSet),
    Arm("images", "images alone", OneSet, clips=False),
    Arm("first", "first frame", FirstFrame),
    Arm("zero", "source from zero", source="zero"),
    Arm("none", "no source", source="none"),
    Arm("uniform", "uniform levels", sigma="uniform", stage1="uniform"),
    Arm("withheld", "looks in images alone", data="plain"),
    Arm("clean", "clean, then clean", quality="data", stage2="baseline"),
    Arm("faulty", "faulty, then faulty", data="faulty", quality="faulty"),
    Arm("repaired", "faulty, then clean", quality="data", stage2="faulty"),
]
ARMS = {arm.name: arm for arm in ARMS}

# Images alone leave queries for clips as they were drawn, so (b) is about models with one set; the
# baseline stands by.
CLAIMS = {
    "a": (
        "LoRA and a two-layer MLP against a frozen MLLM and a larger connector",
        ("baseline", "transformer", "qformer"),
    ),
    "transfer": ("Styles and tones in images alone, or in clips too", ("withheld", "baseline")),
    "c": ("Two sets of queries against one", ("baseline", "oneset")),
    "d": ("All sampled frames against the first", ("baseline", "first")),
    "quality": ("A short stage on clean data after faulty ones", ("repaired", "faulty", "clean")),
    "b": ("Images alone against images and clips", ("images", "oneset", "baseline")),
    "e": ("Latents of the source, and levels of noise", ("baseline", "zero", "none", "uniform")),
}


# What all arms share: models and data.


def prepare(options):
    """Writes OUT/base, OUT/settings.json and OUT/data where they are missing.

    Raises ValueError where runs of OUT were made with other settings: they could not be compared.
    """
    base, data, file = (options.out / name for name in ("base", "data", "settings.json"))
    settings = {}
    for name, value in vars(options).items():
        if name not in ("commands", "out", "seeds", "device"):
            settings[name] = str(value.resolve()) if isinstance(value, Path) else value
    earlier = json.loads(file.read_text()) if file.exists() else settings
    changes = []
    for name, value in settings.items():
        if earlier.get(name) != value:
            changes.append(f"{name} was {earlier.get(name)} and is {value}")
    if changes:
        text = f"{options.out} holds runs with other settings: {'; '.join(changes)}"
        raise ValueError(f"{text}; take another --out")
    if not base.exists():
        copy_base(options.weights, base)
    if not file.exists():
        file.write_text(json.dumps(settings, indent=1) + "\n")
    for media, count in zip(MEDIA, options.data):
        write_cases(data / media, [(media, count)], "train", 20)
        if "transfer" in options.commands:
            write_plain(data / media)
        if "quality" in options.commands:
            write_faulty(data / media)
    write_cases(data / "test", [*zip(MEDIA, options.test)], options.split, 30)


def copy_base(weights, base):
    """The models without what train.py adds: no arm shall find queries or a source embedding."""
    folders, partial = locate(weights), base.with_suffix(".partial")
    is_trained = not (weights / "dit").is_dir() and folders["dit"].parent == folders.get(
        "instructx"
    )
    if is_trained:
        text = f"all arms start from the DiT in {weights}, which can edit already"
        print(f"claims.py: {text}", file=sys.stderr)
    shutil.rmtree(partial, ignore_errors=True)
    for name in ("mllm", "vae"):
        shutil.copytree(folders[name], partial / name)
    released = folders["dit"] if is_trained else weights / "dit"
    dit = WanDiT.from_pretrained(released, dtype=torch.float32)
    dit.source_embedding, dit.config = None, replace(dit.config, source_embedding=False)
    dit.save_pretrained(partial / "dit")
    os.replace(partial, base)


def write_cases(folder, counts, split, seed):
    """Writes cases as world.make does, `counts` [(media, count)]; data.jsonl comes last."""
    if (folder / "data.jsonl").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for media, count in counts:
        for i in tqdm(range(count), f"{folder.name} {media}", disable=None):
            case, start = draw(media, (seed + MEDIA.index(media)) * world.SEEDS + i, split)
            styled = "-styled" if media == "clip" and case.kind in LOOKS else ""
            line = world.write_case(case, folder, f"{media}{styled}-{i:05d}")
            lines.append(line | {"late": start})
    write_lines(folder / "data.jsonl", lines)


def groups_of(name):
    """The groups that the results of a test case count in: "clip-styled-00004" -> clip, styled."""
    return name.split("-")[:-1]


def write_plain(folder):
    """Writes plain.jsonl beside data.jsonl: all but clips whose edit changes the look."""
    if (folder / "plain.jsonl").exists():
        return
    lines = []
    for line in read_lines(folder / "data.jsonl"):
        if not (line["video"] and line["target_scene"]["look"]):
            lines.append(line)
    write_lines(folder / "plain.jsonl", lines)


def write_faulty(folder):
    """Writes faulty.jsonl beside data.jsonl: the same edits, with JPEG's artefacts in the targets.

    The sources stay as they are, so that the model has to add the fault.
    """
    if (folder / "faulty.jsonl").exists():
        return
    lines = read_lines(folder / "data.jsonl")
    for line in tqdm(lines, f"{folder.name}, faulty", disable=None):
        target = folder / line["target"]
        frames = np.stack([through_jpeg(frame) for frame in world.read_frames(target)])
        faulty = target.with_name(f"{target.stem}-faulty")
        written = world.write_frames(frames, faulty, line["video"])
        line["target"] = os.path.relpath(written, folder)
    write_lines(folder / "faulty.jsonl", lines)


def through_jpeg(frame):
    """uint8 (H, W, 3) -> the same as JPEG keeps it."""
    stream = io.BytesIO()
    Image.fromarray(frame).save(stream, "JPEG", quality=JPEG_QUALITY)
    return np.asarray(Image.open(stream))


def read_lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def write_lines(file, rows):
    """JSON lines that appear whole or not at all."""
    with whole(file) as partial:
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows))


def draw(media, seed, split):
    """(case, frame at which its subject comes in). Seeds in a row take all kinds in turn."""
    if media != "late":
        kind = world.KINDS[seed % len(world.KINDS)]
        case = world.sample(seed, media == "clip", split, kind, frames=FRAMES)
        return case, 0
    kind, draft = world.draw(seed, True, split, LATE_KINDS[seed % len(LATE_KINDS)])
    start = int(np.random.default_rng([seed, 1]).integers(FRAMES // 2, FRAMES - 2))
    edited = set(draft.source.things) ^ set(draft.scene.things)
    others = tuple(thing for thing in draft.source.things if thing not in edited)
    before = world.render(replace(draft.source, things=others), frames=FRAMES)[:start]
    source, target = (world.render(scene, frames=FRAMES) for scene in (draft.source, draft.scene))
    case = world.Case(
        seed=seed,
        kind=kind,
        split=split,
        instruction=draft.instruction,
        source=np.concatenate([before, source[start:]]),
        target=np.concatenate([before, target[start:]]),
        references=[],
        source_scene=draft.source,
        target_scene=draft.scene,
        reference_scenes=[],
    )
    return case, start


# Training, by train.py.


def fresh(model_class, folder, settings, seed):
    """The models in `folder` with queries, connector and LoRA that `seed` decides."""
    mllm, dit = Qwen2_5_VL.from_pretrained(folder / "mllm"), WanDiT.from_pretrained(folder / "dit")
    widths = {"mllm_dim": mllm.config.hidden_size, "context_dim": dit.config.text_dim}
    config = InstructXConfig(**widths, **settings)
    processor = Processor.from_pretrained(folder / "mllm")
    vae = WanVAE.from_pretrained(folder / "vae")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        connector = Connector(config).initialize()
        if config.lora_rank:
            add_lora(mllm, config.lora_rank, config.lora_alpha)
        return model_class(config, mllm, processor, connector, dit, vae)


def build(arm, compiled, args):
    """The model of an arm with what trains marked, for train.main."""
    if args.start:
        model = arm.model.from_pretrained(args.weights, instructx=args.start)
    else:
        model = fresh(arm.model, args.weights, args.config, args.seed)
    train.trainable(model, args)
    if args.stage == 2 and arm.source != "copy":
        nn.init.zeros_(model.dit.source_embedding.weight)
        model.dit.source_embedding.requires_grad_(arm.source == "zero")
    if compiled:
        torch.compiler.reset()  # or what earlier models left would count towards torch's limits
        compile_blocks([*model.dit.blocks, *model.mllm.model.layers])
    return model


@torch.no_grad()
def validate(args, model, loader, held_out, step):
    """{group: mean loss on its test cases}, for train.main, in place of its losses and pictures.

    Plain flow matching whatever is trained, over evenly spread noise levels.
    """
    batches, losses = defaultdict(list), defaultdict(list)
    for i, (pair, shape) in enumerate(held_out):
        groups = tuple(groups_of(pair.source.name))
        batches[groups, shape if args.stage > 1 else shape[:1]].append(i)
    for (groups, shape), numbers in batches.items():
        for start in range(0, len(numbers), CHUNK):
            chunk = numbers[start : start + CHUNK]
            pairs = [held_out[i] for i in chunk]
            samples = [loader.sample(pair, shape, pair.instruction) for pair, shape in pairs]
            z, source, references = train.sample_latents(loader.latents, samples)
            generators = [torch.Generator().manual_seed(i) for i in chunk]
            noise = torch.stack([torch.randn(z.shape[1:], generator=one) for one in generators])
            levels = [(i % LEVELS + 0.5) / LEVELS for i in chunk]
            sigma, noise = torch.tensor(levels, device=z.device), noise.to(z.device)
            with train.autocast(z.device, args):
                inputs = model.processor.collate([sample.inputs for sample in samples])
                context = model.context(inputs, is_video=shape[0][0] > 1)
                inputs = context, z, source, references, sigma, noise, FlowSampler()
                values = train.flow_loss(model.dit, *inputs).tolist()
            for group in groups:
                losses[group] += values
    return {group: statistics.mean(values) for group, values in losses.items()}


def step_count(options, stage):
    """Stage 3 takes a quarter of the steps of stage 2, as in the paper."""
    return math.ceil(options.steps[1] / 4) if stage == 3 else options.steps[stage - 1]


def command_line(options, arm, stage, seed, out, start=None):
    """The arguments of train.py for one stage of an arm, as in weights/shapes/README.md."""
    data = {1: "data", 2: arm.data, 3: arm.quality}[stage]
    media = MEDIA if stage > 1 and arm.clips else MEDIA[:1]
    images, clips = options.batch[min(stage, 2) - 1], options.batch[2]
    values = {
        "stage": stage,
        "weights": options.out / "base",
        "out": out,
        "seed": seed,
        "cache": options.out / "cache",
        "steps": step_count(options, stage),
        "save-every": 100,
        "image-batch": images,
        "video-batch": clips,
        "micro-batch": max(images, clips),
        "video-share": options.video_share,
        "lr": options.lr,
        "warmup": 20,
        "sigma": arm.sigma,
        "image-shift": 3,
        "video-shift": 3,
        "device": options.device,
        "precision": options.precision,
        "validate": options.out / "data" / "test" / "data.jsonl",
        "validate-every": options.validate_every,
    }
    if stage > 1:
        values |= {"change-weight": 3, "muon-lr": 20 * options.lr, "schedule": "linear"}
    if start:
        values["start"] = start
    line = ["--data", *(options.out / "data" / name / f"{data}.jsonl" for name in media)]
    for name, value in values.items():
        line += [f"--{name}", value]
    if not start:
        line += [
            "--config",
            f"image_queries={options.queries}",
            f"video_queries={options.queries}",
            "hidden_dim=384",
            f"lora_rank={32 * arm.lora}",
            "lora_alpha=32",
            f"mllm_frames={FRAMES}",
            "guidance=2",
            "shift=3",
            f"steps={options.sampling_steps}",
        ]
    return [*map(str, line)]


def stages(options, arm, seed):
    """What an arm needs, in order: [(stage, arm that decides how, folder, folder of its start)]."""
    trainer = ARMS[arm.stage2 or arm.name]
    first = options.out / f"{arm.stage1}-{seed}" / "stage1"
    second = options.out / f"{trainer.name}-{seed}" / "stage2"
    runs = [(1, ARMS[arm.stage1], first, None), (2, trainer, second, first / "instructx")]
    if arm.quality:
        third = options.out / f"{arm.name}-{seed}" / "stage3"
        runs.append((3, arm, third, second / "instructx"))
    return runs


def last_stage(out, arm, seed):
    return out / f"{arm.name}-{seed}" / ("stage3" if arm.quality else "stage2")


def run(options, arm, seed):
    """Trains and judges an arm, as far as that is not done -> train.py's exit code if it fails."""
    folder = options.out / f"{arm.name}-{seed}"
    if (folder / "results.jsonl").exists():
        return
    for stage, trainer, out, start in stages(options, arm, seed):
        if not (out / "instructx").exists():
            print(f"claims.py: {out}", file=sys.stderr)
            line = command_line(options, trainer, stage, seed, out, start)
            builder = functools.partial(build, trainer, options.compile)
            if code := train.main(line, builder, validate):
                return code
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
    rows = judge(options, arm, seed, folder)
    first = stages(options, arm, seed)[0][2]
    curve = [value for _, value in curve_of(first, "image")]
    rows[0] |= {"stage1": curve[-1], "stage1_mean": statistics.mean(curve)}
    write_lines(folder / "results.jsonl", rows)


def rivals(line, target):
    """Those of world.py. In a late clip nothing can be wrong before the edit's subject comes in."""
    scenes = (world.Scene.from_dict(line[name]) for name in ("source_scene", "target_scene"))
    return [
        np.concatenate([target[: line["late"]], rival[line["late"] :]])
        for rival in world.rivals(*scenes, size=target.shape[1], frames=len(target))
    ]


def judge(options, arm, seed, folder):
    """Edits all test cases into `folder`/edits and judges them -> a row for each group."""
    last = last_stage(options.out, arm, seed)
    instructx = last / "instructx"
    base, device = options.out / "base", options.device
    model = arm.model.from_pretrained(base, device, torch.float32, instructx=instructx)
    data, results, verdicts = options.out / "data" / "test", folder / "edits", defaultdict(list)
    results.mkdir(exist_ok=True)
    for line in tqdm(read_lines(data / "data.jsonl"), f"{folder.name} edits", disable=None):
        source, target = (world.read_frames(data / line[name]) for name in ("source", "target"))
        if world.find_result(results, line["id"]) is None:
            references = [world.read_frames(data / path)[0] for path in line["references"]]
            frames = model.edit(source, line["instruction"], references, seed=seed)
            world.write_result(frames, results, line["id"], clip=line["video"])
        output = world.read_frames(world.find_result(results, line["id"]))
        verdict = world.judge(source, target, output, rivals(line, target))
        for group in groups_of(line["id"]):
            verdicts[group].append(verdict)
    rows = []
    for group in GROUPS:
        if group in verdicts:
            row = {"arm": arm.name, "seed": seed, "media": group, "cases": len(verdicts[group])}
            row["loss"] = curve_of(last, group)[-1][1]
            summary = world.summary(verdicts[group])
            rows.append(row | {name: summary[name] for name in ("success", "inside", "outside")})
    return rows


def estimate(options, runs):
    """Prints how long all will take that is not whole yet, from a few steps of each model."""
    left, training = [], {}
    for arm, seed in runs:
        if (options.out / f"{arm.name}-{seed}" / "results.jsonl").exists():
            continue
        left.append(arm)
        for stage, trainer, out, _ in stages(options, arm, seed):
            if not (out / "instructx").exists():
                training[out] = stage, trainer  # once, however many arms go on from it
    if not left:
        return
    models = {arm.model: arm for arm in [*left, *(trainer for _, trainer in training.values())]}
    costs = {}
    for model, arm in models.items():
        cost = costs[model] = measure(options, replace(arm, clips=True))
        text = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in cost.items())
        print(f"claims.py: {model.__name__}: {text}", flush=True)
    seconds = sum(costs[arm.model]["all edits"] for arm in left)
    for stage, trainer in training.values():
        cost, steps = costs[trainer.model], step_count(options, stage)
        share = options.video_share * trainer.clips
        step = share * cost["clip step of stage 2"] + (1 - share) * cost["image step of stage 2"]
        step = cost["step of stage 1"] if stage == 1 else step
        validation = cost[f"validation in stage {min(stage, 2)}"]
        seconds += steps * step + (2 + steps // options.validate_every) * validation
    numbers = [stage for stage, _ in training.values()]
    counts = ", ".join(f"{numbers.count(stage)} of stage {stage}" for stage in sorted({*numbers}))
    hours = f"about {seconds / 3600:.2f} hours"
    print(
        f"claims.py: to do: {counts or 'no stage'}, edits of {len(left)} runs; {hours}", flush=True
    )


def measure(options, arm):
    """{what: seconds} of an arm, from short runs."""
    rarer = min(options.video_share, 1 - options.video_share)
    steps = [3, math.ceil(3 / rarer)]  # a few of images and of clips
    short = argparse.Namespace(**vars(options) | {"steps": steps, "validate_every": 1000})
    cost = {}
    with tempfile.TemporaryDirectory() as folder:
        for stage in (1, 2):
            out = Path(folder) / f"stage{stage}"
            line = command_line(short, arm, stage, 0, out)
            if train.main(line, functools.partial(build, arm, options.compile), validate):
                raise ValueError(f"a short run of {arm.name} failed")
            rows = read_lines(out / "metrics.jsonl")
            seconds = {False: [], True: []}
            for row in rows:
                if "video" in row:
                    seconds[row["video"]].append(row["seconds"])
            # The quickest: latents are known by then, as they are for most of a run.
            cost["step of stage 1" if stage == 1 else "image step of stage 2"] = min(seconds[False])
            if stage == 2:
                cost["clip step of stage 2"] = min(seconds[True])
            cost[f"validation in stage {stage}"] = rows[-1]["seconds"]
        base, instructx = options.out / "base", out / "instructx"
        model = arm.model.from_pretrained(base, options.device, torch.float32, instructx=instructx)
    cost["all edits"] = 0.0
    for length, count in zip((1, FRAMES, FRAMES), options.test):
        began = time.perf_counter()
        model.edit(np.zeros((length, 64, 64, 3), np.uint8), "make it night")
        cost["all edits"] += count * (time.perf_counter() - began)
    return cost


# What came out.


def curve_of(folder, group):
    """[(step, loss)] of a stage, in validation."""
    rows = [row for row in read_lines(folder / "metrics.jsonl") if group in row.get("held_out", {})]
    return [(row["step"], row["held_out"][group]) for row in rows]


def read_rows(out):
    """Every row of every run that is whole."""
    return [row for file in sorted(out.glob("*/results.jsonl")) for row in read_lines(file)]


def rows_of(rows, name, group):
    """The rows of one arm and one group, a row for each seed."""
    return [row for row in rows if row["arm"] == name and row["media"] == group]


COLUMNS = {
    "loss": ("loss", ".4f"),
    "success": ("success in %", ".1f"),
    "inside": ("error inside", ".3f"),
    "outside": ("error outside", ".4f"),
    "stage1": ("stage 1: last loss", ".4f"),
    "stage1_mean": ("stage 1: mean of all losses", ".4f"),
}


def spread(values, form):
    """Mean and standard deviation, "0.250 ± 0.010"; of one value alone the value; "" of none."""
    if not values:
        return ""
    mean = format(statistics.mean(values), form)
    return mean if len(values) == 1 else f"{mean} ± {format(statistics.stdev(values), form)}"


def table(claim, rows):
    """The rows of a claim as a Markdown table: mean and deviation over the seeds of an arm."""
    title, names = CLAIMS[claim]
    lines = [
        f"### ({claim}) {title}",
        "",
        "| arm | on | cases | seeds | " + " | ".join(head for head, _ in COLUMNS.values()) + " |",
        "| --- | --- | ---: | ---: |" + " ---: |" * len(COLUMNS),
    ]
    for group in GROUPS:
        for name in names:
            arm_rows = rows_of(rows, name, group)
            if not arm_rows:
                continue
            cells = [ARMS[name].label, group, str(arm_rows[0]["cases"]), str(len(arm_rows))]
            for key, (_, form) in COLUMNS.items():
                cells.append(spread([row[key] for row in arm_rows if key in row], form))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def compared(rows):
    """The experiments of which two arms or more have been run."""
    names = {row["arm"] for row in rows}
    return [claim for claim, (_, arms) in CLAIMS.items() if len(names & {*arms}) > 1]


NOTE = (
    "Loss: flow matching on cases that no training saw, always with the same noise. Errors: as "
    "world.py defines them; an untouched source has 1 inside and 0 outside. styled: the clips "
    "whose edit is a style or tone.\n"
)


def plot(out, claim, rows):
    """Writes OUT/claim-X.png: held-out losses, mean over the seeds, and each seed's measures."""
    width, height = 400, 300
    names = {row["arm"] for row in rows}
    arms = [ARMS[name] for name in CLAIMS[claim][1] if name in names]
    groups = [group for group in GROUPS if any(rows_of(rows, arm.name, group) for arm in arms)]
    page = Image.new("RGB", (4 * width, (1 + len(groups)) * height), "white")
    draw = ImageDraw.Draw(page)

    def curves(folder_of, group):
        means = {}
        for arm in arms:
            seeds = sorted({row["seed"] for row in rows if row["arm"] == arm.name})
            means[arm.label] = mean_curve([curve_of(folder_of(arm, s), group) for s in seeds])
        return means

    def first_stage(arm, seed):
        return out / f"{arm.stage1}-{seed}" / "stage1"

    losses = curves(first_stage, "image")
    train.panel(draw, (0, 0), "loss on image, stage 1", losses, 4 * width, height)
    for i, group in enumerate(groups, 1):
        losses = curves(functools.partial(last_stage, out), group)
        title = f"loss on {group}, last stage"
        train.panel(draw, (0, i * height), title, losses, width, height)
        for j, key in enumerate(("success", "inside", "outside"), 1):
            values = {}
            for arm in arms:
                values[arm.label] = [row[key] for row in rows_of(rows, arm.name, group)]
            corner, title = (j * width, i * height), f"{COLUMNS[key][0]}, {group}"
            dots(draw, corner, title, values, width, height, from_zero=key == "success")
    with whole(out / f"claim-{claim}.png") as partial:
        page.save(partial, format="PNG")


def mean_curve(curves):
    """Mean of several [(step, loss)] with the same steps."""
    return [(points[0][0], statistics.mean(loss for _, loss in points)) for points in zip(*curves)]


def dots(draw, corner, title, columns, width, height, from_zero):
    """One plot: {name: [value]}, a column of dots for each name, with a line at their mean."""
    left, right = corner[0] + 70, corner[0] + width - 20
    top, bottom = corner[1] + 40, corner[1] + height - 40
    columns = {name: values for name, values in columns.items() if values}
    everything = [value for values in columns.values() for value in values]
    low, high = min(everything), max(everything) or 1
    low = 0 if from_zero or low < high / 2 or low == high else low

    def y_of(value):
        return bottom - 8 - (value - low) / (high - low) * (bottom - top - 16)

    draw.text((left, corner[1] + 12), title, "black", font_size=16)
    for value in train.round_numbers(low, high):
        y = y_of(value)
        draw.line((left, y, right, y), "#dddddd")
        draw.text((left - 8, y), f"{value:g}", "black", anchor="rm", font_size=12)
    for i, (name, values) in enumerate(columns.items()):
        x, y = left + (i + 0.5) * (right - left) / len(columns), y_of(statistics.mean(values))
        draw.line((x - 16, y, x + 16, y), train.COLORS[i], 2)
        for value in values:
            y = y_of(value)
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), outline=train.COLORS[i], width=2)
        draw.text((x, bottom + 8 + 14 * (i % 2)), name, train.COLORS[i], anchor="mt", font_size=12)


def parse(arguments):
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="claims.py", description=__doc__, formatter_class=raw)
    count, share = number(int, 1, 10**6), number(float, 0.05, 0.95)

    def add(name, default, text, type, **more):
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        text = f"{text} (default: {shown})"
        parser.add_argument(name, default=default, type=type, help=text, **more)

    text = f"{', '.join(CLAIMS)}: run an experiment; table, plot: show again what there is"
    choices = (*CLAIMS, "table", "plot")
    parser.add_argument("commands", nargs="+", choices=choices, metavar="COMMAND", help=text)
    add("--weights", HERE, "weights folder that all start from", Path)
    add("--out", Path("runs/claims"), "folder of the runs", Path)
    add("--seeds", 3, "runs of each arm", count)
    two = {"nargs": 2, "metavar": ("ONE", "TWO")}
    add("--steps", [400, 1000], "steps of stage 1 and of stage 2", count, **two)
    text = "images of a step in stage 1, images and clips of one in stages 2 and 3"
    three = {"nargs": 3, "metavar": ("ONE", "IMAGES", "CLIPS")}
    add("--batch", [32, 16, 4], text, count, **three)
    add("--video-share", 0.4, "share of the steps of stages 2 and 3 that take clips", share)
    media = {"nargs": 3, "metavar": ("I", "C", "L")}
    add("--data", [6000, 800, 800], "images, clips and late clips to train on", count, **media)
    text = "images, clips and late clips to validate on and to edit"
    add("--test", [45, 27, 27], text, count, **media)
    text = "of these; heldout: combinations that training never has"
    add("--split", "train", text, str, choices=("train", "heldout"))
    add("--queries", 32, "in each set", count)
    add("--lr", 1e-3, "learning rate; falls to 0 in stages 2 and 3", number(float, 0, 1))
    add("--validate-every", 50, "steps between validations", count)
    add("--sampling-steps", 10, "of each edit", count)
    add("--device", "cuda" if torch.cuda.is_available() else "cpu", "where to train", str)
    text = "of matrix products in training"
    add("--precision", "float32", text, str, choices=("float32", "bfloat16"))
    text = "train compiled layers: a quarter less time, and other rounding"
    parser.add_argument("--compile", action="store_true", help=text)
    return parser.parse_args(arguments)


def main(arguments=None):
    try:
        options = parse(arguments)
        claims = [command for command in options.commands if command in CLAIMS]
        if claims:
            if options.compile and options.device == "cpu":
                find_compiler("--compile")
            prepare(options)
            names = dict.fromkeys(name for claim in claims for name in CLAIMS[claim][1])
            runs = [(ARMS[name], seed) for seed in range(options.seeds) for name in names]
            estimate(options, runs)
            for arm, seed in runs:
                if code := run(options, arm, seed):
                    return code
        rows = read_rows(options.out)
        complete = compared(rows)
        if not complete:
            raise ValueError(f"{options.out} holds no two arms to compare; run a claim first")
        tables = {claim: table(claim, rows) for claim in complete}
        with whole(options.out / "claims.md") as partial:
            partial.write_text("\n".join([*tables.values(), NOTE]))
        shown = complete if "table" in options.commands else claims
        print("\n".join(tables[claim] for claim in shown), end="")
        for claim in complete if "plot" in options.commands else claims:
            plot(options.out, claim, rows)
        return 0
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"claims.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("claims.py: interrupted; the same command goes on where it was", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
