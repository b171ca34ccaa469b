"""Edits an image or a video from the terminal: media in, instruction, media out.

    python edit.py photo.jpg "make it night" -o night.jpg
    python edit.py clip.mp4 "put this hat on the dog" --ref hat.png -o hat.mp4 --steps 30 --seed 1
    torchrun --nproc-per-node 4 edit.py clip.mp4 "make it night" -o night.mp4   # the DiT on four GPUs

Whether the input is an image or a clip is told by its content, not by its name. The result has its size, number of
frames, frame rate and sound, and lies on it pixel for pixel; it appears under its name only when it is whole.
stdout gets the names of the files written, stderr all else: progress, remarks, time and memory of each phase.

PIL reads images and animations, ffmpeg all other clips. `read_frames`, `write_image` and `write_clip` stand alone:
train.py reads its data with them. torch and the models are imported late, inside `load`, so that a mistyped option or
a broken file is reported at once and not after seconds of imports.
"""

import argparse
import contextlib
import itertools
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError
from tqdm import tqdm

# What is opened at all. PIL and ffmpeg know more formats, of no use here or unsafe: playlists that name other files,
# text shown as video, PostScript that is run. Of the animated ones, several images make a clip; in a TIFF or in a
# phone's JPEG they do not.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
ANIMATED_FORMATS = ("PNG", "WEBP", "GIF")
CLIP_FORMATS = "mov,matroska,avi,mpegts,mpeg,mpegvideo,m4v,flv,ogg,asf,mxf,dv,h264,hevc,ivf,nut,yuv4mpegpipe"

# What is written. The number of threads is fixed because x264 and VP9 code differently with another one.
JPEG, H264 = {"quality": 95, "subsampling": 0}, "-c:v libx264 -preset medium -crf 16 -threads 4"
IMAGE_OPTIONS = {".png": {}, ".jpg": JPEG, ".jpeg": JPEG, ".webp": {"quality": 95}, ".gif": {}}
CLIP_OPTIONS = {
    ".mp4": f"{H264} -movflags +faststart -f mp4", ".mov": f"{H264} -movflags +faststart -f mov",
    ".mkv": f"{H264} -f matroska", ".webm": "-c:v libvpx-vp9 -crf 18 -b:v 0 -cpu-used 3 -threads 4 -f webm",
    ".gif": "-f gif", ".webp": "-c:v libwebp_anim -quality 95 -loop 0 -f webp", ".png": "-f apng -plays 0",
}
SILENT = (".gif", ".webp", ".png")
# Between RGB and YUV ffmpeg is quick by default, and darkens a clip by a level each time.
EXACT = "bicubic+accurate_rnd+full_chroma_int"
MATRICES = {"bt709": "bt709", "smpte170m": "smpte170m", "bt470bg": "bt470", "bt2020nc": "bt2020"}  # as `scale` has them

LEADS = os.environ.get("RANK", "0") == "0"     # under torchrun one process writes and speaks for all
SMALLEST, LARGEST, LARGEST_AREA = 16, 8192, 4096 * 4096             # pixels
WEBP_SIDE = 16383                                                   # the most that the format can say
MOST_NARROW = 200                                                   # the MLLM takes sides of less than 200 to 1

# PIL warns of 89 million pixels and refuses twice as many. The refusal is enough.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class MediaError(ValueError):
    """A file that cannot be read as an image or a clip; the message names it."""


@dataclass
class Media:
    """A file that was read: its pixels, and what it takes to write a result that is like it."""

    path: Path
    frames: np.ndarray                  # uint8 (T, H, W, 3); T = 1 for an image
    fps: Fraction | None = None         # frames per second; None for an image
    total: int = 1                      # frames in the file, of which `frames` may be the first few
    steady: bool = True                 # False: the frame rate varies, `fps` is its average
    alpha: np.ndarray | None = None     # uint8 (H, W), of an image
    profile: dict = field(default_factory=dict)  # icc_profile and exif of an image, as PIL's save takes them
    sound: bool = False
    delay: float = 0.0                  # seconds from the start of the file to the first frame
    colors: tuple = ()                  # matrix, primaries and transfer of a clip that says so, in ffmpeg's words
    aspect: str | None = None           # width to height of a pixel of a clip, such as "5:4", where it is not 1:1

    @property
    def is_video(self):
        return self.fps is not None


def read_frames(path, limit=None, size=None, check=None):
    """Reads an image, a clip, or a folder of images as a clip (16 fps, in the order of their names) -> Media.

    Args:
        limit: at most so many frames are decoded. None for all.
        size: (width, height) to which every frame is scaled. None for its own.
        check: called as check(path, width, height) before much is decoded; it may raise MediaError.

    Images are turned as EXIF says, laid on white where transparent, and made 8-bit RGB. Clips are turned as they say.
    Raises FileNotFoundError, or MediaError for anything else than a whole image or clip.
    """
    path, check = Path(path), check or (lambda path, width, height: None)
    if path.is_dir():
        return read_folder(path, limit, size, check)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file" if path.exists() else f"{path} does not exist")
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            check(path, *(size or image.size))
            if image.format in ANIMATED_FORMATS and image.n_frames > 1:
                return read_animation(path, image, limit, size)
            return read_picture(path, image, size)
    except UnidentifiedImageError:
        return read_clip(path, limit, size, check)
    except Image.DecompressionBombError:
        most = 2 * Image.MAX_IMAGE_PIXELS / 1e6
        raise MediaError(f"{path} has more than {most:.0f} million pixels; make it smaller before") from None
    except MediaError:
        raise
    except Exception as error:          # each of PIL's decoders fails in its own way
        raise MediaError(f"{path} cannot be read, or is a damaged or truncated image ({error})") from None


def read_folder(path, limit, size, check):
    """The images of a folder, which must be of one size, as a clip of 16 frames per second."""
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_OPTIONS)
    frames, shapes = [], set()
    for file in files[:limit]:
        frame = read_frames(file, 1, check=lambda path, *own: check(path, *(size or own))).frames[0]
        shapes.add(frame.shape)
        frames.append(fit(frame, size))
    if len(shapes) != 1:
        raise MediaError(f"{path} is not a folder of images of one size")
    return Media(path, np.stack(frames), fps=Fraction(16), total=len(files))


def read_picture(path, image, size):
    """A PIL image -> Media of one frame, with its transparency, profile and EXIF."""
    # The profile goes along only where the result still has the same kind of colors.
    keep = image.format != "TIFF" and image.mode in ("RGB", "RGBA", "P")
    image = ImageOps.exif_transpose(image)
    profile = {"icc_profile": image.info.get("icc_profile"), "exif": image.getexif().tobytes()} if keep else {}
    frame, alpha = pixels(image)
    return Media(path, fit(frame, size)[None], alpha=None if alpha is None else fit(alpha, size),
                 profile={name: value for name, value in profile.items() if value})


def read_animation(path, image, limit, size):
    """An animated PNG, WebP or GIF -> Media; each frame laid on white."""
    frames, durations = [], []
    for frame in itertools.islice(ImageSequence.Iterator(image), limit):
        frames.append(fit(pixels(frame)[0], size))
        durations.append(frame.info.get("duration") or 100)         # ms; browsers too show 0 as 100
    fps = Fraction(1000 * len(frames) / sum(durations)).limit_denominator(1001)
    steady = max(durations) - min(durations) <= 10                  # GIF counts in steps of 10 ms
    return Media(path, np.stack(frames), fps, image.n_frames, steady)


def pixels(image):
    """A PIL image of any mode -> uint8 (H, W, 3), and its alpha (H, W) or None. What is transparent lies on white."""
    if image.mode == "F":
        raise ValueError("floating point pixels; 8 or 16 bits can be read")
    if image.mode.startswith("I"):      # 16 bits of grey, which PIL would clip at 255 rather than scale
        image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
    if not image.has_transparency_data:
        return np.asarray(image.convert("RGB")), None
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    return np.asarray(white.convert("RGB")), np.asarray(image.getchannel("A"))


def fit(array, size):
    """Scales uint8 (H, W) or (H, W, 3) to (width, height); None leaves it as it is."""
    if size is None or array.shape[1::-1] == size:
        return array
    return np.asarray(Image.fromarray(array).resize(size, Image.Resampling.LANCZOS))


def read_clip(path, limit, size, check):
    """Whatever ffmpeg reads -> Media, with the exact frame rate and what the sound and the colors need."""
    with path.open("rb") as file:
        start = file.read(12)
    if start[4:8] == b"ftyp" and start[8:11] in (b"hei", b"hev", b"mif", b"avi"):
        # ffmpeg would open it, and show one tile of it.
        raise MediaError(f"{path} is a HEIC or AVIF photo; convert it to JPEG or PNG")
    header, stamps, tick = list_frames(path)
    frames = []
    with contextlib.closing(decode(path, limit)) as decoded:        # closing: ffmpeg ends with whatever ends this loop
        for frame in decoded:
            check(path, *(size or frame.shape[1::-1]))
            frames.append(fit(frame, size))
    if not frames:
        raise MediaError(f"{path} has no frame that can be decoded")
    shown = re.search(r"Video: .*?([\d.]+) fps", header)
    fps, steady = frame_rate(stamps[:len(frames) + 1], tick, float(shown[1]) if shown else 25.0)
    found = re.search(rf"Video: [^,]+, \w+\((?:[^)]*, )?({'|'.join(MATRICES)})(?:/(\w+)/(\w+))?", header)
    colors = tuple(name or found[1] for name in found.groups()) if found else ()
    pixel = re.search(r"Video: .*SAR (\d+:\d+) DAR", header)
    aspect = pixel[1] if pixel and not size and pixel[1] != "1:1" else None
    return Media(path, np.stack(frames), fps, max(len(stamps), len(frames)), steady, sound="Audio: " in header,
                 delay=max(0.0, float(stamps[0] * tick)), colors=colors, aspect=aspect)


def ffmpeg(path, *options):
    """The command that reads the first picture track of `path` (capital V: a song's cover is none) to stdout."""
    return [get_ffmpeg_exe(), "-hide_banner", "-nostdin", "-nostats", "-format_whitelist", CLIP_FORMATS,
            "-i", os.path.abspath(path), "-map", "0:V:0", *options, "-"]


def list_frames(path):
    """What ffmpeg says of a clip, the time stamps of all its frames, sorted, and their unit in s. Decodes nothing."""
    run = subprocess.run(ffmpeg(path, "-c", "copy", "-f", "framecrc"), capture_output=True, text=True, errors="replace")
    rows = [line.split(",") for line in run.stdout.splitlines() if line and line[0] != "#"]
    tick = re.search(r"#tb 0: (\d+/\d+)", run.stdout)
    if re.search("partial file|ended prematurely", run.stderr):
        raise MediaError(f"{path} is truncated: its end is missing")
    if run.returncode or not rows or not tick:
        raise MediaError(f"{path} is neither an image nor a video that can be read, or it is damaged")
    column = 2 if all(abs(int(row[2])) < 2**62 for row in rows) else 1  # AVI tells only the order of decoding
    return run.stderr.partition("Output #0")[0], sorted(int(row[column]) for row in rows), Fraction(tick[1])


def frame_rate(stamps, tick, shown):
    """(exact frames per second, whether all frames keep to it). `shown`: as ffmpeg prints it, with two decimals.

    Time stamps are rounded to ticks, in Matroska to 1 ms, so they alone do not tell 29.97 from 30000/1001. A usual
    rate that is printed alike and agrees with every time stamp is taken for the true one.
    """
    usual = (Fraction(round(shown)), Fraction(1000 * round(shown * 1.001), 1001))
    rates = [rate for rate in usual if rate and abs(rate - shown) < 0.0051]
    if span := (stamps[-1] - stamps[0]) * tick:
        rates.append(((len(stamps) - 1) / span).limit_denominator(100_000))
    for rate in rates:
        if all(abs((stamp - stamps[0]) * tick - i / rate) <= tick for i, stamp in enumerate(stamps)):
            return rate, True
    return (rates[-1], False) if rates else (Fraction(25), True)


def decode(path, limit):
    """Yields the frames of a clip, uint8 (H, W, 3). As PPM, because each of its frames says how large it is."""
    options = ["-fps_mode", "passthrough", "-sws_flags", EXACT, "-pix_fmt", "rgb24", "-c:v", "ppm", "-f", "image2pipe"]
    command = ffmpeg(path, *options, *(["-frames:v", str(limit)] if limit else []))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        while process.stdout.readline() == b"P6\n":
            width, height = map(int, process.stdout.readline().split())
            process.stdout.readline()                               # the largest value, 255
            data = process.stdout.read(width * height * 3)
            if len(data) == width * height * 3:
                yield np.frombuffer(data, np.uint8).reshape(height, width, 3)
    finally:
        process.kill()
        process.communicate()


def unfinished(path):
    """The name that a file has until it is whole: hidden, beside it, of this process alone."""
    return path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")


@contextlib.contextmanager
def whole(path):
    """A temporary path beside `path`, which takes its name when all went well and is removed otherwise."""
    partial = unfinished(path)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_image(path, frame, source=None):
    """Writes uint8 (H, W, 3) as the extension says. `source`: the Media whose alpha, ICC profile and EXIF go along."""
    path, kind = Path(path), Path(path).suffix.lower()
    image, options = Image.fromarray(frame), dict(IMAGE_OPTIONS[kind])
    if source is not None and kind != ".gif":
        options |= source.profile
    if source is not None and source.alpha is not None and kind in (".png", ".webp"):
        # The model saw the picture on white. Taking the white out again leaves no bright rim on other grounds.
        alpha = source.alpha[..., None] / 255
        color = np.where(alpha, (frame - 255 * (1 - alpha)) / np.maximum(alpha, 1 / 255), frame)
        image = Image.fromarray(np.dstack([color.round().clip(0, 255).astype(np.uint8), source.alpha]))
    with whole(path) as partial:
        image.save(partial, **options)


def write_clip(path, frames, fps, source=None):
    """Writes uint8 (T, H, W, 3) at `fps` as the extension says; `source` and errors as of `clip_writer`."""
    with clip_writer(path, frames.shape, fps, source) as write:
        for frame in frames:
            write(frame)


@contextlib.contextmanager
def clip_writer(path, shape, fps, source=None):
    """A clip of `shape` (T, H, W, 3) at `fps` (Fraction or number), kind as the extension says: gives `write(frame)`.

    `source`: the Media whose sound and kind of colors go along. Sound is copied where the format takes it, else coded
    anew; it is cut where the frames are only the first of the source. Raises OSError if ffmpeg fails.
    """
    path, kind = Path(path), Path(path).suffix.lower()
    source = source or Media(path, np.empty(shape, np.uint8))
    with whole(path) as partial, tempfile.TemporaryFile() as log:
        command = encoder(partial, kind, shape, Fraction(fps), source, sound_codec(source, kind))
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=log)
        try:
            with contextlib.suppress(BrokenPipeError), process.stdin:   # broken: it gave up, and its log says why
                yield lambda frame: process.stdin.write(np.ascontiguousarray(frame))
            failed = process.wait()
        finally:
            process.kill()                                          # no effect unless the above was cut short
            process.wait()
        if failed:
            log.seek(0)
            lines = log.read().decode(errors="replace").strip().splitlines()
            raise OSError(f"{path} could not be written: {(lines or [f'ffmpeg ended with {failed}'])[-1]}")


def sound_codec(source, kind):
    """"copy" where the format takes the sound of `source` as it is, the name of a codec where not, None for silence."""
    if not source.sound or kind in SILENT:
        return None
    with tempfile.NamedTemporaryFile(suffix=kind) as trial:         # formats refuse a codec when they are opened
        command = [get_ffmpeg_exe(), "-v", "error", "-nostdin", "-y", "-i", os.path.abspath(source.path), "-map", "0:a",
                   "-c", "copy", "-t", "1", trial.name]
        copied = subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0
    return "copy" if copied else "libopus" if kind == ".webm" else "aac"


def encoder(path, kind, shape, fps, source, sound):
    """The command that reads raw frames from stdin and writes `path`. `sound`: codec, "copy", or None for silence."""
    length, height, width = shape[:3]
    fps = fps.limit_denominator(100_000)
    inputs = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-framerate", str(fps), "-i", "-"]
    if sound:
        cut = ["-t", str(float(length / fps) + source.delay)] if source.total > length else []
        inputs += [*cut, "-itsoffset", str(-source.delay), "-i", os.path.abspath(source.path)]
        inputs += ["-map", "0:v", "-map", "1:a", "-c:a", sound]
    filters = {".gif": "split[a][b];[a]palettegen[p];[b][p]paletteuse", ".webp": "null", ".png": "null"}.get(kind)
    if not filters:
        # Half the resolution for colors takes even sides. Colors go back by the formula that they came by.
        layout = "yuv444p" if height % 2 or width % 2 else "yuv420p"
        filters = f"scale=flags={EXACT},format={layout}"
        if source.colors:
            matrix, primaries, transfer = source.colors
            filters = (f"scale=flags={EXACT}:out_color_matrix={MATRICES[matrix]},format={layout},"
                       f"setparams=colorspace={matrix}:color_primaries={primaries}:color_trc={transfer}")
        if source.aspect:
            filters += f",setsar={source.aspect.replace(':', '/')}"
    # bitexact leaves out version numbers and random ids: the same frames make the same file.
    return [get_ffmpeg_exe(), "-v", "error", "-y", *inputs, "-vf", filters, "-r", str(fps),
            "-map_metadata", "-1", "-map_chapters", "-1", "-fflags", "+bitexact", "-flags:v", "+bitexact",
            *CLIP_OPTIONS[kind].split(), os.path.abspath(path)]


class Phases:
    """Times each phase of an edit, measures its peak memory, and shows how far it is. Called as InstructX.edit does."""

    def __init__(self):
        self.rows, self.phase, self.device = [], None, "cpu"
        self.steps = []                 # seconds of each step of "denoise"; the first has the compilation, if any

    def __call__(self, phase, done, total):
        if phase != self.phase:
            self.end()
            self.phase, self.start = phase, time.perf_counter()
            silent = None if LEADS else True                        # None: unless it is on a terminal
            self.bar = tqdm(desc=f"{phase:10}", total=total, leave=False, disable=silent)
        self.bar.update(done - self.bar.n)
        if phase == "denoise" and done:
            self.steps.append(time.perf_counter() - self.start - sum(self.steps))

    def end(self):
        """Closes the current phase, if there is one."""
        if self.phase:
            peak = self.peak_memory()                               # first, since on a GPU it waits for pending work
            self.bar.close()
            self.rows.append((self.phase, time.perf_counter() - self.start, peak))
        self.phase = None

    def peak_memory(self):
        """Bytes at the most since the last call: GPU memory on CUDA, else the memory of this process."""
        if self.device.startswith("cuda"):
            import torch
            torch.cuda.synchronize(self.device)
            peak = torch.cuda.max_memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            return peak
        try:                                                        # Linux lets a process reset its high-water mark
            peak = int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
            Path("/proc/self/clear_refs").write_text("5")
            return peak
        except OSError:                                             # elsewhere it is the highest so far
            import resource
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def table(self):
        _, seconds, peaks = zip(*self.rows)
        rows = [*self.rows, ("total", sum(seconds), max(peaks))]
        first, later = sum(self.steps[:1]), statistics.median(self.steps[1:] or [0])
        remarks = {"denoise": f"   first step {first:.2f} s, then {later:.2f} s each"} if later else {}
        lines = [f"{phase:10} {seconds:9.1f} {peak / 1e9:9.2f}{remarks.get(phase, '')}" for phase, seconds, peak in rows]
        return "\n".join([f"{'phase':10} {'seconds':>9} {'peak GB':>9}", *lines])


class Parser(argparse.ArgumentParser):
    """argparse, but for what it says of a mistake."""

    def error(self, message):
        """One line and no more: the usage that argparse prints before it hides what is wrong."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def number(kind, least, most):
    """A type for argparse: a number within bounds, which NaN never is."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            name = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {name} from {least} to {most}")
        return value
    return parse


def width_by_height(text):
    """A type for argparse: "832x480" -> (832, 480)."""
    if not (found := re.fullmatch(r"(\d+)x(\d+)", text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 832x480")
    return int(found[1]), int(found[2])


EPILOG = f"""\
Formats: {' '.join(IMAGE_OPTIONS)} for an image; {' '.join(CLIP_OPTIONS)} for a clip (.png is APNG, lossless).
Sides of {SMALLEST} to {LARGEST} pixels, {LARGEST_AREA / 1e6:.1f} million in all. The model sees a transparent image
on white; .png and .webp keep its transparency. A clip whose frame rate varies is written at the average, so it lasts
as long. A clip with an odd side keeps it, as H.264 4:4:4, which not every player shows."""


def parser():
    """The command line. Every default is told in --help."""
    made = Parser(prog="edit.py", formatter_class=argparse.RawDescriptionHelpFormatter, epilog=EPILOG,
                  description=__doc__.split("\n\nPIL reads")[0])
    add, configured = made.add_argument, "(default: as the weights' config.json says; {} as released)".format
    add("input", metavar="INPUT", type=Path, help="an image or a video")
    add("instruction", metavar="INSTRUCTION", help='what to do, for example "make it night"')
    add("-o", "--output", type=Path, required=True, help="the file to write; its extension says the format")
    add("--ref", type=Path, action="append", default=[], metavar="IMAGE", help="reference image; may be repeated")
    add("--weights", type=Path, default=Path(__file__).resolve().parent / "weights" / "shapes", metavar="DIR",
        help="weights folder (default: weights/shapes beside edit.py)")
    add("--steps", type=number(int, 1, 1000), metavar="N", help=f"of the sampler {configured(50)}")
    add("--guidance", type=number(float, 1, 100), metavar="G",
        help=f"how strongly the instruction is followed; 1 takes half the time {configured(5)}")
    add("--shift", type=number(float, 0.1, 100), metavar="S",
        help=f"of the noise levels; more puts more steps where there is much noise {configured(5)}")
    add("--solver", choices=("unipc", "euler"), default="unipc", help="of the sampler (default: unipc)")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, metavar="N",
        help="of the noise; on a CPU the same seed makes the same file (default: 0)")
    add("--size", type=width_by_height, metavar="WxH", help="scale the input to this size first (default: its own)")
    add("--frames", type=number(int, 1, 10**6), default=81, metavar="N",
        help="of a clip that is longer, edit the first N frames (default: 81)")
    add("--compare", action="store_true",
        help="also write source and result side by side, to OUTPUT's name with _compare added")
    add("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one, else cpu)")
    add("--dtype", choices=("float32", "bfloat16"),
        help="of all models but the VAE (default: bfloat16 on CUDA, else float32)")
    add("--compile", action="store_true", help="compile the DiT's blocks: the first step takes longer, all others less")
    add("--offload", action="store_true", help="leave MLLM and DiT in their files and read each block when it is its turn: "
        "the same result in a small part of the memory")
    add("--tile", type=number(int, 64, LARGEST), metavar="PIXELS", help="let the VAE work on overlapping squares of this "
        "side: less memory for large pictures, and a result that differs a little")
    add("--quantize", choices=("int8", "float8_e4m3fn"), help="round the DiT's large matrices: half the memory of bfloat16, "
        "and a result that differs a little")
    return made


def note(text):
    """One line on stderr, of what a user should know and nothing is wrong with."""
    if LEADS:
        print(f"edit.py: {text}", file=sys.stderr)


def check_size(path, width, height):
    """Raises MediaError for a size that cannot be edited."""
    short, long = sorted((width, height))
    if short < SMALLEST or long >= MOST_NARROW * short:
        raise MediaError(f"{path} at {width}x{height} is too small or too narrow: sides must have {SMALLEST} pixels or "
                         f"more, the longer less than {MOST_NARROW} times the shorter; --size WxH scales the input")
    if long > LARGEST or width * height > LARGEST_AREA:
        scale = min(LARGEST / long, (LARGEST_AREA / (width * height)) ** 0.5)
        raise MediaError(f"{path} at {width}x{height} is too large: at most {LARGEST} pixels a side and {LARGEST_AREA} "
                         f"in all; --size {int(width * scale)}x{int(height * scale)} scales the input")


def check_arguments(args):
    """Raises ValueError for what no reading is needed to see: better now than after the work."""
    output, folder, known = args.output, args.output.parent, {**IMAGE_OPTIONS, **CLIP_OPTIONS}
    outputs = [output, compared(output)] if args.compare else [output]
    taken = next((path for path in outputs if path.is_dir()), None)
    lost = next((path for path in outputs for given in (args.input, *args.ref)
                 if path.exists() and given.exists() and path.samefile(given)), None)
    for wrong, problem in (
            (not args.instruction.strip(), "the instruction is empty; say what to do"),
            (args.input.is_dir(), f"{args.input} is a folder; name an image or a video"),
            (not args.weights.is_dir(), f"--weights {args.weights}: there is no such folder"),
            (output.suffix.lower() not in known, f"{output} has no known extension; known are {' '.join(known)}"),
            (not folder.is_dir(), f"there is no folder {folder} to write {output.name} to"),
            (taken, f"{taken} is a folder; name a file"),
            (lost, f"{lost} is an input, which would be lost; name another file")):
        if wrong:
            raise ValueError(problem)
    for path in outputs:
        try:
            unfinished(path).touch()
            unfinished(path).unlink()
        except OSError as error:
            raise ValueError(f"{path} cannot be written ({error.strerror})") from None


def compared(output):
    """Where --compare writes."""
    return output.with_stem(f"{output.stem}_compare")


def read_inputs(args):
    """Media of the source, and [uint8 (H, W, 3)] of the references. Says what is unusual about them."""
    source, kind = read_frames(args.input, args.frames, args.size, check_size), args.output.suffix.lower()
    what, kinds = ("a clip", CLIP_OPTIONS) if source.is_video else ("an image", IMAGE_OPTIONS)
    if kind not in kinds:
        raise ValueError(f"{args.input} is {what}, which {kind} cannot hold; {' '.join(kinds)} can")
    if args.compare and kind == ".webp" and (width := 2 * source.frames.shape[2]) > WEBP_SIDE:
        raise ValueError(f"--compare would be {width} pixels wide, and .webp holds {WEBP_SIDE}; .png holds more")
    references = [read_frames(path, 1, None, check_size) for path in args.ref]
    for path, reference in zip(args.ref, references):
        if reference.is_video:
            raise ValueError(f"--ref {path} is a clip or a folder; a reference is an image")
    if len(source.frames) < min(source.total, args.frames):
        note(f"{args.input} has {source.total} frames, of which {len(source.frames)} can be decoded")
    elif source.total > len(source.frames):
        note(f"{args.input} has {source.total} frames; the first {len(source.frames)} are edited (see --frames)")
    if not source.steady:
        note(f"{args.input} has a varying frame rate; written at its average of {float(source.fps):.2f} per second")
    if source.sound and kind in SILENT:
        note(f"{kind} holds no sound; that of {args.input} is left out")
    return source, [reference.frames[0] for reference in references]


def load(args):
    """(model, device). Raises ValueError for a device that is not there, and what InstructX.from_pretrained raises."""
    import torch                        # here and not at the top: seconds, which a mistyped option should not cost

    from connector import InstructX
    device = args.device or (f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
    dtype = args.dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:    # torch has no one error for this
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--device {device} is not available ({reason}); cpu always is") from None
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    group = None
    if "RANK" in os.environ:            # torchrun started this process among others
        torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        group = torch.distributed.group.WORLD
    quantize = args.quantize and getattr(torch, args.quantize)
    model = InstructX.from_pretrained(args.weights, device, getattr(torch, dtype), None, args.offload, quantize, group)
    model.vae.tile = args.tile
    if not model.trained:
        note(f"warning: {args.weights} holds no instructx/, so queries and connector are random: the result will not "
             "follow the instruction")
    if args.compile:
        model.dit.compile_blocks()
    return model, device


def edit(args):
    """Reads, edits and writes -> the files written."""
    check_arguments(args)
    source, references = read_inputs(args)
    phases = Phases()
    phases("load", 0, 1)
    model, phases.device = load(args)
    outputs = [args.output, compared(args.output)][:1 + args.compare] if LEADS else []
    length, height, width, _ = source.frames.shape
    with contextlib.ExitStack() as opened:
        if source.is_video:
            writers = [opened.enter_context(clip_writer(path, (length, height, width * times), source.fps, source))
                       for times, path in enumerate(outputs, 1)]
        else:                           # alpha, profile and EXIF go along with the result, not with the comparison
            writers = [partial(write_image, path, source=media) for path, media in zip(outputs, (source, None))]
        before = iter(source.frames)

        def write(piece):
            for frame in piece:
                for put, pictures in zip(writers, ([frame], [next(before), frame])):
                    put(np.concatenate(pictures, axis=1))

        model.edit(source.frames, args.instruction, references, args.steps, args.guidance, args.shift, args.seed,
                   float(source.fps or 16), args.solver, phases, write)
    phases.end()
    if LEADS:
        print(phases.table(), file=sys.stderr)
    if "RANK" in os.environ:
        import torch.distributed
        torch.distributed.barrier()     # one that left while another still talks to it would be taken down with an error
        torch.distributed.destroy_process_group()
    return outputs


def main(argv=None):
    """Edits what the command line names, and prints the files written. Ends with code 2 after one line of what is wrong,
    130 after Ctrl-C."""
    command_line = parser()
    args = command_line.parse_args(argv)
    try:
        for path in edit(args):
            print(path)
    except (ValueError, OSError) as error:
        command_line.error(str(error))
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):  # torch has no one error for this either
            raise
        command_line.error("out of memory; a smaller --size or fewer --frames need less")
    except KeyboardInterrupt:
        command_line.exit(130, "edit.py: interrupted\n")


if __name__ == "__main__":
    main()
