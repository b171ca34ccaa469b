"""The claims of the paper (InstructX, arXiv 2510.08485, sec. 4), tested in the world of shapes.

    python weights/shapes/claims.py a --weights runs/base --out runs/claims
    python weights/shapes/claims.py table --out runs/claims

    a  LoRA and a two-layer MLP, against a frozen MLLM with a large transformer as connector
       (MetaQuery's way), and against a Q-Former, whose queries read the last hidden states of the
       frozen MLLM
    b  images and clips as data, against images alone
    c  separate queries for images and for clips, against one shared set of the same number
    d  all sampled frames shown to the MLLM, against the first frame alone; see the clips called
       "late"
    e  latents of the source through a copy of the patch embedding, through one that starts at
       zero, or not at all; and noise levels logit-normal or uniform, both shifted

A claim is a few arms, which differ in what the claim is about and in nothing else. Each arm is
trained by train.py, in stage 1 and stage 2, once for each seed. A seed decides the start of
queries, connector and LoRA, the order of the data, all noise and the dropped instructions, and is
the same in every arm. The learning rate is that of the baseline: it was tuned for none of the
others. Arms that several claims share are trained once, and so is a stage 1 that is the same.

What is unusual: clips called "late", of which nothing that the edit is about is there at first. It
comes in after the middle, so that the first frame does not show what the instruction names. They
are part of the data of every arm.

Short trainings succeed with few edits, so there are measures that say something before: the loss
of flow matching on cases that no training sees, noise and noise levels always the same, and the
errors that world.py's judge measures.

OUT/base holds the models that all arms start from, data and cache the data, ARM-SEED the runs:
stage1, stage2, edits (the results) and results.jsonl, which is there when all of it is whole. The
same command goes on where it was cut off. claim-a.png and claims.md show the results. The DiT that
ships has learnt to edit already, and all arms start from that; weights as pretrain.py makes them
show more.
"""

import argparse
import functools
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
from connector import Connector, InstructX, InstructXConfig, locate
from dit import WanDiT
from edit import Parser, number
from mllm import Processor, Qwen2_5_VL, add_lora
from sampler import FlowSampler
from vae import WanVAE

MEDIA = ("image", "clip", "late")
LATE_KINDS = (
    "swap",
    "color",
    "remove",
)  # what is edited is named by words, and is there before or after
FRAMES = 9
REDRAWN = (
    9 * 200000
)  # from a seed whose edit changes nothing to another of its kind, past all that --data can reach
LEVELS = 8  # noise levels of the validation
CHUNK = 16  # cases that are validated at once


# The arms.


class Transformer(InstructX):
    """MetaQuery's way: a frozen MLLM and a transformer in which every query sees every other."""

    layers = 6

    def __init__(self, config, mllm, processor, connector, dit, vae, trained=True):
        D, heads = config.mllm_dim, mllm.config.num_attention_heads
        with connector.image_queries.device:
            blocks = [
                nn.TransformerEncoderLayer(
                    D,
                    heads,
                    4 * D,
                    dropout=0.0,
                    activation="gelu",
                    batch_first=True,
                    norm_first=True,
                )
                for _ in range(self.layers)
            ]
            connector.mlp = nn.Sequential(
                *blocks, nn.LayerNorm(D), nn.Linear(D, config.context_dim)
            )
        super().__init__(config, mllm, processor, connector, dit, vae, trained)


class QFormer(InstructX):
    """Queries outside the frozen MLLM, which read its last hidden states by cross-attention."""

    layers = 4  # as many weights as the transformer: a layer has two attentions

    def __init__(self, config, mllm, processor, connector, dit, vae, trained=True):
        D, heads = config.mllm_dim, mllm.config.num_attention_heads
        with connector.image_queries.device:
            blocks = [
                nn.TransformerDecoderLayer(
                    D,
                    heads,
                    4 * D,
                    dropout=0.0,
                    activation="gelu",
                    batch_first=True,
                    norm_first=True,
                )
                for _ in range(self.layers)
            ]
            connector.mlp = nn.ModuleList(
                [*blocks, nn.LayerNorm(D), nn.Linear(D, config.context_dim)]
            )
        super().__init__(config, mllm, processor, connector, dit, vae, trained)

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
    clips: bool = True  # whether stage 2 has any
    source: str = "copy"  # how the source embedding starts; "none": zero, and not trained
    sigma: str = "logit-normal"
    stage1: str = "baseline"  # the arm whose stage 1 it goes on from; its own where that differs


ARMS = {
    arm.name: arm
    for arm in (
        Arm("baseline", "baseline"),
        Arm("transformer", "transformer", Transformer, lora=False, stage1="transformer"),
        Arm("qformer", "Q-Former", QFormer, lora=False, stage1="qformer"),
        Arm("oneset", "one set", OneSet),
        Arm("images", "images alone", OneSet, clips=False),
        Arm("first", "first frame", FirstFrame),
        Arm("zero", "source from zero", source="zero"),
        Arm("none", "no source", source="none"),
        Arm("uniform", "uniform levels", sigma="uniform", stage1="uniform"),
    )
}

# Images alone leave queries for clips as they were drawn, so (b) is about models with one set; the
# baseline stands by.
CLAIMS = {
    "a": (
        "LoRA and a two-layer MLP against a frozen MLLM and a larger connector",
        ("baseline", "transformer", "qformer"),
    ),
    "b": ("Images alone against images and clips", ("images", "oneset", "baseline")),
    "c": ("Two sets of queries against one", ("baseline", "oneset")),
    "d": ("All sampled frames against the first", ("baseline", "first")),
    "e": ("Latents of the source, and levels of noise", ("baseline", "zero", "none", "uniform")),
}


# What all arms share: models and data.


def prepare(options):
    """Writes OUT/base, OUT/settings.json and OUT/data where they are missing.

    Raises ValueError where runs of OUT were made with other settings: they could not be compared.
    """
    base, data, file = (options.out / name for name in ("base", "data", "settings.json"))
    settings = {
        name: str(value.resolve()) if isinstance(value, Path) else value
        for name, value in vars(options).items()
        if name not in ("commands", "out", "seeds", "device")
    }
    known = json.loads(file.read_text()) if file.exists() else settings
    if odd := [
        f"{name} was {known.get(name)} and is {value}"
        for name, value in settings.items()
        if known.get(name) != value
    ]:
        raise ValueError(
            f"{options.out} holds runs with other settings: {'; '.join(odd)}; take another --out"
        )
    if not base.exists():
        copy_base(options.weights, base)
    if not file.exists():
        file.write_text(json.dumps(settings, indent=1) + "\n")
    for media, count in zip(MEDIA, options.data):
        write_cases(data / media, [(media, count)], "train", 20)
    write_cases(data / "test", [*zip(MEDIA, options.test)], options.split, 30)


def copy_base(weights, base):
    """The models without what train.py adds: no arm shall find queries or a source embedding."""
    place, partial = locate(weights), base.with_suffix(".partial")
    trained = not (weights / "dit").is_dir() and place["dit"].parent == place.get("instructx")
    if trained:
        print(
            f"claims.py: all arms start from the DiT in {weights}, which can edit already",
            file=sys.stderr,
        )
    shutil.rmtree(partial, ignore_errors=True)
    for name in ("mllm", "vae"):
        shutil.copytree(place[name], partial / name)
    dit = WanDiT.from_pretrained(place["dit"] if trained else weights / "dit", dtype=torch.float32)
    dit.source_embedding = None
    dit.save_pretrained(partial / "dit")
    os.replace(partial, base)


def write_cases(folder, parts, split, seed):
    """Writes cases as world.make does, `parts` [(media, count)]; data.jsonl comes last."""
    if (folder / "data.jsonl").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for media, count in parts:
        for i in tqdm(range(count), f"{folder.name} {media}", disable=None):
            case, start = draw(media, (seed + MEDIA.index(media)) * world.SEEDS + i, split)
            lines.append(
                world.write_case(case, folder, f"{media}-{i:05d}") | {"media": media, "late": start}
            )
    write_lines(folder / "data.jsonl", lines)


def read_lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def write_lines(file, rows):
    """JSON lines that appear whole or not at all."""
    file.with_suffix(".partial").write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(file.with_suffix(".partial"), file)


def draw(media, seed, split):
    """(case, frame at which its subject comes in). Seeds in a row take all kinds in turn."""
    if media != "late":
        case = world.sample(
            seed, media == "clip", split, world.KINDS[seed % len(world.KINDS)], frames=FRAMES
        )
        seen = world.differs(
            case.source, case.target
        ).any()  # a black square on white looks the same in gray
        return (case, 0) if seen else draw(media, seed + REDRAWN, split)
    kind, draft = world.draw(seed, True, split, LATE_KINDS[seed % len(LATE_KINDS)])
    start = int(np.random.default_rng([seed, 1]).integers(FRAMES // 2, FRAMES - 2))
    edited = set(draft.source.things) ^ set(draft.scene.things)
    before = replace(
        draft.source, things=tuple(thing for thing in draft.source.things if thing not in edited)
    )
    before, source, target = (
        world.render(scene, frames=FRAMES) for scene in (before, draft.source, draft.scene)
    )
    source, target = (
        np.concatenate([before[:start], frames[start:]]) for frames in (source, target)
    )
    return world.Case(
        seed, kind, split, draft.instruction, source, target, [], draft.source, draft.scene, []
    ), start


# Training, by train.py.


def fresh(kind, folder, settings, seed):
    """The models in `folder` with queries, connector and LoRA that `seed` decides."""
    mllm, dit = Qwen2_5_VL.from_pretrained(folder / "mllm"), WanDiT.from_pretrained(folder / "dit")
    config = InstructXConfig(
        mllm_dim=mllm.config.hidden_size, context_dim=dit.config.text_dim, **settings
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        connector = Connector(config).initialize()
        if config.lora_rank:
            add_lora(mllm, config.lora_rank, config.lora_alpha)
        return kind(
            config,
            mllm,
            Processor.from_pretrained(folder / "mllm"),
            connector,
            dit,
            WanVAE.from_pretrained(folder / "vae"),
        )


def build(arm, args):
    """The model of an arm with what trains marked, for train.main."""
    if args.start:
        model = arm.model.from_pretrained(args.weights, instructx=args.start)
    else:
        model = fresh(arm.model, args.weights, args.config, args.seed)
    train.trainable(model, args)
    if args.stage > 1 and arm.source != "copy":
        nn.init.zeros_(model.dit.source_embedding.weight)
        model.dit.source_embedding.requires_grad_(arm.source == "zero")
    return model


@torch.no_grad()
def validate(args, model, loader, held_out, step):
    """{media: mean loss on its test cases}, for train.main, in place of its losses and pictures.

    Plain flow matching whatever is trained, over evenly spread noise levels.
    """
    groups, losses = defaultdict(list), defaultdict(list)
    for i, (pair, shape) in enumerate(held_out):
        media = pair.source.name.partition("-")[0]
        groups[media, shape if args.stage > 1 else shape[:1]].append(i)
    for (media, _), numbers in groups.items():
        for start in range(0, len(numbers), CHUNK):
            chunk = numbers[start : start + CHUNK]
            pairs = [held_out[i] for i in chunk]
            samples = [loader.sample(pair, shape, pair.instruction) for pair, shape in pairs]
            z, source, references = train.sample_latents(
                loader.latents, samples
            )  # (B, 16, F, h, w)
            generators = [torch.Generator().manual_seed(i) for i in chunk]
            noise = torch.stack([torch.randn(z.shape[1:], generator=one) for one in generators])
            levels = [(i % LEVELS + 0.5) / LEVELS for i in chunk]
            sigma, noise = torch.tensor(levels, device=z.device), noise.to(z.device)
            with train.autocast(z.device, args):
                inputs = model.processor.collate([sample.inputs for sample in samples])
                context = model.context(inputs, media != "image")
                inputs = context, z, source, references, sigma, noise, FlowSampler()
                losses[media] += train.flow_loss(model.dit, *inputs).tolist()
    return {media: statistics.mean(values) for media, values in losses.items()}


def command_line(options, arm, stage, seed, out, start=None):
    """The arguments of train.py for one stage of an arm, as in the recipe of the weights."""
    data = options.out / "data"
    files = [
        data / media / "data.jsonl" for media in (MEDIA if stage == 2 and arm.clips else MEDIA[:1])
    ]
    steps, images, clips = options.steps[stage - 1], options.batch[stage - 1], options.batch[2]
    line = [
        "--stage",
        stage,
        "--data",
        *files,
        "--weights",
        options.out / "base",
        "--out",
        out,
        "--seed",
        seed,
        "--cache",
        options.out / "cache",
        "--steps",
        steps,
        "--save-every",
        100,
        "--image-batch",
        images,
        "--video-batch",
        clips,
        "--micro-batch",
        max(images, clips),
        "--video-share",
        options.video_share,
        "--lr",
        options.lr,
        "--warmup",
        20,
        "--sigma",
        arm.sigma,
        "--image-shift",
        3,
        "--video-shift",
        3,
        "--device",
        options.device,
        "--precision",
        options.precision,
        "--validate",
        data / "test" / "data.jsonl",
        "--validate-every",
        options.validate_every,
    ]
    if stage == 2:
        line += [
            "--change-weight",
            3,
            "--muon-lr",
            20 * options.lr,
            "--schedule",
            "linear",
            *(["--start", start] if start else []),
        ]
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


def run(options, arm, seed):
    """Trains and judges an arm, as far as that is not done -> train.py's exit code if it fails."""
    folder, first = (
        options.out / f"{arm.name}-{seed}",
        options.out / f"{arm.stage1}-{seed}" / "stage1",
    )
    if (folder / "results.jsonl").exists():
        return
    for stage, out, start in ((1, first, None), (2, folder / "stage2", first / "instructx")):
        if not (out / "instructx").exists():
            trained = ARMS[arm.stage1] if stage == 1 else arm
            print(f"claims.py: {out}", file=sys.stderr)
            line = command_line(options, trained, stage, seed, out, start)
            if code := train.main(line, functools.partial(build, trained), validate):
                return code
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
    rows = judge(options, arm, seed, folder)
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
    """Edits all test cases into `folder`/edits and judges them -> a row for each kind of media."""
    model = arm.model.from_pretrained(
        options.out / "base",
        options.device,
        torch.float32,
        instructx=folder / "stage2" / "instructx",
    )
    data, results, verdicts = options.out / "data" / "test", folder / "edits", defaultdict(list)
    results.mkdir(exist_ok=True)
    for line in tqdm(read_lines(data / "data.jsonl"), f"{folder.name} edits", disable=None):
        source, target = (world.read_frames(data / line[name]) for name in ("source", "target"))
        if world.find_result(results, line["id"]) is None:
            references = [world.read_frames(data / path)[0] for path in line["references"]]
            frames = model.edit(source, line["instruction"], references, seed=seed)
            written = Path(
                world.write_frames(frames, results / f"partial-{line['id']}", clip=line["video"])
            )
            os.replace(written, results / written.name.removeprefix("partial-"))
        output = world.read_frames(world.find_result(results, line["id"]))
        verdicts[line["media"]].append(world.judge(source, target, output, rivals(line, target)))
    return [
        {
            "arm": arm.name,
            "seed": seed,
            "media": media,
            "cases": len(found),
            "loss": curve_of(folder / "stage2", media)[-1][1],
            **{name: world.summary(found)[name] for name in ("success", "inside", "outside")},
        }
        for media, found in verdicts.items()
    ]


def estimate(options, runs):
    """Prints how long all will take that is not whole yet, from a few steps of each model."""
    whole = lambda arm, seed: (options.out / f"{arm.name}-{seed}" / "results.jsonl").exists()
    left = [(arm, seed) for arm, seed in runs if not whole(arm, seed)]
    stages = {
        (ARMS[arm.stage1], seed)
        for arm, seed in left
        if not (options.out / f"{arm.stage1}-{seed}" / "stage1" / "instructx").exists()
    }
    if not left:
        return
    models = {arm.model: arm for arm in [*(arm for arm, _ in left), *(arm for arm, _ in stages)]}
    costs, seconds = {}, 0.0
    for model, arm in models.items():
        costs[model] = measure(options, replace(arm, clips=True))
        print(
            f"claims.py: {model.__name__}: "
            + ", ".join(f"{name} {value:.2f} s" for name, value in costs[model].items()),
            flush=True,
        )
    passes = [2 + steps // options.validate_every for steps in options.steps]
    for arm, _ in stages:
        cost = costs[arm.model]
        seconds += (
            options.steps[0] * cost["step of stage 1"] + passes[0] * cost["validation in stage 1"]
        )
    for arm, _ in left:
        cost, clips = costs[arm.model], options.video_share * arm.clips
        step = clips * cost["clip step of stage 2"] + (1 - clips) * cost["image step of stage 2"]
        seconds += (
            options.steps[1] * step + passes[1] * cost["validation in stage 2"] + cost["all edits"]
        )
    print(
        f"claims.py: to do: {len(stages)} of stage 1 and {len(left)} of stage 2, "
        f"about {seconds / 3600:.2f} hours",
        flush=True,
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
            if train.main(line, functools.partial(build, arm), validate):
                raise ValueError(f"a short run of {arm.name} failed")
            rows = read_lines(out / "metrics.jsonl")
            seconds = {
                video: [row["seconds"] for row in rows if row.get("video") is video]
                for video in (False, True)
            }
            # The quickest: latents are known by then, as they are for most of a run.
            cost["step of stage 1" if stage == 1 else "image step of stage 2"] = min(seconds[False])
            if stage == 2:
                cost["clip step of stage 2"] = min(seconds[True])
            cost[f"validation in stage {stage}"] = rows[-1]["seconds"]
        model = arm.model.from_pretrained(
            options.out / "base", options.device, torch.float32, instructx=out / "instructx"
        )
    cost["all edits"] = 0.0
    for length, count in zip((1, FRAMES, FRAMES), options.test):
        began = time.perf_counter()
        model.edit(np.zeros((length, 64, 64, 3), np.uint8), "make it night")
        cost["all edits"] += count * (time.perf_counter() - began)
    return cost


# What came out.


def curve_of(folder, media):
    """[(step, loss)] of a stage, in validation."""
    rows = [row for row in read_lines(folder / "metrics.jsonl") if media in row.get("held_out", {})]
    return [(row["step"], row["held_out"][media]) for row in rows]


def read_rows(out):
    """Every row of every run that is whole."""
    return [row for file in sorted(out.glob("*/results.jsonl")) for row in read_lines(file)]


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
    for media in MEDIA:
        for name in names:
            if found := [row for row in rows if row["arm"] == name and row["media"] == media]:
                cells = [
                    spread([row[key] for row in found if key in row], form)
                    for key, (_, form) in COLUMNS.items()
                ]
                lines.append(
                    f"| {ARMS[name].label} | {media} | {found[0]['cases']} | {len(found)} | "
                    + " | ".join(cells)
                    + " |"
                )
    return "\n".join(lines) + "\n"


def compared(rows):
    """The claims of which two arms or more have been run."""
    return [
        claim
        for claim, (_, names) in CLAIMS.items()
        if len({row["arm"] for row in rows} & {*names}) > 1
    ]


NOTE = (
    "Loss: flow matching on cases that no training saw, always with the same noise. Errors: as "
    "world.py defines them; an untouched source has 1 inside and 0 outside.\n"
)


def plot(out, claim, rows):
    """Writes OUT/claim-X.png: held-out losses, mean over the seeds, and each seed's measures."""
    width, height = 400, 300
    page = Image.new("RGB", (4 * width, 4 * height), "white")
    draw = ImageDraw.Draw(page)
    seeds = {
        name: sorted({row["seed"] for row in rows if row["arm"] == name})
        for name in CLAIMS[claim][1]
    }
    arms = [ARMS[name] for name in seeds if seeds[name]]
    curves = lambda folder_of, media: {
        arm.label: mean_curve(
            [curve_of(out / folder_of(arm, seed), media) for seed in seeds[arm.name]]
        )
        for arm in arms
    }
    train.panel(
        draw,
        (0, 0),
        "loss on image, stage 1",
        curves(lambda arm, seed: f"{arm.stage1}-{seed}/stage1", "image"),
        4 * width,
        height,
        floor=None,
    )
    for i, media in enumerate(MEDIA, 1):
        train.panel(
            draw,
            (0, i * height),
            f"loss on {media}, stage 2",
            curves(lambda arm, seed: f"{arm.name}-{seed}/stage2", media),
            width,
            height,
            floor=None,
        )
        for j, key in enumerate(("success", "inside", "outside"), 1):
            values = {
                arm.label: [
                    row[key] for row in rows if row["arm"] == arm.name and row["media"] == media
                ]
                for arm in arms
            }
            dots(
                draw, (j * width, i * height), f"{COLUMNS[key][0]}, {media}", values, width, height
            )
    page.save(out / f"claim-{claim}.partial", format="PNG")
    os.replace(out / f"claim-{claim}.partial", out / f"claim-{claim}.png")


def mean_curve(curves):
    """Mean of several [(step, loss)] with the same steps."""
    return [(points[0][0], statistics.mean(loss for _, loss in points)) for points in zip(*curves)]


def dots(draw, corner, title, columns, width, height):
    """One plot: {name: [value]}, a column of dots for each name, with a line at their mean."""
    left, top, right, bottom = (
        corner[0] + 70,
        corner[1] + 40,
        corner[0] + width - 20,
        corner[1] + height - 40,
    )
    everything = [value for values in columns.values() for value in values]
    low, high = min(everything), max(everything)
    place = lambda value: bottom - 8 - (value - low) / ((high - low) or 1) * (bottom - top - 16)
    draw.text((left, corner[1] + 12), title, "black", font_size=16)
    for value in sorted({low, (low + high) / 2, high}):
        draw.line((left, place(value), right, place(value)), "#dddddd")
        draw.text((left - 8, place(value)), f"{value:.3g}", "black", anchor="rm", font_size=12)
    for i, (name, values) in enumerate(columns.items()):
        x, mean = left + (i + 0.5) * (right - left) / len(columns), place(statistics.mean(values))
        draw.line((x - 16, mean, x + 16, mean), train.COLORS[i], 2)
        for value in values:
            draw.ellipse(
                (x - 4, place(value) - 4, x + 4, place(value) + 4), outline=train.COLORS[i], width=2
            )
        draw.text((x, bottom + 8 + 14 * (i % 2)), name, train.COLORS[i], anchor="mt", font_size=12)


def parse(arguments):
    parser = Parser(
        prog="claims.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    count, share = number(int, 1, 10**6), number(float, 0.05, 0.95)

    def add(name, default, text, type, **more):
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        parser.add_argument(
            name, default=default, type=type, help=f"{text} (default: {shown})", **more
        )

    parser.add_argument(
        "commands",
        nargs="+",
        choices=(*CLAIMS, "table", "plot"),
        metavar="COMMAND",
        help="a, b, c, d, e: run what a claim needs; table, plot: show again what there is",
    )
    add("--weights", HERE, "weights folder that all start from", Path)
    add("--out", Path("runs/claims"), "folder of the runs", Path)
    add("--seeds", 3, "runs of each arm", count)
    add(
        "--steps",
        [400, 1000],
        "steps of stage 1 and of stage 2",
        count,
        nargs=2,
        metavar=("ONE", "TWO"),
    )
    add(
        "--batch",
        [32, 16, 4],
        "images of a step in stage 1, images and clips of one in stage 2",
        count,
        nargs=3,
        metavar=("ONE", "IMAGES", "CLIPS"),
    )
    add("--video-share", 0.4, "share of the steps of stage 2 that take clips", share)
    add(
        "--data",
        [6000, 800, 800],
        "images, clips and late clips to train on",
        count,
        nargs=3,
        metavar=("I", "C", "L"),
    )
    add(
        "--test",
        [45, 27, 27],
        "images, clips and late clips to validate on and to edit",
        count,
        nargs=3,
        metavar=("I", "C", "L"),
    )
    add(
        "--split",
        "train",
        "of these; heldout: combinations that training never has",
        str,
        choices=("train", "heldout"),
    )
    add("--queries", 32, "in each set", count)
    add("--lr", 1e-3, "learning rate; falls to 0 in stage 2", number(float, 0, 1))
    add("--validate-every", 50, "steps between validations", count)
    add("--sampling-steps", 10, "of each edit", count)
    add("--device", "cuda" if torch.cuda.is_available() else "cpu", "where to train", str)
    add(
        "--precision",
        "float32",
        "of matrix products in training",
        str,
        choices=("float32", "bfloat16"),
    )
    return parser.parse_args(arguments)


def main(arguments=None):
    try:
        options = parse(arguments)
        if claims := [command for command in options.commands if command in CLAIMS]:
            prepare(options)
            runs = [
                (ARMS[name], seed)
                for seed in range(options.seeds)
                for name in dict.fromkeys(name for claim in claims for name in CLAIMS[claim][1])
            ]
            estimate(options, runs)
            for arm, seed in runs:
                if code := run(options, arm, seed):
                    return code
        rows = read_rows(options.out)
        known = compared(rows)
        if not known:
            raise ValueError(f"{options.out} holds no two arms to compare; run a claim first")
        tables = {claim: table(claim, rows) for claim in known}
        (options.out / "claims.md").write_text("\n".join([*tables.values(), NOTE]))
        print(
            "\n".join(
                tables[claim] for claim in (known if "table" in options.commands else claims)
            ),
            end="",
        )
        for claim in known if "plot" in options.commands else claims:
            plot(options.out, claim, rows)
        return 0
    except (ValueError, OSError) as error:
        print(f"claims.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("claims.py: interrupted; the same command goes on where it was", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
