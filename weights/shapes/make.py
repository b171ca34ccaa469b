"""Makes the shapes model from nothing: data, base models, the three stages, scores.

    python weights/shapes/make.py                # into runs/shapes; the same command goes on there
    python weights/shapes/make.py score-stage3   # a part and what it needs
    python weights/shapes/make.py ship           # puts the result in the place of what ships

Parts run on two cores, two beside each other where neither needs the other. A part that was killed
goes on where it was; a set of data that was being drawn is drawn again. OUT/logs has what they
print, OUT/minutes.json the minutes of each and of all but the scores.
"""

import argparse
import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
TOP = HERE.parents[1]
sys.path[:0] = [str(HERE), str(TOP)]

from tqdm import tqdm

import world

from edit import find_compiler, whole

# name: (share of clips, cases, seed, kinds in turn; () for all). What takes longest to learn comes
# more often: edits of two parts, and looks in clips.
DATA = {
    "images": (0, 24000, 1, ()),
    "hard-images": (0, 24000, 2, ("hybrid", "swap", "hybrid", "style", "hybrid", "ref_swap")),
    "clips": (1, 3000, 3, ()),
    "hard-clips": (1, 7000, 4, ("hybrid", "swap", "style", "hybrid", "style", "ref_swap", "swap")),
}
# Fresh ones for "longer", which would learn the first by heart. It keeps most of those, since the
# fresh ones have no references.
ONE_PART = ("style", "swap", "remove", "tone", "color")
MORE = {
    "more-images": (0, 36000, 5, [kind for one in ONE_PART for kind in ("hybrid", one)]),
    "more-clips": (1, 12000, 6, ["hybrid", "style", "hybrid", "swap", "style", "hybrid", "color"]),
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

    minutes: float  # on one core of two (AMD EPYC; longer: Intel Xeon), or on both
    needs: tuple
    steps: int = 0
    cores: int = 1


PARTS = {
    "tokenizer": Part(1, ()),
    "bank": Part(1, ()),
    # Eyes first, then words, then what edits lead to.
    "vision": Part(6, ("tokenizer", "bank"), 550),
    "mllm": Part(39, ("vision",), 3450),
    # Refined at once: whatever is trained on latents has to start again when they change.
    "vae": Part(24, ("bank",), 2800),
    "refine": Part(20, ("vae",), 2400),
    "decoder": Part(12, ("refine",), 1900),
    "dit": Part(13, ("decoder", "tokenizer"), 2600),
    "data": Part(2, ("mllm",)),  # not earlier: from bank to dit takes longest
    "instruct": Part(49, ("mllm",), 10000),
    "latents": Part(22, ("mllm", "dit", "data")),
    "more": Part(14, ("latents",)),
    "stage1": Part(4, ("instruct", "latents"), 800, 2),
    "stage2": Part(12, ("stage1",), 1600, 2),
    "stage3": Part(147, ("stage2",), 20000, 2),
    "score-stage3": Part(11, ("stage3",), 0, 2),
    "longer": Part(91, ("stage3", "more"), 10000, 2),
    "score-longer": Part(11, ("longer",), 0, 2),
}
# name: (stage of train.py, the part whose result it starts from, datasets)
STAGES = {
    "stage1": (1, None, ("images", "hard-images")),
    "stage2": (2, "stage1", DATA),
    "stage3": (3, "stage2", DATA),
    "longer": (3, "stage3", ("images", "clips", "hard-clips", *MORE)),
}


def base(out, name, *options):
    """A part of pretrain.py, in this process."""
    import pretrain

    if name in PARTS and PARTS[name].steps:
        options = (f"--{name}-steps", str(PARTS[name].steps))
    pretrain.main([name, "--out", str(out / "base"), "--precision", "bfloat16", *options])


def bank(out):
    """The pictures that VAE, vision and DiT learn from, before two of them draw any."""
    import pretrain

    pretrain.bank(out / "base")


def draw(out, datasets):
    """The edits of datasets to train on."""
    for name, (video_share, count, seed, kinds) in datasets.items():
        if not (out / "data" / name / "data.jsonl").exists():
            world.make(out / "data" / name, count, video_share, seed, kinds=kinds or world.KINDS)


def data(out):
    """The edits to train on, and those to be scored on, whose combinations training never has."""
    draw(out, DATA)
    for name, (seed, count) in HELD_OUT.items():
        if not (out / "data" / name / "data.jsonl").exists():
            world.make(out / "data" / name, count, 0.34, seed, split="heldout")


def command_line(out, name):
    """The command line of train.py for a part."""
    number, before, datasets = STAGES[name]
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
        "seed": [*STAGES].index(name),  # else each would begin with the batches of the one before
    }
    if number > 1:
        values["start"] = out / before / "instructx"
        values |= {"muon-lr": 0.02, "change-weight": 8, "video-share": 0.4}
    if number == 3:
        values["schedule"] = "linear"
    if name == "longer":  # the full rates undo more of what the first decay has settled
        values |= {"lr": 5e-4, "muon-lr": 0.01}
    line = ["--data", *(out / "data" / dataset / "data.jsonl" for dataset in datasets)]
    for key, value in values.items():
        line += [f"--{key}", value]
    if number == 1:
        line += ["--config", *(f"{key}={value}" for key, value in CONFIG.items())]
    return [*map(str, line)]


def encode(out, datasets):
    """The latents of all sources and targets of datasets, for the stages.

    Source and target are encoded as one batch: PyTorch is five times slower with one small clip.
    """
    import torch

    import train
    from vae import to_video

    args = train.settings(command_line(out, "stage2"))
    args.data = [out / "data" / name / "data.jsonl" for name in datasets]
    train.complete(args)
    args.start = None
    model = train.build_model(args)
    pairs = train.read_pairs(args, args.data, model)
    cache, stem = train.Latents(model.vae, args.cache), model.vae.conv1.weight
    for pair, shape in zip(tqdm(pairs.pairs, disable=None), pairs.shapes):
        pictures = [cache.look_up(path, shape[0]) for path in (pair.source, pair.target)]
        new = [picture for picture in pictures if picture.z is None]
        if new:  # equal pictures, such as those that a removal leaves, share an entry
            z = model.vae.encode(torch.cat([to_video(p.frames, like=stem) for p in new]))
            for picture, latent in zip(new, z.split(1)):
                cache.store(picture, latent)


def latents(out):
    """The latents of the edits to train on."""
    encode(out, DATA)


def more(out):
    """Further edits to train on, and their latents."""
    draw(out, MORE)
    encode(out, MORE)


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
    weights = out / name / "weights"
    weights.mkdir(exist_ok=True)
    folders = {"mllm": "base/mllm", "vae": "base/vae", "instructx": f"{name}/instructx"}
    for link, folder in folders.items():
        if not (weights / link).is_symlink():
            (weights / link).symlink_to(Path("../..") / folder, target_is_directory=True)
    for cases in HELD_OUT:
        results = out / name / "results" / cases
        world.edit(out / "data" / cases, results, weights)
        judged = world.score(out / "data" / cases, results, world.load_vae(weights / "vae"))
        (out / name / f"scores-{cases}.json").write_text(json.dumps(judged, indent=1) + "\n")
        (out / name / f"scores-{cases}.txt").write_text(world.table(judged) + "\n")


def ship(out):
    """The furthest result that has scores, its curves and picture, in the place of what ships.

    Returns the exit code.
    """
    scored = [name for name in STAGES if (out / "done" / f"score-{name}").exists()]
    if not scored:
        print(f"make.py: error: {out} has no scores yet; make.py score-stage3", file=sys.stderr)
        return 2
    curves = (out / scored[-1] / "curves.png").read_bytes()
    base(out, "ship", "--trained", str(out / scored[-1] / "instructx"))
    (HERE / "curves.png").write_bytes(curves)
    world.show(HERE / "results.png", seed=3, split="heldout", weights=HERE)
    return 0


def run_part(out, name):
    """One part, to its end -> exit code."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):  # as exact as the fused one, and faster at this size
        if name in STAGES:
            return stage(out, name)
        if name.startswith("score-"):
            return scores(out, name.removeprefix("score-"))
        own = {"bank": bank, "data": data, "latents": latents, "more": more, "ship": ship}
        return own[name](out) if name in own else base(out, name)


# Running them all.


def start(out, name, lock):
    """Starts a part in a process of its own, which holds the folder's lock like this one."""
    command = [sys.executable, str(Path(__file__).resolve()), name, "--alone", "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": str(PARTS[name].cores)}
    with open(out / "logs" / f"{name}.log", "a") as log:
        pipes = {"stdout": log, "stderr": log, "pass_fds": [lock.fileno()]}
        return subprocess.Popen(command, env=environment, **pipes)


def needed(name):
    """A part, and all that it needs."""
    return {name}.union(*map(needed, PARTS[name].needs))


def progress(out, name):
    """The share of a part's steps that are done."""
    file = out / "base" / f"{name}.jsonl"
    if name in STAGES:
        file = out / name / "metrics.jsonl"
    try:
        with open(file, "rb") as stream:
            stream.seek(max(0, file.stat().st_size - 1000))
            step = json.loads(stream.read().splitlines()[-1])["step"]
    except (OSError, IndexError, ValueError, KeyError):
        return 0.0
    return min(1.0, step / PARTS[name].steps)


def minutes_left(out, names):
    """What all the work takes on two cores, or what has to run one after the other, if longer."""
    left = {name: PARTS[name].minutes * (1 - progress(out, name)) for name in names}

    def chain(name):
        """Of what has to run before a part, and of the part."""
        return left.get(name, 0) + max(map(chain, PARTS[name].needs), default=0)

    work = sum(minutes * PARTS[name].cores / 2 for name, minutes in left.items())
    return max(work, *map(chain, left))


def end(processes):
    """Ends parts that run. A stage writes a checkpoint first, for which it has a minute."""
    for process in processes:
        process.terminate()
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            for process in processes:
                process.wait(60)
    finally:  # after a second signal, too
        for process in processes:
            process.kill()


def recipe(name):
    """What in this file decides the result of a part, as text."""
    drawn = {"data": [DATA, HELD_OUT], "more": MORE}.get(name)
    stage = command_line(Path(), name) if name in STAGES else None
    return json.dumps([PARTS[name].steps, drawn, stage])


def run_all(out, goal=None):
    """Runs what is not done of all parts, or of those that a goal needs -> exit code."""
    (out / "logs").mkdir(parents=True, exist_ok=True)
    (out / "done").mkdir(exist_ok=True)
    with open(out / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            problem = f"parts run in {out}; let them end, or name another --out"
            print(f"make.py: error: {problem}", file=sys.stderr)
            return 2
        return run_parts(out, needed(goal) if goal else PARTS, lock)


def read(file, default):
    return json.loads(file.read_text()) if file.exists() else default


def write(file, values):
    with whole(file) as partial:
        partial.write_text(json.dumps(values, indent=1) + "\n")


def run_parts(out, wanted, lock):
    """What `run_all` does once the folder is its own."""
    begun = read(out / "begun.json", {})  # {part: recipe}
    changed = [name for name in PARTS if begun.get(name, recipe(name)) != recipe(name)]
    if changed:
        problem = f"{out} has {', '.join(changed)} by other settings; name another --out"
        print(f"make.py: error: {problem}", file=sys.stderr)
        return 2
    waiting = [name for name in PARTS if name in wanted and not (out / "done" / name).exists()]
    minutes, running, before = read(out / "minutes.json", {"all": 0.0}), {}, time.monotonic()
    bar = tqdm(bar_format="{desc}", leave=False, disable=None)  # shown on a terminal only
    try:
        while waiting or running:
            for name in list(waiting):
                ready = all((out / "done" / need).exists() for need in PARTS[name].needs)
                used = sum(PARTS[other].cores for other in running)
                if ready and used + PARTS[name].cores <= 2:
                    waiting.remove(name)
                    begun[name] = recipe(name)
                    write(out / "begun.json", begun)
                    running[name] = start(out, name, lock)
            time.sleep(1)
            passed, before = (time.monotonic() - before) / 60, time.monotonic()
            only_scores = all(name.startswith("score-") for name in running)
            for name in running if only_scores else ("all", *running):
                minutes[name] = minutes.get(name, 0.0) + passed
            write(out / "minutes.json", minutes)
            for name, process in list(running.items()):
                code = process.poll()
                if code is None:
                    continue
                del running[name]
                if code:
                    log = out / "logs" / f"{name}.log"
                    bar.write(f"make.py: {name} ended with {code}; see {log}", sys.stderr)
                    return 1
                bar.write(f"{name}: {minutes[name]:.1f} minutes")
                sys.stdout.flush()
            if running and not bar.disable:
                shares = ", ".join(f"{name} {100 * progress(out, name):.0f} %" for name in running)
                left = minutes_left(out, [*waiting, *running])
                bar.set_description_str(f"{shares}; about {left:.0f} minutes left")
        bar.write(f"all but scores: {minutes['all']:.1f} minutes")
        return 0
    except KeyboardInterrupt:
        bar.write("make.py: interrupted; the same command goes on", sys.stderr)
        return 130
    finally:
        bar.close()
        end(running.values())


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    text = f"{', '.join(PARTS)} or ship (default: all parts)"
    parser.add_argument("part", nargs="?", choices=[*PARTS, "ship"], metavar="PART", help=text)
    text = "folder for all that is made (default: runs/shapes of the repository)"
    parser.add_argument("--out", type=Path, default=TOP / "runs" / "shapes", help=text)
    text = "PART only, as make.py itself starts it: nothing else may run in the folder"
    parser.add_argument("--alone", action="store_true", help=text)
    args = parser.parse_args()
    out, name = args.out.resolve(), args.part
    if args.alone and name not in PARTS:
        parser.error("--alone needs the name of a part")
    if not name or name in PARTS and {*STAGES} & needed(name):
        try:
            find_compiler("make.py")  # which the stages would miss only after hours
        except ValueError as error:
            parser.error(str(error))
    for number in {signal.SIGTERM, signal.SIGHUP}:  # no part should outlive this process
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    if name == "ship":
        return run_part(out, name)
    if not args.alone:
        return run_all(out, name)
    missing = [need for need in PARTS[name].needs if not (out / "done" / need).exists()]
    if missing or (out / "done" / name).exists():
        why = f"needs {', '.join(missing)} first" if missing else "is done already"
        parser.error(f"{name} {why} (see {out / 'done'})")
    code = run_part(out, name)
    if not code:
        (out / "done" / name).touch()
    return code


if __name__ == "__main__":
    sys.exit(main())
