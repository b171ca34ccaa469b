"""How do the windows of a long clip join? Measured where the true result is known.

    python weights/shapes/joins.py --count 9

Clips of 25 frames are edited in windows of 9, by four ways:
    apart    each window on its own
    held 1   a window goes on from the last frame of the one before (edit.py --overlap 1)
    held 5   from its last five frames (edit.py --overlap 5)
    blended  all windows at once: where two overlap, by two latent frames, each step takes the mean
             of their velocities. The first latent frame of a window then stands for as many frames
             as the others, which no training has shown.

For each way: errors inside and outside as world.py defines them, of the two frames at a join and of
all others, and the jump there: how much the change from frame to frame differs from the target's,
in levels of 255. Where the first window misses its edit, `held` carries the mistake on; so the
errors also come without the clips of which any way misses the edit: a mean error inside of 0.3 or
more, away from joins. A clip takes a minute on one CPU core.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import world

from edit import Parser, number, windows
from sampler import guided

LENGTH, WINDOW = 25, 9


def draw(count):
    """Held-out clips of all kinds in turn."""
    cases = []
    for i in range(count):
        kind = world.KINDS[i % len(world.KINDS)]
        cases.append(world.sample(70 * world.SEEDS + i, True, "heldout", kind, frames=LENGTH))
    return cases


def held(model, case, overlap):
    """Edits the windows in turn -> (result, first frames of the windows). overlap 0: apart."""
    pieces, joins, done, result = [], [], 0, None
    for frames, shared in windows(case.source, LENGTH, WINDOW, overlap):
        if not overlap:
            frames, shared = frames[shared:], 0
        start = result[-shared:] if shared else None
        result = model.edit(np.stack(frames), case.instruction, case.references, start=start)
        pieces.append(result[shared:])
        joins.append(done)
        done += len(result) - shared
    return np.concatenate(pieces), joins[1:]


@torch.inference_mode()
def blended(model, case, overlap):
    """Edits all windows at once; `overlap` counts latent frames -> (result, first frames)."""
    frames, stride, config = case.source, model.vae.temporal_stride, model.config
    source, velocities = model.encode(frames), []
    pictures = [model.reference_for_mllm(picture, frames.shape) for picture in case.references]
    references = [model.encode(picture[None]) for picture in pictures]
    total, length = source.shape[2], 1 + (WINDOW - 1) // stride
    starts = [*range(0, total - length, length - overlap), total - length]
    for first in starts:
        shown = frames[first * stride :][:WINDOW]
        prompts = [model.prompt(shown, words, pictures) for words in (case.instruction, "")]
        context = model.context(model.processor.collate(prompts, same_pictures=True), True)
        z = source[:, :, first : first + length]
        velocity = model.velocity(context, (2, *z.shape[1:]), z, references)
        velocities.append(guided(velocity, config.guidance))

    def mean_velocity(z, t):
        total, count = torch.zeros_like(z), torch.zeros_like(z)
        for first, velocity in zip(starts, velocities):
            place = slice(first, first + length)
            total[:, :, place] += velocity(z[:, :, place], t)
            count[:, :, place] += 1
        return total / count

    noise = torch.randn(source.shape, generator=torch.Generator().manual_seed(0))
    z = model.sampler(config.steps).sample(mean_velocity, noise)
    return np.concatenate([*model.decode(z, frames.shape)]), [f * stride for f in starts[1:]]


def measure(case, result, joins):
    """(inside, outside, jump) of frames at joins and of the others: {name: [value]}."""
    source, target = (frames.astype(np.float32) for frames in (case.source, case.target))
    changed = world.differs(case.source, case.target)  # (T, H, W)
    error = np.abs(result - target).mean(-1) / 255
    unit = (np.abs(source - target).mean(-1) / 255)[changed].mean()
    jump = np.abs(np.diff(result.astype(np.float32), axis=0) - np.diff(target, axis=0))
    at = {frame for first in joins for frame in (first - 1, first)}
    rows = {}
    for i in range(LENGTH):
        place = "join" if i in at else "middle"
        if changed[i].any():
            rows.setdefault(f"inside, {place}", []).append(error[i][changed[i]].mean() / unit)
        if not changed[i].all():
            rows.setdefault(f"outside, {place}", []).append(error[i][~changed[i]].mean())
        if i:
            step = "join" if i in joins else "middle"
            rows.setdefault(f"jump, {step}", []).append(jump[i - 1].mean())
    return rows


def line(name, cases):
    """A row of the table: means over the values of all cases."""
    cells = []
    for what, form in (("inside", ".3f"), ("outside", ".4f"), ("jump", ".2f")):
        for place in ("join", "middle"):
            values = [value for rows in cases for value in rows.get(f"{what}, {place}", [])]
            cells.append(format(np.mean(values), form))
    return f"| {name} | {len(cases)} | {' | '.join(cells)} |"


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="joins.py", description=__doc__, formatter_class=raw)
    parser.add_argument("--count", type=number(int, 1, 10**6), default=9, help="clips (default: 9)")
    parser.add_argument("--weights", type=Path, default=HERE, help="default: those beside this")
    args = parser.parse_args()
    try:
        model = world.load_model(args.weights)
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    ways = {"apart": (held, 0), "held 1": (held, 1), "held 5": (held, 5), "blended": (blended, 2)}
    measured = {name: [] for name in ways}
    for case in tqdm(draw(args.count), "clips"):
        for name, (edit, overlap) in ways.items():
            measured[name].append(measure(case, *edit(model, case, overlap)))
    hit = []
    for i in range(args.count):
        inside = [np.mean(rows[i]["inside, middle"]) for rows in measured.values()]
        if max(inside) < world.LIMITS["inside"]:
            hit.append(i)
    heads = [f"{what}: joins | middle" for what in ("inside", "outside", "jump")]
    print(f"| way | clips | {' | '.join(heads)} |")
    print("| --- |" + 7 * " ---: |")
    for name, cases in measured.items():
        print(line(name, cases))
    for name, cases in measured.items() if hit else ():
        print(line(f"{name}, none missed", [cases[i] for i in hit]))


if __name__ == "__main__":
    main()
