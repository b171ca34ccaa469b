"""Attacks edit.py and train.py from outside with damaged input and kills, and counts what held.

    python tests/attack.py media configs data kills --count 200 --seed 0
    python tests/attack.py media --seed 0 --only 17         # one case again, and all that it said

media damages pictures and clips of every format that edit.py reads, configs the files of a weights
folder, data those of a training. A case holds if the program does its work, or ends with code 2 and
one line that names a file at fault; within LIMIT seconds and MEMORY bytes, and with nothing left
over. kills, with a twentieth of --count, ends train.py by signals until a start gets through: a
case holds if the result is that of a run in peace. A seed and a number determine a case, but for
the times of kills, which follow the speed of the machine.
"""

import argparse
import contextlib
import copy
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TOP = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TOP), str(TOP / "tests")]

from conftest import make_tiny_weights  # first: it sets the number of threads

import av
import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError
from safetensors.torch import load_file, save_file

import edit
import train

LIMIT = 60  # seconds of a case, or of an end after a signal
MEMORY = 3 * 10**9  # bytes that a case may take beside the files that it maps
FRAMES = 5
IMAGES = {"a.png": "RGBA", "b.png": "I;16", "c.jpg": "RGB", "d.jpg": "CMYK", "e.webp": "RGBA"}
IMAGES |= {"f.gif": "P", "g.bmp": "RGB", "h.tiff": "RGB", "i.ppm": "RGB", "j.jp2": "RGB"}
ANIMATIONS = ("k.png", "l.webp", "m.gif")
CLIPS = {  # container, codec, pixel format, codec of the sound
    "a.mp4": ("mp4", "libx264", "yuv420p", "aac"),
    "b.mov": ("mov", "prores_ks", "yuva444p10le", "pcm_s16le"),
    "c.mkv": ("matroska", "libx265", "yuv420p10le", "flac"),
    "d.webm": ("webm", "libvpx-vp9", "yuva420p", "libopus"),
    "e.avi": ("avi", "mpeg4", "yuv420p", "libmp3lame"),
    "f.ts": ("mpegts", "libx264", "yuv420p", "ac3"),
    "g.mpg": ("mpeg", "mpeg2video", "yuv420p", "mp2"),
    "h.flv": ("flv", "flv", "yuv420p", "libmp3lame"),
    "i.ogv": ("ogg", "libvpx", "yuv420p", "libopus"),
    "j.wmv": ("asf", "wmv2", "yuv420p", "wmav2"),
    "k.nut": ("nut", "ffv1", "bgr0", "pcm_s16le"),
    "l.mxf": ("mxf", "mpeg2video", "yuv420p", None),
    "m.dv": ("dv", "dvvideo", "yuv420p", None),
    "n.m2v": ("mpeg2video", "mpeg2video", "yuv420p", None),
    "o.m4v": ("m4v", "mpeg4", "yuv420p", None),
    "p.h264": ("h264", "libx264", "yuv420p", None),
    "q.hevc": ("hevc", "libx265", "yuv420p", None),
    "r.ivf": ("ivf", "libvpx", "yuv420p", None),
    "s.y4m": ("yuv4mpegpipe", "rawvideo", "yuv420p", None),
}
VALUES = [None, True, False, 0, -1, 1, 3, 2**31, 2**63, 10**30, 0.5, -1e308, float("nan")]
VALUES += [float("inf"), "", "x", "1", "\ud800", "DEEP", [], [0], [[1]], ["x", None], {}, {"a": 1}]
ENCODINGS = ("utf-8-sig", "utf-16", "utf-16-le", "utf-32", "utf-7")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


# Valid files


def picture(i, size=(48, 32)):
    """A PIL image of waves that move with i."""
    y, x = np.mgrid[: size[1], : size[0]]
    waves = [128 + 100 * np.sin((x + 3 * i) / 9 + k) * np.cos(y / 7) for k in range(3)]
    return Image.fromarray(np.stack(waves, axis=-1).astype(np.uint8))


def write_images(folder):
    """An image of each format, with EXIF and a color profile where it has room; animations."""
    exif, profile = Image.Exif(), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    exif[0x0112], exif[0x010E] = 6, "a wave"
    for name, mode in IMAGES.items():
        image = picture(0).convert("L" if mode == "I;16" else mode).convert(mode)
        image.save(folder / name, exif=exif.tobytes(), icc_profile=profile.tobytes())
    for name in ANIMATIONS:
        first, *others = (picture(i).convert("RGBA") for i in range(FRAMES))
        first.save(folder / name, save_all=True, append_images=others, duration=100)


def write_clip(path, container, codec, layout, sound):
    """A clip of FRAMES frames, with 0.2 s of sound if there is a codec for it."""
    width, height = {"dvvideo": (720, 576), "libx265": (128, 96)}.get(codec, (48, 32))
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    with av.open(str(path), "w", container) as out:
        track = out.add_stream(codec, 25, options, width=width, height=height, pix_fmt=layout)
        tone = sound and out.add_stream(sound, 48_000, layout="stereo", bit_rate=64_000)
        for i in range(FRAMES):
            out.mux(track.encode(av.VideoFrame.from_image(picture(i, (width, height)))))
        out.mux(track.encode(None))
        if tone:
            wave = np.sin(np.arange(9600, dtype=np.float32) / 20)
            frame = av.AudioFrame.from_ndarray(np.stack([wave, wave]), "fltp", "stereo")
            frame.sample_rate, frame.pts = 48_000, 0
            out.mux([*tone.encode(frame), *tone.encode(None)])


def write_rows(folder):
    """Media of three edits of images and one of a clip -> the rows of a data file."""
    rows = []
    for i in range(3):
        row = {"source": f"{i}s.png", "target": f"{i}t.jpg", "instruction": f"edit {i}"}
        for name in (row["source"], row["target"]):
            picture(i).save(folder / name)
        rows.append(row)
    rows[0]["references"] = ["1s.png"]
    for name in ("s.mp4", "t.mp4"):
        write_clip(folder / name, *CLIPS["a.mp4"])
    return [*rows, {"source": "s.mp4", "target": "t.mp4", "instruction": "edit a clip"}]


# Damage


def damage(content, rng, others):
    """Bytes of a file, spoiled in one to three ways; `others` lend their first bytes."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        start = rng.randrange(rng.choice((min(300, len(content)), len(content))) or 1)
        part = slice(start, start + int(2 ** rng.uniform(0, 12)))
        length, way = len(content[part]), rng.randrange(8)
        if way == 0:
            for i in rng.choices(range(start, start + length), k=9 if length else 0):
                content[i] ^= 1 << rng.randrange(8)
        elif way == 1:
            del content[part]
        elif way == 2:
            content[start:start] = content[part]
        elif way == 3:
            del content[start:]
        elif way == 4:
            content[part] = rng.choice((b"\0", b"\xff")) * length
        elif way == 5:
            content[part] = rng.randbytes(length)
        elif way == 6:
            content[:length] = rng.choice(others)[:length]
        else:
            extreme = rng.choice((0, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1))
            content[start : start + 4] = extreme.to_bytes(4, rng.choice(("big", "little")))
    return bytes(content)


def damage_json(text, rng):
    """JSON of which one to three values were removed, wrapped, renamed, scaled or replaced."""
    root = [json.loads(text)]
    for _ in range(rng.randint(1, 3)):
        parent, key = root, 0
        while isinstance(parent[key], dict | list) and parent[key] and rng.random() < 0.9:
            parent = parent[key]
            key = rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
        value, way = parent[key], rng.randrange(6)
        if way == 0 and parent is not root:
            del parent[key]
        elif way == 1:
            parent[key] = rng.choice(([value], {"a": value}, str(value)))
        elif way == 2 and isinstance(parent, dict):
            parent[f"{key}x"] = parent.pop(key)
        elif way == 3 and type(value) in (int, float):
            parent[key] = rng.choice((-1, 0.5, 2, 1000, 10**9)) * value
        else:
            parent[key] = copy.deepcopy(rng.choice(VALUES))
    return json.dumps(root[0]).replace('"DEEP"', "[" * 10**5)


def damage_weights(content, rng, name, others):
    """A file of a weights folder: most often its JSON, or that of its header, is spoiled."""
    if rng.random() < 0.3:
        return damage(content, rng, others)
    if name.endswith(".json"):
        return damage_json(content, rng).encode()
    end = 8 + int.from_bytes(content[:8], "little")
    header = damage_json(content[8:end], rng).encode()
    return len(header).to_bytes(8, "little") + header + content[end:]


# What a program does with it


def run(work, said):
    """work() in a process of its own, forked -> its exit code, and its lines in the file `said`."""

    def inside():
        with said.open("wb") as stream:
            for i in (1, 2):
                os.dup2(stream.fileno(), i)
        sys.stdout, sys.stderr = (open(i, "w", errors="replace", buffering=1) for i in (1, 2))
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        sys.exit(work())

    process = multiprocessing.get_context("fork").Process(target=inside)
    process.start()
    process.join(LIMIT)
    process.kill()
    process.join()
    lines = said.read_text(errors="replace").replace("\r", "\n").splitlines()
    return process.exitcode, lines


def judge(script, work, folder, names):
    """(exit code, lines, what is wrong or "") of work() on the files in folder/in.

    A refusal must be the last line, hold one of `names`, and leave no file. Other lines must be
    remarks of the script.
    """
    before = set((folder / "in").iterdir())
    code, lines = run(work, folder / "said")
    left = set((folder / "in").iterdir()) - before
    errors = [line for line in lines if line.startswith(f"{script}: error: ")]
    others = [line for line in lines if not line.startswith(f"{script}: ")]
    problem = ""
    if code not in (0, 2):
        problem = f"code {code}: {' / '.join(lines[-2:])}"
    elif code == 2 and (errors != lines[-1:] or others):
        problem = f"not one line: {' / '.join(lines)}"
    elif code == 2 and not any(name in errors[0] for name in names):
        problem = f"names no file: {errors[0]}"
    elif code == 2 and left:
        problem = f"left over: {left}"
    return code, lines, problem


class Copy:
    """Stands in for the model: its result is its input."""

    trained = True

    def edit(self, frames, *others):
        for frame in frames:
            others[-1](frame[None])


def shape_of(path):
    """(frames, height, width) of a result, read to its end by PIL or PyAV."""
    try:
        with Image.open(path) as image:
            for i in range(getattr(image, "n_frames", 1)):
                image.seek(i)
                image.load()
            return i + 1, image.height, image.width
    except UnidentifiedImageError:
        with av.open(str(path)) as clip:
            frames = list(clip.decode(video=0))
            return len(frames), frames[0].height, frames[0].width


def edited(source, *options):
    """edit.py's main on a file alone in its folder, and a look at the result."""
    edit.main([str(source), "copy it", *options])
    [result] = set(source.parent.iterdir()) - {source}
    found = shape_of(result)
    shape = len(edit.read_frames(source, 81).frames), *edit.media_shape(source)[1:]
    if found != shape:
        raise AssertionError(f"{result} is {found} and should be {shape}")


def leftovers(out):
    """What a training must not leave in its folder."""
    return [*out.rglob("*.partial"), *out.rglob("*.old")]


def trained(arguments, out):
    """train.py's main, and a look at what it wrote."""
    code = train.main(arguments)
    if leftovers(out) or code == 0 and not (out / "instructx" / "model.safetensors").is_file():
        raise AssertionError(f"instructx/ is missing, or left over are {leftovers(out)}")
    return code


def training(base, data, out, *more):
    """Arguments of train.py for a small run with the weights in `base`."""
    line = ["--stage", 2, "--data", data, "--weights", base / "weights", "--out", out, *more]
    line += "--device cpu --image-batch 2 --video-batch 1 --micro-batch 2 --area 1024".split()
    return list(map(str, line))


# The attacks. Each makes its files in `base`, and gives attempt(folder, rng) for a case.


def media(base):
    """Pictures and clips, edited by a model that returns its input."""
    write_images(base)
    for name, settings in CLIPS.items():
        write_clip(base / name, *settings)
    contents = {file.name: file.read_bytes() for file in sorted(base.iterdir())}

    def attempt(folder, rng):
        name = rng.choice(list(contents))
        source = folder / "in" / name
        source.write_bytes(damage(contents[name], rng, list(contents.values())))

        def work():
            edit.load, edit.DEFAULT_WEIGHTS = (lambda args: (Copy(), "cpu")), folder
            edited(source)

        return judge("edit.py", work, folder, [name])

    return attempt


def configs(base):
    """The files of a weights folder in which two models lie in shards."""
    make_tiny_weights(base)
    shutil.rmtree(base / "dit")  # instructx/ has its own
    for folder in (base / "mllm", base / "instructx" / "dit"):
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        shards = {name: f"{i % 2}.safetensors" for i, name in enumerate(tensors)}
        for shard in set(shards.values()):
            part = {name: tensor for name, tensor in tensors.items() if shards[name] == shard}
            save_file(part, folder / shard)
        index = json.dumps({"weight_map": shards})
        (folder / "model.safetensors.index.json").write_text(index)
    files = sorted(file.relative_to(base) for file in base.rglob("*") if file.is_file())
    others = [(base / file).read_bytes() for file in files]

    def attempt(folder, rng):
        weights, source = folder / "weights", folder / "in" / rng.choice(("a.png", "a.gif"))
        shutil.copytree(base, weights)
        pictures = [picture(i) for i in range(FRAMES if source.suffix == ".gif" else 1)]
        pictures[0].save(source, save_all=True, append_images=pictures[1:])
        file = weights / rng.choice(files)
        file.write_bytes(damage_weights(file.read_bytes(), rng, file.name, others))
        names = (str(weights), "weights are damaged", "memory")
        return judge("edit.py", lambda: edited(source, "--weights", str(weights)), folder, names)

    return attempt


def data(base):
    """JSON lines and CSV, and the media that they name, in a training of two steps."""
    make_tiny_weights(base / "weights")
    (base / "media").mkdir()
    rows = write_rows(base / "media")

    def attempt(folder, rng):
        shutil.copytree(base / "media", folder / "in", dirs_exist_ok=True)
        lines, suffix = [json.dumps(row) for row in rows], rng.choice((".jsonl", ".csv"))
        if suffix == ".csv":
            lines = ["src_video,tgt_video,prompt,ref_image", "0s.png,0t.jpg,edit 0,1s.png"]
            lines += [f"{row['source']},{row['target']},{row['instruction']}," for row in rows[1:]]
        elif rng.random() < 0.7:
            i = rng.randrange(len(lines))
            lines[i] = damage_json(lines[i], rng)
        content = "\n".join(lines).encode(rng.choice(("utf-8", "utf-8", *ENCODINGS)))
        if rng.random() < 0.5:
            content = damage(content, rng, [content])
        if rng.random() < 0.5:
            broken = folder / "in" / rng.choice(sorted(os.listdir(base / "media")))
            broken.write_bytes(damage(broken.read_bytes(), rng, [content]))
        file, out = folder / "in" / f"data{suffix}", folder / "out"
        file.write_bytes(content)
        arguments = training(base, file, out, "--steps", 2)
        return judge("train.py", lambda: trained(arguments, out), folder, [file.name])

    return attempt


def kills(base):
    """Trainings that signals end, started again until one start gets through."""
    make_tiny_weights(base / "weights")
    file = base / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in write_rows(base)))

    def start(folder):
        more = ("--steps", 60, "--save-every", 5, "--cache", folder / "cache")
        line = [sys.executable, TOP / "train.py", *training(base, file, folder / "out", *more)]
        with (folder / "said").open("ab") as log:
            return subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=log)

    def result(folder):
        files = (folder / "out" / "instructx").rglob("*.*")
        return {file.relative_to(folder): file.read_bytes() for file in files}

    began = time.monotonic()
    start(base).wait()
    lasts, expected = time.monotonic() - began, result(base)

    def attempt(folder, rng):
        codes, ended = [], False
        while not ended:
            process, number = start(folder), rng.choice(SIGNALS)
            try:
                code, ended = process.wait(rng.uniform(0.5, 1) * lasts), True
            except subprocess.TimeoutExpired:
                process.send_signal(number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(LIMIT)
                process.kill()
                code = process.wait()
                ended = code not in (-number, 128 + number)
            codes.append(code)
        same, left = result(folder) == expected, leftovers(folder / "out")
        bad = code or not same or left
        problem = f"codes {codes}, same result: {same}, left over: {left}" if bad else ""
        return code, (folder / "said").read_text().splitlines(), problem

    return attempt


ATTACKS = {"media": media, "configs": configs, "data": data, "kills": kills}


def attack(name, numbers, seed, show):
    """Tries cases, and prints those that did not hold -> (tried, held, refused, seconds)."""
    began, held, refused = time.monotonic(), 0, 0
    with tempfile.TemporaryDirectory() as top:
        base, folder = Path(top) / "base", Path(top) / "case"
        base.mkdir()
        attempt = ATTACKS[name](base)
        for number in numbers:
            (folder / "in").mkdir(parents=True)
            code, lines, problem = attempt(folder, random.Random(f"{name} {seed} {number}"))
            shutil.rmtree(folder)
            held, refused = held + (not problem), refused + (code == 2)
            if problem:
                print(f"{name} --seed {seed} --only {number}: {problem}", flush=True)
            if show:
                print(*lines, sep="\n")
    return len(numbers), held, refused, time.monotonic() - began


def main(arguments=None):
    """Prints a table -> 0, or 1 if a case did not hold."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = edit.Parser(prog="attack.py", description=__doc__, formatter_class=raw)
    parser.add_argument("attacks", nargs="+", choices=ATTACKS)
    number = edit.number(int, 0, 10**9)
    parser.add_argument("--count", type=number, default=200, help="cases of each (default: 200)")
    parser.add_argument("--seed", type=number, default=0, help="of the damage (default: 0)")
    parser.add_argument("--only", type=number, metavar="NUMBER", help="try this case alone")
    args = parser.parse_args(arguments)
    rows = []
    for name in args.attacks:
        numbers = range(-(-args.count // 20) if name == "kills" else args.count)
        show = args.only is not None
        rows.append((name, *attack(name, [args.only] if show else numbers, args.seed, show)))
    print(f"{'attack':8}{'tried':>7}{'held':>7}{'refused':>9}{'seconds':>9}")
    for name, tried, held, refused, seconds in rows:
        print(f"{name:8}{tried:7}{held:7}{refused:9}{seconds:9.0f}")
    return int(any(tried > held for _, tried, held, _, _ in rows))


if __name__ == "__main__":
    sys.exit(main())
