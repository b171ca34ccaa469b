"""A small world in which the truth of every edit is known, and a judge that measures results
against it.

A scene is a ground with one to three flat shapes; an edit is a sentence and the scene that it leads
to. Both are drawn from a seed, so data never runs out and every target is exact. The kinds are
those of VIE-Bench in miniature (InstructX, arXiv 2510.08485, sec. 4): swap, color, add, remove,
style, tone, hybrid, ref_swap, ref_add.

What is unusual:
- Whatever an instruction leaves open is settled by a rule, so that one target is right: what is
  swapped or recolored keeps its size and path; what is added stands still in the middle of its
  cell; added from a reference it is large.
- Some combinations of shape and color, and of shape, color and place, never occur in the split
  "train": not in sources, targets, references or questions. In the split "heldout" every edit
  touches one (style and tone: the scene holds one).
- A result is judged against the target and against its rivals, pictures with one fact wrong. A
  circle and a square of one size share four fifths of their pixels, so a threshold on the error
  alone would accept one for the other.

Success means that all of these hold (mean absolute errors, pixels in [0, 1], over all frames):
  inside   error over the pixels that should change, divided by their change, is below 0.30
  outside  error over all other pixels is below 0.03
  window   no 8x8 window of any frame has an error above 0.12
  rival    where a rival differs from the target, the result is nearer to the target

T frames, H W pixels; positions and radii are fractions of the frame's side, y pointing down.

    python weights/shapes/world.py make data/heldout --count 450 --seed 9 --split heldout
    python weights/shapes/world.py edit data/heldout results
    python weights/shapes/world.py score data/heldout results --json scores.json
    python weights/shapes/world.py show sheet.png --seed 0 --split heldout --weights weights/shapes
"""

import argparse
import json
import os
import sys
import textwrap
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the seven files

from edit import read_frames as read_media

LIMITS = {
    "inside": 0.30,
    "outside": 0.03,
    "window": 0.12,
    "rival": 1.0,
}  # a success is below all of them; see above
WINDOW_SIDE = 8
CHANGED = 8  # a pixel should change when one of its channels moves by more than this, of 255
VISIBLE = 0.05  # a rival counts if it differs from the target by more, where it differs at all
SEEDS = 10**7  # cases between one --seed and the next

KINDS = ("swap", "color", "add", "remove", "style", "tone", "hybrid", "ref_swap", "ref_add")
SHAPES = ("circle", "square", "triangle", "star")
COLORS = {
    "red": (214, 28, 44),
    "orange": (248, 116, 8),
    "yellow": (255, 228, 44),
    "green": (28, 146, 70),
    "blue": (28, 82, 226),
    "purple": (134, 40, 178),
    "pink": (255, 106, 184),
    "black": (26, 26, 32),
}
PLAIN = ("white", "gray", "sand")
GROUNDS = {  # top and bottom color; equal for plain grounds
    "white": ((244, 244, 242), (244, 244, 242)),
    "gray": ((202, 206, 211), (202, 206, 211)),
    "sand": ((231, 216, 186), (231, 216, 186)),
    "sky": ((158, 202, 242), (228, 242, 250)),
    "mint": ((224, 243, 228), (166, 213, 180)),
    "lilac": ((240, 234, 250), (212, 202, 234)),
}
RADII = {"small": 6 / 64, "large": 9 / 64, "huge": 20 / 64}  # huge is for reference images only
JITTER = {"small": 2 / 64, "large": 0.8 / 64}  # a large shape just fits its cell
GAP = 1.5 / 64  # least distance between the boxes around two shapes
PLACES = (
    "top left",
    "top",
    "top right",
    "left",
    "center",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
STYLES = {
    "sketch": "a sketch",
    "blur": "a blurred picture",
    "mosaic": "a mosaic",
    "gray": "a gray picture",
    "negative": "a negative",
}
TONES = {"night": "night", "sunset": "sunset", "fog": "fog", "winter": "winter"}
LOOKS = STYLES | TONES

NAMES = tuple((color, shape) for shape in SHAPES for color in COLORS)
HELD_OUT_NAMES = {("red", "star"), ("green", "circle"), ("purple", "square"), ("blue", "triangle")}
HELD_OUT_PLACES = {
    ("yellow", "circle", "top right"),
    ("orange", "square", "bottom left"),
    ("pink", "star", "left"),
    ("black", "triangle", "bottom"),
    ("blue", "star", "top left"),
    ("red", "square", "right"),
}

WORDINGS = {
    "swap": (
        "replace {old} with {new}",
        "swap {old} for {new}",
        "turn {old} into {new}",
        "change {old} to {new}",
        "put {new} in place of {old}",
    ),
    "color": (
        "make {old} {color}",
        "change the color of {old} to {color}",
        "paint {old} {color}",
        "turn {old} {color}",
        "color {old} {color}",
    ),
    "add": (
        "add {new} at the {place}",
        "put {new} at the {place}",
        "draw {new} at the {place}",
        "place {new} at the {place}",
        "at the {place} add {new}",
    ),
    "remove": ("remove {old}", "delete {old}", "take away {old}", "take {old} from the picture"),
    "style": (
        "turn the picture into {look}",
        "make the picture look like {look}",
        "draw the picture as {look}",
        "change the style to {look}",
    ),
    "tone": (
        "make the scene look like {look}",
        "change the tone to {look}",
        "turn the scene into {look}",
        "change the scene to {look}",
    ),
}
JOINTS = ("{0} and {1}", "{0} then {1}", "first {0} then {1}", "{0} and then {1}")
REFERENCE = (
    "the object in the reference image",
    "the object from the reference image",
    "the object of the reference image",
    "the reference object",
)


@dataclass(frozen=True)
class Thing:
    """One shape.

    Over a clip it moves straight from start to end; in an image, and when still, the two are equal.
    """

    color: str
    shape: str
    size: str
    start: tuple[float, float]
    end: tuple[float, float]

    @property
    def name(self):
        return self.color, self.shape

    def path(self, steps):
        """Center (steps, 2) as x, y at evenly spaced times."""
        time = np.linspace(0, 1, steps)[:, None]
        return np.asarray(self.start) * (1 - time) + np.asarray(self.end) * time

    def places(self):
        """Every cell that the center visits, first to last."""
        cells = np.clip((self.path(33) * 3).astype(int), 0, 2)
        return list(dict.fromkeys(PLACES[3 * y + x] for x, y in cells.tolist()))

    def held_out(self):
        return self.name in HELD_OUT_NAMES or any(
            (*self.name, place) in HELD_OUT_PLACES for place in self.places()
        )


@dataclass(frozen=True)
class Scene:
    """A ground, the things on it, and the style or tone of the whole picture (None: as it is)."""

    ground: str
    things: tuple[Thing, ...]
    look: str | None = None

    @classmethod
    def from_dict(cls, data):
        """The inverse of dataclasses.asdict, also after a trip through JSON."""
        things = [
            {**thing, "start": tuple(thing["start"]), "end": tuple(thing["end"])}
            for thing in data["things"]
        ]
        return cls(data["ground"], tuple(Thing(**thing) for thing in things), data["look"])


@dataclass
class Case:
    """One edit. source and target are uint8 (T, H, W, 3), references a list of uint8 (H, W, 3); an
    image has T = 1.
    """

    seed: int
    kind: str
    split: str
    instruction: str
    source: np.ndarray
    target: np.ndarray
    references: list
    source_scene: Scene
    target_scene: Scene
    reference_scenes: list


def pick(rng, options):
    return options[int(rng.integers(len(options)))]


def cell_center(place):
    index = PLACES.index(place)
    return (index % 3 + 0.5) / 3, (index // 3 + 0.5) / 3


def neighbors(place):
    x, y = cell_center(place)
    near = lambda other: max(abs(cell_center(other)[0] - x), abs(cell_center(other)[1] - y)) < 0.4
    return [other for other in PLACES if other != place and near(other)]


def apart(one, other):
    """Whether the boxes around two things keep their distance at all times."""
    steps = 1 if one.start == one.end and other.start == other.end else 33
    gap = (
        np.abs(one.path(steps) - other.path(steps)).max(axis=1)
        - RADII[one.size]
        - RADII[other.size]
    )
    return bool((gap >= GAP).all())


def draw_thing(rng, name, moves):
    size = pick(rng, ("small", "large"))
    place = pick(rng, PLACES)
    jitter = lambda: tuple((rng.random(2) * 2 - 1) * JITTER[size])
    spot = lambda place: tuple(float(a + b) for a, b in zip(cell_center(place), jitter()))
    start = spot(place)
    return Thing(*name, size, start, spot(pick(rng, neighbors(place))) if moves else start)


def draw_scene(rng, video):
    """One to three things, no two with the same color and shape, so that "the red circle" is one
    thing.

    In a clip the first of them always moves.
    """
    count = int(rng.integers(1, 4))
    names = [NAMES[i] for i in rng.permutation(len(NAMES))[:count]]
    things = []
    while len(things) < count:
        moves = video and (not things or rng.random() < 0.6)
        thing = draw_thing(rng, names[len(things)], moves)
        if all(apart(thing, other) for other in things):
            things.append(thing)
    return Scene(pick(rng, tuple(GROUNDS)), tuple(things))


class Redraw(Exception):
    """This edit can't be made in this scene: draw another scene."""


class Draft:
    """A scene on the way from source to target, with the words that lead there.

    An instruction names what it edits as it is in the source. Therefore nothing is edited twice,
    and nothing new gets the name of anything in the source, edited or not.
    """

    def __init__(self, rng, source):
        self.rng, self.source, self.scene = rng, source, source
        self.clauses, self.references = [], []
        self.untouched = list(source.things)
        self.touched = []  # as before and as after their edit
        self.names = {thing.name for thing in source.things}

    def apply(self, kind):
        if kind == "hybrid":
            return self.hybrid()
        return getattr(self, kind)()

    def say(self, kind, **words):
        self.clauses.append(pick(self.rng, WORDINGS[kind]).format(**words))

    def take(self):
        """A thing to edit."""
        if not self.untouched:
            raise Redraw
        thing = self.untouched.pop(int(self.rng.integers(len(self.untouched))))
        self.touched.append(thing)
        return thing

    def new_name(self, allowed):
        names = [name for name in NAMES if name not in self.names and allowed(name)]
        self.names.add(name := pick(self.rng, names))
        return name

    def exchange(self, old, new):
        """Puts new in place of old; either may be None."""
        things = [new if thing == old else thing for thing in self.scene.things]
        things = things + [new] if old is None else things
        self.scene = replace(self.scene, things=tuple(thing for thing in things if thing))
        self.touched += [new] if new else []

    def swap(self):
        old = self.take()
        color, shape = self.new_name(lambda name: name[1] != old.shape)
        self.exchange(old, replace(old, color=color, shape=shape))
        self.say("swap", old=the(old), new=f"{article(color)} {color} {shape}")

    def color(self):
        old = self.take()
        color, _ = self.new_name(lambda name: name[1] == old.shape)
        self.exchange(old, replace(old, color=color))
        self.say("color", old=the(old), color=color)

    def remove(self):
        old = self.take()
        self.exchange(old, None)
        self.say("remove", old=the(old))

    def free_spot(self, name, size):
        """(new thing, its place) where nothing of the source or of the picture so far ever comes
        near.
        """
        for i in self.rng.permutation(len(PLACES)):
            spot = cell_center(PLACES[i])
            thing = Thing(*name, size, spot, spot)
            if all(apart(thing, other) for other in self.source.things + self.scene.things):
                return thing, PLACES[i]
        raise Redraw

    def add(self):
        name = self.new_name(lambda name: True)
        new, place = self.free_spot(name, pick(self.rng, ("small", "large")))
        self.exchange(None, new)
        self.say("add", new=a(new), place=place)

    def style(self):
        self.scene = replace(self.scene, look=pick(self.rng, tuple(STYLES)))
        self.say("style", look=STYLES[self.scene.look])

    def tone(self):
        self.scene = replace(self.scene, look=pick(self.rng, tuple(TONES)))
        self.say("tone", look=TONES[self.scene.look])

    def hybrid(self):
        """One edit of a thing, then one of another thing or of the whole picture.

        Never a look first: would what comes after it be painted in plain colors or in its own?
        """
        first = pick(self.rng, ("swap", "color", "add", "remove"))
        self.apply(first)
        self.apply(
            pick(self.rng, ("swap", "color", "add", "remove", "style", "tone", "style", "tone"))
        )
        if (
            self.scene.look
            and not self.scene.things
            or first == "color"
            and self.scene.look in ("sketch", "gray")
        ):
            raise Redraw  # half of the edit could hardly be seen

    def refer(self, name):
        """A reference image of name, on a plain ground that is not the scene's."""
        middle = cell_center("center")
        ground = pick(self.rng, [ground for ground in PLAIN if ground != self.scene.ground])
        self.references.append(Scene(ground, (Thing(*name, "huge", middle, middle),)))

    def ref_swap(self):
        old = self.take()
        color, shape = self.new_name(lambda name: True)
        self.refer((color, shape))
        self.exchange(old, replace(old, color=color, shape=shape))
        self.say("swap", old=the(old), new=pick(self.rng, REFERENCE))

    def ref_add(self):
        name = self.new_name(lambda name: True)
        new, place = self.free_spot(name, "large")
        self.refer(name)
        self.exchange(None, new)
        self.say("add", new=pick(self.rng, REFERENCE), place=place)

    def finish(self):
        self.instruction = (
            pick(self.rng, JOINTS).format(*self.clauses)
            if len(self.clauses) > 1
            else self.clauses[0]
        )
        things, ground = self.source.things, self.source.ground
        is_gray = ground in ("white", "gray") and all(thing.color == "black" for thing in things)
        if is_gray and self.scene == replace(self.source, look="gray"):
            raise Redraw  # nothing would change

    def belongs_to(self, split):
        if split == "train":
            scenes = [self.source, self.scene, *self.references]
            return not any(thing.held_out() for scene in scenes for thing in scene.things)
        return any(thing.held_out() for thing in self.touched or self.source.things)


def draw(seed, video=False, split="train", kind=None):
    """(kind, finished Draft) of a seed: a case in words and scenes, before it is painted.

    Arguments as for sample.
    """
    if split not in ("train", "heldout") or kind not in (None, *KINDS):
        raise ValueError(
            f"split {split!r} must be train or heldout, and kind {kind!r} one of {', '.join(KINDS)}"
        )
    rng = np.random.default_rng(seed)
    kind = kind or pick(rng, KINDS)
    while True:
        draft = Draft(rng, draw_scene(rng, video))
        try:
            draft.apply(kind)
            draft.finish()
        except Redraw:
            continue
        if draft.belongs_to(split):
            return kind, draft


def sample(seed, video=False, split="train", kind=None, size=64, frames=9):
    """The case of a seed; equal arguments give equal bytes.

    video: a clip of `frames` frames rather than an image. kind: one of KINDS, or None to let the
    seed decide. size: side of the square frame, a multiple of 16. Raises ValueError for an unknown
    split or kind and for other sizes.
    """
    kind, draft = draw(seed, video, split, kind)
    count = frames if video else 1
    source, target = render(draft.source, size, count), render(draft.scene, size, count)
    references = [render(scene, size)[0] for scene in draft.references]
    return Case(
        seed,
        kind,
        split,
        draft.instruction,
        source,
        target,
        references,
        draft.source,
        draft.scene,
        draft.references,
    )


def article(word):
    return "an" if word == "orange" else "a"


def a(thing):
    return f"a {thing.size} {thing.color} {thing.shape}"


def the(thing):
    return f"the {thing.color} {thing.shape}"


def where(thing):
    """The place of a still thing, "top left", or the way of a moving one, "from the top left to the
    center".
    """
    places = thing.places()
    return places[0] if thing.start == thing.end else f"from the {places[0]} to the {places[-1]}"


def caption(scene):
    """The whole scene in one sentence, things in reading order of the cells where they start."""
    things = sorted(scene.things, key=lambda thing: PLACES.index(thing.places()[0]))
    parts = [
        f"{a(thing)} {'at the' if thing.start == thing.end else 'moving'} {where(thing)}"
        for thing in things
    ]
    parts.append(f"on a {scene.ground} ground")
    return ", ".join(parts + ([f"as {LOOKS[scene.look]}"] if scene.look else []))


def questions(scene, rng):
    """[(question, answer)] in random order, each with one right answer, about a scene without style
    or tone.

    Held-out combinations are asked about only where the scene has them. Raises ValueError for a
    scene with a look.
    """
    if scene.look:
        raise ValueError(
            f"questions are about plain scenes, not {LOOKS[scene.look]}, which may hide the answers"
        )
    pairs = [
        ("how many shapes are there?", ("none", "one", "two", "three", "four")[len(scene.things)]),
        ("what is the ground?", scene.ground),
    ]
    colors, shapes = (
        [thing.color for thing in scene.things],
        [thing.shape for thing in scene.things],
    )
    for thing in scene.things:
        pairs += [
            (f"where is {the(thing)}?", where(thing)),
            (f"what size is {the(thing)}?", thing.size),
            (f"is {the(thing)} moving?", "no" if thing.start == thing.end else "yes"),
            (f"is there {article(thing.color)} {thing.color} {thing.shape}?", "yes"),
        ]
        pairs += [(f"what color is the {thing.shape}?", thing.color)] * (
            shapes.count(thing.shape) == 1
        )
        pairs += [(f"what shape is {thing.color}?", thing.shape)] * (colors.count(thing.color) == 1)
    absent = sorted(set(NAMES) - HELD_OUT_NAMES - {thing.name for thing in scene.things})
    for color, shape in (pick(rng, absent), pick(rng, absent)):
        pairs.append((f"is there {article(color)} {color} {shape}?", "no"))
    pairs += what_is_where(scene, rng)
    return [pairs[i] for i in rng.permutation(len(pairs))]


def what_is_where(scene, rng):
    """Questions about places, in a clip only about those that nothing enters or leaves."""
    visitors = {
        place: [thing for thing in scene.things if place in thing.places()] for place in PLACES
    }
    pairs = [
        (f"what is at the {place}?", a(things[0]))
        for place, things in visitors.items()
        if len(things) == 1 and things[0].start == things[0].end
    ]
    empty = [place for place, things in visitors.items() if not things]
    return pairs + [(f"what is at the {pick(rng, empty)}?", "nothing")]


def vocabulary_texts(n, seed=0):
    """Yields n sentences of the split "train" (instructions, captions, questions, answers) to train
    a tokenizer on.
    """
    rng, texts = np.random.default_rng(seed), []
    for i in range(n):
        if not texts:
            _, draft = draw(seed * SEEDS + i, video=i % 2 == 1)
            texts = [draft.instruction, caption(draft.source), caption(draft.scene)]
            texts += [text for pair in questions(draft.source, rng)[:4] for text in pair]
        yield texts.pop()


def outline(shape):
    """Corners (k, 2) of a shape that fits the box [-1, 1] x [-1, 1]."""
    if shape == "square":
        return np.array([(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)])
    if shape == "triangle":
        return np.array([(0, -0.95), (1, 0.8), (-1, 0.8)])
    turn = np.arange(10) * np.pi / 5
    reach = np.where(
        np.arange(10) % 2, 0.52, 1.05
    )  # a fat star, so that a small one is more than its tips
    return np.stack([reach * np.sin(turn), 0.1 - reach * np.cos(turn)], axis=1)


OUTLINES = {
    shape: outline(shape).astype(np.float32)[:, :, None, None, None]
    for shape in SHAPES
    if shape != "circle"
}


def distance(shape, x, y):
    """Signed distance to the edge of a shape of radius 1, negative inside. x (T, 1, n), y (T, n, 1)
    -> (T, n, n).
    """
    if shape == "circle":
        return np.hypot(x, y) - 1
    corner = OUTLINES[shape]  # (k, 2, 1, 1, 1)
    edge = np.roll(corner, -1, axis=0) - corner
    (ax, ay), (ex, ey) = corner.swapaxes(0, 1), edge.swapaxes(0, 1)  # (k, 1, 1, 1) each
    wx, wy = x - ax, y - ay
    along = np.clip((wx * ex + wy * ey) / (ex * ex + ey * ey), 0, 1)  # (k, T, n, n)
    nearest = np.sqrt(((wx - along * ex) ** 2 + (wy - along * ey) ** 2).min(axis=0))
    # Even-odd rule: count the edges that a ray to the right crosses.
    crossed = ((wy >= 0) != (wy >= ey)) & ((wy * ex > wx * ey) == (ey > 0))
    return np.where(crossed.sum(axis=0) % 2 == 1, -nearest, nearest)  # (T, n, n)


def stamp(canvas, thing, pad, color, stroke=None):
    """Paints a thing, its edge blended over one pixel, on canvas (T, H+2 pad, W+2 pad, 3). stroke:
    outline width.
    """
    side = canvas.shape[1] - 2 * pad
    radius = RADII[thing.size] * side
    reach = int(np.ceil(radius)) + 2
    center = (thing.path(len(canvas)) * side).astype(np.float32)  # (T, 2)
    corner = np.floor(center).astype(int) - reach
    pixel = corner[:, :, None] + np.arange(2 * reach + 1) + 0.5 - center[:, :, None]
    x, y = (pixel / radius).astype(np.float32).swapaxes(0, 1)  # (T, n) each
    depth = distance(thing.shape, x[:, None, :], y[:, :, None]) * radius
    if stroke:
        depth = np.abs(depth + stroke / 2) - stroke / 2
    cover = np.clip(0.5 - depth, 0, 1)[..., None]  # (T, n, n, 1)
    for frame, alpha, (left, top) in zip(canvas, cover, corner + pad):
        patch = frame[top : top + len(alpha), left : left + len(alpha)]
        patch += alpha * (color - patch)


def render(scene, size=64, frames=1):
    """The scene as uint8 (frames, size, size, 3).

    Raises ValueError where size is not a multiple of 16.
    """
    if size % 16 or size <= 0:
        raise ValueError(f"size {size} must be a positive multiple of 16, for the mosaic")
    pad = 4  # a stamp reaches a little past the frame
    sketch = scene.look == "sketch"
    top, bottom = (np.array(color, np.float32) for color in GROUNDS[scene.ground])
    height = np.clip((np.arange(size + 2 * pad, dtype=np.float32) - pad) / max(size - 1, 1), 0, 1)[
        :, None, None
    ]
    ground = np.float32([250, 248, 242]) if sketch else top + (bottom - top) * height
    canvas = np.empty((frames, size + 2 * pad, size + 2 * pad, 3), np.float32)
    canvas[:] = ground
    for thing in scene.things:
        color = np.float32([48, 48, 56] if sketch else COLORS[thing.color])
        stamp(canvas, thing, pad, color, stroke=2 * size / 64 if sketch else None)
    image = canvas[:, pad:-pad, pad:-pad] / 255
    return (np.clip(LOOK[scene.look](image), 0, 1) * 255 + 0.5).astype(np.uint8)


def luminance(x):
    """Seen by a film that is nearly blind to red: with the eye's weights yellow would vanish on
    gray and sand.
    """
    return (x @ np.float32([0.1, 0.5, 0.4]))[..., None]


def blurred(x):
    """Gaussian of 1/20 of the side, edges repeated."""
    sigma = x.shape[1] / 20
    reach = int(np.ceil(2.5 * sigma))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    # As a matrix on rows and columns: output pixel i reads pixels i - reach ... i + reach, held
    # inside the frame.
    weights = np.zeros((x.shape[1], x.shape[1]), np.float32)
    for i in range(len(weights)):
        np.add.at(
            weights[i],
            np.clip(np.arange(i - reach, i + reach + 1), 0, len(weights) - 1),
            kernel / kernel.sum(),
        )
    return np.einsum("ih,thwc,jw->tijc", weights, x, weights, optimize=True)


def mosaic(x):
    """Tiles of 1/16 of the side, at least one pixel."""
    t, h, w, c = x.shape
    tile = max(h // 16, 1)
    tiles = x.reshape(t, h // tile, tile, w // tile, tile, c).mean(axis=(2, 4))
    return tiles.repeat(tile, axis=1).repeat(tile, axis=2)


LOOK = {  # what a style or tone does to a picture in [0, 1]; the sketch is drawn as one
    None: lambda x: x,
    "sketch": lambda x: x,
    "blur": blurred,
    "mosaic": mosaic,
    "gray": lambda x: luminance(x).repeat(3, axis=-1),
    "negative": lambda x: 1 - x,
    "night": lambda x: x * np.float32([0.26, 0.32, 0.54]) + np.float32([0.02, 0.03, 0.08]),
    "sunset": lambda x: x * np.float32([0.88, 0.62, 0.42]) + np.float32([0.12, 0.02, 0.06]),
    "fog": lambda x: x * 0.45 + np.float32([0.47, 0.48, 0.49]),
    "winter": lambda x: (0.45 * x + 0.55 * luminance(x)) * 0.66 + np.float32([0.22, 0.29, 0.36]),
}


def write_frames(frames, path, clip):
    """An image as path.png, a clip as a folder of frames, both lossless. Returns the name written.

    Not as an animated PNG: Pillow drops a frame that equals the one before, and in some targets
    nothing moves.
    """
    if not clip:
        Image.fromarray(frames[0]).save(f"{path}.png", compress_level=1)
        return f"{path}.png"
    path.mkdir(exist_ok=True)
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(path / f"{i:02d}.png", compress_level=1)
    return str(path)


def write_case(case, folder, name):
    """Writes the media of a case and returns its line of data.jsonl; paths in it are relative to
    folder.
    """
    clip = len(case.source) > 1
    sub = folder / ("clips" if clip else "images")
    sub.mkdir(exist_ok=True)
    put = lambda frames, role, clip=clip: os.path.relpath(
        write_frames(frames, sub / f"{name}_{role}", clip), folder
    )
    return {
        "id": name,
        "source": put(case.source, "source"),
        "target": put(case.target, "target"),
        "instruction": case.instruction,
        "references": [
            put(image[None], f"reference{i}", False) for i, image in enumerate(case.references)
        ],
        "kind": case.kind,
        "video": clip,
        "seed": case.seed,
        "split": case.split,
        "source_scene": asdict(case.source_scene),
        "target_scene": asdict(case.target_scene),
        "reference_scenes": [asdict(scene) for scene in case.reference_scenes],
    }


def plan(count, video_share, kinds=KINDS):
    """Yields (kind, video) so that each of `kinds` comes equally often, as image and as clip."""
    for i in range(count):
        turn = i // len(kinds)
        yield (
            kinds[i % len(kinds)],
            int((turn + 1) * video_share + 0.5) > int(turn * video_share + 0.5),
        )


def make(folder, count, video_share=0.3, seed=0, split="train", frames=9, kinds=KINDS):
    """Writes count cases and, when all are there, data.jsonl.

    Raises FileExistsError where a data.jsonl is already.
    """
    folder = Path(folder)
    if (folder / "data.jsonl").exists():
        raise FileExistsError(
            f"{folder / 'data.jsonl'} exists: choose another folder, or delete it first"
        )
    if not 0 < count <= SEEDS or not 0 <= video_share <= 1 or frames < 2:
        raise ValueError(
            f"count must be 1 to {SEEDS}, the video share 0 to 1, and a clip at least 2 frames long"
        )
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / "data.jsonl.tmp"
    with open(unfinished, "w") as file:
        for i, (kind, video) in enumerate(
            tqdm(plan(count, video_share, kinds), "cases", total=count, disable=None)
        ):
            case = sample(seed * SEEDS + i, video, split, kind, frames=frames)
            file.write(json.dumps(write_case(case, folder, f"{i:06d}")) + "\n")
    os.replace(unfinished, folder / "data.jsonl")


def read_frames(path):
    """An image, a folder of images or a video as uint8 (T, H, W, 3).

    FileNotFoundError, ValueError.
    """
    return read_media(path).frames


def rivals(source_scene, target_scene, size=64, frames=1):
    """Pictures uint8 (frames, size, size, 3) that are the target but for one fact: a thing of it
    missing, or of another color, shape or size; a thing of the source as if not edited; another
    look, or none.
    """
    target, scenes = (
        target_scene,
        [replace(target_scene, look=look) for look in LOOK if look != target_scene.look],
    )
    for old in source_scene.things:
        if old not in target.things:
            rest = tuple(
                thing for thing in target.things if (thing.start, thing.end) != (old.start, old.end)
            )
            scenes.append(replace(target, things=(*rest, old)))
    for thing in target.things:
        rest = tuple(other for other in target.things if other != thing)
        wrong = [replace(thing, color=color) for color in COLORS] + [
            replace(thing, shape=shape) for shape in SHAPES
        ]
        wrong += [replace(thing, size=size) for size in ("small", "large")]
        scenes += [replace(target, things=rest)]
        scenes += [replace(target, things=(*rest, other)) for other in wrong if other != thing]
    return [render(scene, size, frames) for scene in scenes]


def judge(source, target, output, rivals=()):
    """Measures a result; source, target, output and each rival are uint8 (T, H, W, 3) of equal
    shapes.

    Returns {"inside", "outside", "window", "rival", "success"}. The first three are the errors that
    the module's docstring defines; rival is the largest ratio (distance to target) / (distance to a
    rival), 0.0 without rivals. Without rivals, wrong shapes and neighboring colors can pass. Raises
    ValueError where shapes differ, or nothing should change.
    """
    if not source.shape == target.shape == output.shape:
        raise ValueError(
            f"source {source.shape}, target {target.shape}, output {output.shape} must be one shape"
        )
    changed = differs(source, target)  # (T, H, W)
    if not changed.any():
        raise ValueError("source and target are the same: there is no edit to judge")
    error = np.abs(np.subtract(output, target, dtype=np.float32)).mean(axis=-1) / 255  # (T, H, W)
    scores = {
        "inside": float(error[changed].mean() / far(source, target, changed)),
        "outside": float(error[~changed].mean()) if not changed.all() else 0.0,
        "window": worst_window(error),
        "rival": max((nearness(target, output, rival) for rival in rivals), default=0.0),
    }
    return scores | {"success": all(scores[name] < limit for name, limit in LIMITS.items())}


def differs(one, other):
    """Where two uint8 (T, H, W, 3) differ by more than a trace, (T, H, W)."""
    red, green, blue = np.moveaxis(np.abs(np.subtract(one, other, dtype=np.int16)) > CHANGED, -1, 0)
    return red | green | blue


def far(one, other, pixels):
    """Mean absolute difference over the pixels of a mask (T, H, W), in [0, 1]."""
    return float(np.abs(np.subtract(one[pixels], other[pixels], dtype=np.float32)).mean() / 255)


def worst_window(error):
    """The largest mean over any 8x8 window of any frame of error (T, H, W)."""
    side = WINDOW_SIDE
    total = np.pad(error.astype(np.float64), ((0, 0), (1, 0), (1, 0))).cumsum(axis=1).cumsum(axis=2)
    window = (
        total[:, side:, side:]
        - total[:, :-side, side:]
        - total[:, side:, :-side]
        + total[:, :-side, :-side]
    )
    return float(window.max() / side**2)


def nearness(target, output, rival):
    """(distance of output to target) / (distance to rival), both where those two differ; 0.0 if
    they hardly do.
    """
    pixels = differs(target, rival)
    if not pixels.any() or far(target, rival, pixels) < VISIBLE:
        return 0.0
    return far(output, target, pixels) / max(far(output, rival, pixels), 1e-6)


def round_trip(vae, frames):
    """uint8 (T, H, W, 3) through a VAE and back: nothing that paints in its latents beats it."""
    from vae import to_frames, to_video

    return to_frames(vae.decode(vae.encode(to_video(frames, like=vae.conv1.weight))))


def load_vae(folder):
    from vae import WanVAE

    return WanVAE.from_pretrained(folder)


def load_model(weights):
    """In float32, as edit.py on a CPU.

    The files have half precision, in which a CPU takes several times as long.
    """
    import torch

    from connector import InstructX

    return InstructX.from_pretrained(weights, dtype=torch.float32)


def edit(data, results, weights):
    """Edits every case of a dataset into `results`, named by its id, with the settings of the
    weights' own config.

    A case that has a result already is left as it is, so that a long run can be cut off and goes
    on.
    """
    model, data, results = load_model(weights), Path(data), Path(results)
    results.mkdir(parents=True, exist_ok=True)
    for line in tqdm(
        [json.loads(line) for line in open(data / "data.jsonl")], "edited", disable=None
    ):
        if find_result(results, line["id"]) is None:
            references = [read_frames(data / path)[0] for path in line["references"]]
            frames = model.edit(read_frames(data / line["source"]), line["instruction"], references)
            write_result(frames, results, line["id"], clip=line["video"])


def write_result(frames, results, name, clip):
    """Writes the result of a case, whole or not at all."""
    written = Path(write_frames(frames, results / f"partial-{name}", clip))
    os.replace(written, results / written.name.removeprefix("partial-"))


def find_result(results, name):
    """The result of a case: a folder of frames or a file; None where there is none."""
    candidates = [results / name] + [
        results / (name + suffix) for suffix in (".png", ".apng", ".mp4", ".gif", ".webm")
    ]
    return next((path for path in candidates if path.exists()), None)


def score_case(line, data, results, vae):
    """The verdicts on one line of data.jsonl, by column; None for a result that is missing."""
    source, target = read_frames(data / line["source"]), read_frames(data / line["target"])
    scenes = Scene.from_dict(line["source_scene"]), Scene.from_dict(line["target_scene"])
    wrong = rivals(*scenes, size=target.shape[1], frames=len(target))
    verdicts = {"no-op": judge(source, target, source, wrong)}
    if vae is not None:
        verdicts["vae"] = judge(source, target, round_trip(vae, target), wrong)
    if results is not None:
        path = find_result(results, line["id"])
        output = None if path is None else read_frames(path)
        if path and output.shape != target.shape:
            raise ValueError(f"{path} is {output.shape} (T, H, W, 3), its target {target.shape}")
        verdicts["result"] = judge(source, target, output, wrong) if path else None
    return verdicts


def summary(verdicts):
    """Success in %, mean errors of what is there, and how many are missing."""
    there = [verdict for verdict in verdicts if verdict]
    mean = lambda name: sum(verdict[name] for verdict in there) / len(there) if there else None
    return {
        "success": 100 * sum(verdict["success"] for verdict in there) / len(verdicts),
        "inside": mean("inside"),
        "outside": mean("outside"),
        "missing": len(verdicts) - len(there),
    }


def score(data, results=None, vae=None):
    """Judges every case of a dataset: {"limits", "rows", "cases"}, ready for JSON.

    data: folder with data.jsonl. results: folder with one result per case, named by its id, or None
    for the baselines alone. vae: a WanVAE, or None. Raises ValueError if an untouched source
    passes: such a judge is not to be believed.
    """
    data, results = Path(data), None if results is None else Path(results)
    lines = [json.loads(line) for line in open(data / "data.jsonl")]
    cases = [
        {
            "id": line["id"],
            "kind": line["kind"],
            "media": "clip" if line["video"] else "image",
            **score_case(line, data, results, vae),
        }
        for line in tqdm(lines, "judged", disable=None)
    ]
    if passed := [case["id"] for case in cases if case["no-op"]["success"]]:
        raise ValueError(
            f"the judge accepts {len(passed)} untouched sources, among them {passed[:5]}"
        )
    columns = [name for name in ("result", "no-op", "vae") if name in cases[0]]
    rows = []
    for kind in (*KINDS, "all"):
        for media in ("image", "clip"):
            group = [
                case for case in cases if kind in (case["kind"], "all") and case["media"] == media
            ]
            if group:
                rows.append(
                    {
                        "kind": kind,
                        "media": media,
                        "n": len(group),
                        **{name: summary([case[name] for case in group]) for name in columns},
                    }
                )
    return {"limits": LIMITS, "rows": rows, "cases": cases}


def table(scores):
    """The rows of score() as text."""
    columns = [name for name in ("result", "no-op", "vae") if name in scores["rows"][0]]
    limits = ", ".join(f"{name} < {limit}" for name, limit in scores["limits"].items())
    lines = [
        f"a success has {limits}",
        " " * 19 + "".join(f" | {name:^24}" for name in columns),
        f"{'kind':<9}{'media':<6}{'n':>4}" + " | success  inside outside" * len(columns),
    ]
    number = lambda value: "      - " if value is None else f"{value:8.3f}"
    for row in scores["rows"]:
        cells = []
        for name in columns:
            inside, outside = number(row[name]["inside"]), number(row[name]["outside"])
            cells.append(f" | {row[name]['success']:6.1f}%{inside} {outside}")
        lines.append(f"{row['kind']:<9}{row['media']:<6}{row['n']:>4}" + "".join(cells))
    missing = sum(
        row["result"]["missing"]
        for row in scores["rows"]
        if row["kind"] == "all" and "result" in columns
    )
    return "\n".join(
        lines + [f"{missing} results are missing and count as failures"] * bool(missing)
    )


TILE, MARGIN = 160, 16


def tile(frame, side):
    return Image.fromarray(frame).resize((side, side), Image.BICUBIC)


def card_image(case, result=None):
    """source, arrow (under it the reference), result if there is one, target."""
    shown = [frames[0] for frames in (result, case.target) if frames is not None]
    card = Image.new("RGB", (2 * TILE - 40 + len(shown) * (TILE + 4) - 4, TILE), "white")
    middle = TILE + (TILE - 40) // 2
    card.paste(tile(case.source[0], TILE), (0, 0))
    for column, frame in enumerate(shown):
        card.paste(tile(frame, TILE), (2 * TILE - 40 + column * (TILE + 4), 0))
    arrow = 32 if case.references else TILE // 2
    for reference in case.references:
        card.paste(tile(reference, 84), (middle - 42, 60))
    paint = ImageDraw.Draw(card)
    paint.line((middle - 22, arrow, middle + 14, arrow), (90, 90, 96), 4)
    paint.polygon(
        ((middle + 24, arrow), (middle + 10, arrow - 9), (middle + 10, arrow + 9)), (90, 90, 96)
    )
    return card


def card_clip(case, result=None):
    """First, middle and last frame of the source, below them those of the result if there is one,
    and of the target; the reference on the right.
    """
    side, step = 116, 120
    rows = [frames for frames in (case.source, result, case.target) if frames is not None]
    card = Image.new("RGB", (3 * step + 92, len(rows) * (side + 12) - 12), "white")
    for column, i in enumerate((0, len(case.source) // 2, len(case.source) - 1)):
        for row, frames in enumerate(rows):
            card.paste(tile(frames[i], side), (column * step, row * (side + 12)))
    for reference in case.references:
        card.paste(tile(reference, 84), (3 * step + 8, (card.height - 84) // 2))
    return card


def sheet(cases, columns=2, results=()):
    """A contact sheet of cases, all images or all clips, each above its instruction; with
    `results`, one for each case.
    """
    font = ImageFont.load_default(16)
    card = card_clip if len(cases[0].source) > 1 else card_image
    cards = [card(case, result) for case, result in zip(cases, results or [None] * len(cases))]
    width, height = cards[0].width + 2 * MARGIN, cards[0].height + 2 * MARGIN + 44
    page = Image.new("RGB", (width * columns, height * -(-len(cards) // columns)), "white")
    paint = ImageDraw.Draw(page)
    for i, (case, card) in enumerate(zip(cases, cards)):
        x, y = i % columns * width + MARGIN, i // columns * height + MARGIN
        page.paste(card, (x, y))
        lines = textwrap.fill(case.instruction, int(card.width / 7.2))
        paint.text((x, y + card.height + 8), lines, (40, 40, 46), font)
    return page


def show(out, seed=0, video=False, split="train", weights=None):
    """Writes a contact sheet with one case of each kind and, where `weights` are given, what their
    InstructX makes of it.
    """
    cases = [sample(seed * SEEDS + i, video, split, kind) for i, kind in enumerate(KINDS)]
    results = []
    if weights:
        model = load_model(weights)
        results = [
            model.edit(case.source, case.instruction, case.references)
            for case in tqdm(cases, "edited", disable=None)
        ]
    sheet(cases, columns=3, results=results).save(out)


def parse():
    parser = argparse.ArgumentParser(
        description="A world of shapes: make data, score results, show cases."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    style = argparse.ArgumentDefaultsHelpFormatter
    add = lambda name, text: commands.add_parser(
        name, help=text, description=text, formatter_class=style
    )
    command = add("make", "write a dataset")
    command.add_argument("out", type=Path, help="folder to write to")
    command.add_argument("--count", type=int, default=1000, help="number of cases")
    command.add_argument("--video-share", type=float, default=0.3, help="share of clips among them")
    text = "frames of a clip, an odd number: training drops the last of an even one"
    command.add_argument("--frames", type=int, default=9, help=text)
    command.add_argument(
        "--kinds",
        nargs="+",
        choices=KINDS,
        default=KINDS,
        metavar="KIND",
        help="the kinds of edits",
    )
    makes = command
    command = add("show", "draw a contact sheet with one case of each kind")
    command.add_argument("out", type=Path, help="PNG to write")
    command.add_argument("--video", action="store_true", help="clips: first, middle and last frame")
    command.add_argument(
        "--weights", type=Path, help="of an InstructX: its results stand between source and target"
    )
    for command in (makes, command):
        command.add_argument("--seed", type=int, default=0, help="another seed gives other cases")
        command.add_argument(
            "--split",
            choices=("train", "heldout"),
            default="train",
            help="heldout: every case has a combination that train never has",
        )
    command = add("edit", "edit every case of a dataset with a model")
    command.add_argument("data", type=Path, help="folder that make wrote")
    command.add_argument(
        "results", type=Path, help="folder to write to, one result per case; those there are kept"
    )
    command.add_argument(
        "--weights", type=Path, default=Path(__file__).parent, help="weights folder of an InstructX"
    )
    command = add("score", "judge the results for a dataset")
    command.add_argument("data", type=Path, help="folder that make wrote")
    command.add_argument(
        "results", type=Path, nargs="?", help="folder with 000000.png, 000001.mp4, 000002/ ..."
    )
    command.add_argument("--json", type=Path, help="also write every figure to this file")
    command.add_argument(
        "--vae", type=Path, help="weights of a WanVAE: also judge its round trip of the targets"
    )
    return parser, parser.parse_args()


def main():
    parser, args = parse()
    try:
        if args.command == "make":
            cases = args.count, args.video_share, args.seed, args.split
            make(args.out, *cases, frames=args.frames, kinds=args.kinds)
        elif args.command == "show":
            show(args.out, args.seed, args.video, args.split, args.weights)
        elif args.command == "edit":
            edit(args.data, args.results, args.weights)
        else:
            scores = score(args.data, args.results, load_vae(args.vae) if args.vae else None)
            print(table(scores))
            if args.json:
                args.json.write_text(json.dumps(scores, indent=1) + "\n")
    except (OSError, ValueError) as error:
        parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    main()
