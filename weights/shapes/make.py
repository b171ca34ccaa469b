"""Makes the shapes model from nothing: data, base models, the three stages, scores.

    python weights/shapes/make.py                # into runs/shapes; the same command goes on there
    python weights/shapes/make.py ship           # puts the result in the place of what ships
    python weights/shapes/make.py PART           # one part alone, such as stage2, to its end

Parts run on two cores, two beside each other where neither needs the other. A part that was killed
goes on where it was. OUT/logs has what they print, and OUT/minutes.json the minutes of each.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
TOP = HERE.parents[1]
sys.path[:0] = [str(HERE), str(TOP)]

from edit import find_compiler, whole

HARD = ("hybrid", "swap", "style", "ref_swap")  # kinds of edits that take longest to learn

# name: (images or clips, cases, seed, kinds; () for all)
DATA = {
    "images": (0, 24000, 1, ()),
    "hard-images": (0, 18000, 2, ("hybrid", *HARD)),
    "clips": (1, 3000, 3, ()),
    "hard-clips": (1, 4000, 4, ("swap", *HARD)),
}
# name: (seed, cases) of the scores: the usual ones, and fresh ones
HELD_OUT = {"seed-9": (9, 450), "seed-19": (19, 450)}
CONFIG = {
    "image_queries": 24,
    "video_queries": 48,
    "lora_rank": 16,
    "lora_alpha": 16,
    "hidden_dim": 384,
    "mllm_frames": 9,
    "steps": 20,
    "guidance": 2,
    "shift": 3,
    "area": 65536,
}


@dataclass
class Part:
    """A piece of the recipe: how long it takes, and what has to be there before."""

    minutes: float  # on one core of two (AMD EPYC with AVX-512), or on both
    needs: tuple
    steps: int = 0
    cores: int = 1


PARTS = {
    "tokenizer": Part(1, ()),
    "bank": Part(2, ()),
    # Eyes first, then words, then what edits lead to.
    "vision": Part(15, ("tokenizer", "bank"), 550),
    "mllm": Part(30, ("vision",), 3450),
    "instruct": Part(28, ("mllm",), 3600),
    # Refined at once: whatever is trained on latents has to start again when they change.
    "vae": Part(25, ("bank",), 2800),
    "refine": Part(36, ("vae",), 2400),
    "decoder": Part(13, ("refine",), 1900),
    "dit": Part(13, ("decoder", "tokenizer"), 2600),
    "data": Part(9, ("tokenizer",)),
    "latents": Part(12, ("mllm", "dit", "data")),
    "stage1": Part(4, ("instruct", "latents"), 800, 2),
    "stage2": Part(12, ("stage1",), 1600, 2),
    "stage3": Part(56, ("stage2",), 8000, 2),
    "score-stage3": Part(11, ("stage3",), 0, 2),
    "longer": Part(170, ("score-stage3",), 24000, 2),
    "score-longer": Part(11, ("longer",), 0, 2),
}
# name: (stage of train.py, the part whose result it starts from)
STAGES = {
    "stage1": (1, None),
    "stage2": (2, "stage1"),
    "stage3": (3, "stage2"),
    "longer": (3, "stage3"),
}


def base(out, name):
    """A part of pretrain.py, in this process."""
    import pretrain

    sys.argv = ["pretrain.py", name, "--out", str(out / "base")]
    if name == "ship":
        sys.argv += ["--trained", str(out / "longer" / "instructx")]
    elif PARTS[name].steps:
        sys.argv += [f"--{name}-steps", str(PARTS[name].steps)]
    sys.argv += ["--precision", "bfloat16"]
    pretrain.main()


def bank(out):
    """The pictures that VAE, vision and DiT learn from, before two of them draw any."""
    import pretrain

    pretrain.bank(out / "base")


def data(out):
    """The edits to train on, and those to be scored on, whose combinations training never has."""
    import world

    for name, (video_share, count, seed, kinds) in DATA.items():
        if not (out / "data" / name / "data.jsonl").exists():
            world.make(out / "data" / name, count, video_share, seed, kinds=kinds or world.KINDS)
    for name, (seed, count) in HELD_OUT.items():
        if not (out / "data" / name / "data.jsonl").exists():
            world.make(out / "data" / name, count, 0.34, seed, split="heldout")


def command_line(out, name):
    """The command line of train.py for a part."""
    number, before = STAGES[name]
    values = {
        "stage": number,
        "weights": out / "base",
        "out": out / name,
        "cache": out / "cache",
        "steps": PARTS[name].steps,
        "image-batch": 32,
        "video-batch": 8,
        "micro-batch": 32,
        "lr": 1e-3,
        "image-shift": 3,
        "video-shift": 3,
        "precision": "bfloat16",
        "warmup": 20,
    }
    if number > 1:
        values["start"] = out / before / "instructx"
        values |= {"muon-lr": 0.02, "change-weight": 8, "video-share": 0.4}
    if number == 3:
        values["schedule"] = "linear"
    folders = ("images", "hard-images") if number == 1 else DATA
    line = ["--data", *(out / "data" / folder / "data.jsonl" for folder in folders)]
    for key, value in values.items():
        line += [f"--{key}", value]
    if number == 1:
        line += ["--config", *(f"{key}={value}" for key, value in CONFIG.items())]
    return [*map(str, line)]


def latents(out):
    """The latents of all edits, for the stages.

    Source and target are encoded as one batch: PyTorch is four times slower with one small clip.
    """
    import torch
    from tqdm import tqdm

    import train
    from vae import to_video

    args = train.settings(command_line(out, "stage2"))
    train.complete(args)
    args.start, args.out = None, out
    model = train.build_model(args)
    pairs = train.read_pairs(args, args.data, model)
    cache, stem = train.Latents(model.vae, args.cache), model.vae.conv1.weight
    for pair, shape in zip(tqdm(pairs.pairs, disable=None), pairs.shapes):
        pictures = [cache.look_up(path, shape[0]) for path in (pair.source, pair.target)]
        new = [picture for picture in pictures if picture.z is None]
        if new:
            z = model.vae.encode(torch.cat([to_video(p.frames, like=stem) for p in new]))
            for picture, part in zip(new, z.split(1)):
                cache.store(picture, part)


def stage(out, name):
    """A run of train.py, its layers compiled."""
    import train
    from connector import compile_blocks

    def build(args):
        model = train.build_model(args)
        compile_blocks([*model.dit.blocks, *model.mllm.model.layers])
        return model

    return train.main(command_line(out, name), build)


def scores(out, name):
    """Edits and judges the held-out cases with the result of a stage -> OUT/NAME/scores-*."""
    import world

    weights = out / name / "weights"
    weights.mkdir(exist_ok=True)
    folders = {"mllm": "base/mllm", "vae": "base/vae", "instructx": f"{name}/instructx"}
    for link, folder in folders.items():
        if not (weights / link).exists():
            (weights / link).symlink_to(Path("../..") / folder, target_is_directory=True)
    for cases in HELD_OUT:
        results = out / name / "results" / cases
        world.edit(out / "data" / cases, results, weights)
        judged = world.score(out / "data" / cases, results, world.load_vae(weights / "vae"))
        (out / name / f"scores-{cases}.json").write_text(json.dumps(judged, indent=1) + "\n")
        (out / name / f"scores-{cases}.txt").write_text(world.table(judged) + "\n")


def ship(out):
    """The result, its curves and its picture, in the place of what ships."""
    import world

    base(out, "ship")
    shutil.copy(out / "longer" / "curves.png", HERE)
    world.show(HERE / "results.png", seed=3, split="heldout", weights=HERE)


def run_part(out, name):
    """One part, to its end -> exit code."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):  # as exact as the fused one, and faster at this size
        if name in STAGES:
            return stage(out, name)
        if name.startswith("score-"):
            return scores(out, name.removeprefix("score-"))
        own = {"bank": bank, "data": data, "latents": latents, "ship": ship}
        return own[name](out) if name in own else base(out, name)


# Running them all.


def start(out, name):
    """Starts a part in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), name, "--out", str(out)]
    log = open(out / "logs" / f"{name}.log", "a")
    environment = os.environ | {"OMP_NUM_THREADS": str(PARTS[name].cores)}
    return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def progress(out, name):
    """The share of a part's steps that are done."""
    file = out / "base" / f"{name}.jsonl"
    if name in STAGES:
        file = out / name / "metrics.jsonl"
    try:
        step = json.loads(file.read_text().splitlines()[-1])["step"]
    except (OSError, IndexError, ValueError, KeyError):
        return 0.0
    return min(1.0, step / (PARTS[name].steps or step))


def minutes_left(out, waiting, running):
    """From the minutes of the parts' table: two beside each other as long as there are two."""
    left = {name: PARTS[name].minutes for name in waiting}
    left |= {name: PARTS[name].minutes * (1 - progress(out, name)) for name in running}
    both = sum(minutes for name, minutes in left.items() if PARTS[name].cores == 2)
    single = [minutes for name, minutes in left.items() if PARTS[name].cores == 1]
    return both + max(sum(single) / 2, max(single, default=0))


def run_all(out):
    """Runs all parts that are not done -> exit code."""
    (out / "logs").mkdir(parents=True, exist_ok=True)
    (out / "done").mkdir(exist_ok=True)
    waiting, running = [name for name in PARTS if not (out / "done" / name).exists()], {}
    file, minutes, before = out / "minutes.json", {"all": 0.0}, time.time()
    if file.exists():
        minutes = json.loads(file.read_text())
    try:
        while waiting or running:
            for name in list(waiting):
                ready = all((out / "done" / need).exists() for need in PARTS[name].needs)
                used = sum(PARTS[other].cores for other in running)
                if ready and used + PARTS[name].cores <= 2:
                    waiting.remove(name)
                    running[name] = start(out, name)
            time.sleep(1)
            passed, before = (time.time() - before) / 60, time.time()
            for name in ("all", *running):
                minutes[name] = minutes.get(name, 0.0) + passed
            with whole(file) as partial:
                partial.write_text(json.dumps(minutes, indent=1) + "\n")
            for name, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[name]
                if process.returncode:
                    print(
                        f"\nmake.py: {name} failed; see {out / 'logs' / name}.log", file=sys.stderr
                    )
                    return 1
                (out / "done" / name).touch()
                print(f"\r{name}: {minutes[name]:.1f} minutes", flush=True)
            shares = ", ".join(f"{name} {100 * progress(out, name):.0f} %" for name in running)
            if sys.stderr.isatty():
                left = minutes_left(out, waiting, running)
                print(f"\r{shares}; about {left:.0f} minutes left   ", end="", file=sys.stderr)
        print(f"\rall: {minutes['all']:.1f} minutes")
        return 0
    except KeyboardInterrupt:
        print("\nmake.py: interrupted; the same command goes on", file=sys.stderr)
        return 130
    finally:
        for process in running.values():
            process.terminate()
            process.wait()


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("part", nargs="?", choices=[*PARTS, "ship"], metavar="PART")
    help = "folder for all that is made (default: runs/shapes)"
    parser.add_argument("--out", type=Path, default=Path("runs/shapes"), help=help)
    args = parser.parse_args()
    out = args.out.resolve()
    if args.part in (None, *STAGES):
        try:
            find_compiler("make.py")  # which the stages would miss only after hours
        except ValueError as error:
            parser.error(str(error))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # no part should outlive this process
    return run_part(out, args.part) if args.part else run_all(out)


if __name__ == "__main__":
    sys.exit(main())
