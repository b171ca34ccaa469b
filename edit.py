"""Edits an image or a clip from the terminal: media in, instruction, media out.

    python edit.py photo.jpg "turn the scene into night"  # writes photo-edited.jpg
    python edit.py clip.mp4 "put this hat on the dog" --ref hat.png -o hat.mp4 --steps 30
    python edit.py photos/*.jpg "turn the scene into night" -o night/
    python edit.py --batch edits.jsonl -o results/  # {"source": "a.mp4", "instruction": "..."}

The file's content decides between image and clip, not its extension. The result keeps the input's
size, frame count, times and sound, aligned pixel for pixel, and takes its name once complete.
stdout gets the names of the files written; stderr gets progress, remarks, seconds and memory.

PIL reads images and animations; PyAV reads clips, and writes clips and animations. train.py reads
media and rows by this file too. torch and the models are imported late, inside `load`, so that a
mistyped option is reported at once.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback

import argparse
import contextlib
import csv
import functools
import io
import itertools
import json
import logging
import math
import os
import platform
import re
import shutil
import sys
import time
import warnings
import zlib
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import ColorRange
from PIL import Image, ImageCms, ImageOps, ImageSequence, UnidentifiedImageError
from tqdm import tqdm

# Only these are opened. PIL and FFmpeg know more formats, of no use here or unsafe: playlists that
# name other files, text shown as video, PostScript that is run. Of the animated ones several images
# make a clip; in a TIFF or in a phone's JPEG they are something else.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
ANIMATED_FORMATS = ("PNG", "WEBP", "GIF")
CLIP_FORMATS = (
    "mov,matroska,avi,mpegts,mpeg,mpegvideo,m4v,flv,ogg,asf,mxf,dv,h264,hevc,ivf,nut,yuv4mpegpipe"
)
PHOTO_BRANDS = (b"hei", b"hev", b"mif", b"avi", b"crx")  # HEIC, AVIF, CR3
NEW_SUBFILE_TYPE, DNG_VERSION = 254, 50706  # tags of a TIFF
# Description, camera, software, date, author, copyright, EXIF, GPS; a TIFF's other tags are about
# where in the file its pixels are.
TIFF_TAGS = {0x010E, 0x010F, 0x0110, 0x0131, 0x0132, 0x013B, 0x8298, 0x8769, 0x8825}

# What is written, by extension. For images: arguments of PIL's save.
JPEG = {"format": "JPEG", "quality": 95, "subsampling": 0}
IMAGE_OPTIONS = {
    ".png": {"format": "PNG"},
    ".jpg": JPEG,
    ".jpeg": JPEG,
    ".webp": {"format": "WEBP", "quality": 95},
    ".gif": {"format": "GIF"},
}
# For clips: FFmpeg's container, codec, pixel format, and options of the codec.
# x264's mbtree reads memory that nobody wrote: the same frames would become other bytes.
H264 = ("libx264", "yuv420p", {"preset": "medium", "crf": "15", "x264-params": "mbtree=0"})
VP9 = {"crf": "18", "b": "0", "cpu-used": "3"}
CLIP_OPTIONS = {
    ".mp4": ("mp4", *H264),
    ".mov": ("mov", *H264),
    ".mkv": ("matroska", *H264),
    ".webm": ("webm", "libvpx-vp9", "yuv420p", VP9),
    ".gif": ("gif", "gif", "pal8", {}),
    ".webp": ("webp", "libwebp_anim", "bgra", {"quality": "95"}),
    ".png": ("apng", "apng", "rgb24", {}),
}
ANIMATIONS = (".gif", ".webp", ".png")
TRANSPARENT_CLIP_OPTIONS = {
    ".mov": ("mov", "prores_ks", "yuva444p10le", {"profile": "4444"}),
    ".webm": ("webm", "libvpx-vp9", "yuva420p", VP9),
    ".gif": CLIP_OPTIONS[".gif"],
    ".webp": CLIP_OPTIONS[".webp"],
    ".png": ("apng", "apng", "rgba", {}),
}
THREADS = 4  # fixed, because x264 and VP9 code differently with another number
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own ignore transparency

# Colors of a clip are code points of ITU-T H.273: matrix, primaries, transfer.
BT709, BT601 = (1, 1, 1), (6, 2, 2)
UNKNOWN, BT2020, FULL_RANGE = 2, 9, 2
MATRICES = {1: "bt709", 4: "fcc", 5: "bt470", 6: "smpte170m", 7: "smpte240m", 9: "bt2020"}
# Between RGB and YUV FFmpeg is quick by default, and darkens a clip by a level each time.
EXACT = "flags=bicubic+accurate_rnd+full_chroma_int"

LONGEST = 3600  # seconds of a frame; more is a damaged time stamp, for which MP4 has no room
LEAD_IN = 0.1  # seconds of sound that are kept before the first frame, since decoders need them
TECHNICAL_TITLES = {"encoder", "major_brand", "minor_version", "compatible_brands", "duration"}
SMALLEST = 16  # pixels a side
LARGEST = 8191  # pixels a side
LARGEST_WEBP = 16383  # pixels a side that the format has room for
LARGEST_AREA = 4096 * 4096
MOST_NARROW = 200  # the MLLM takes sides of less than 200 to 1
REPORT_EVERY = 10  # seconds, where stderr is no terminal
STDIN = Path("-")
DEFAULT_WEIGHTS = Path(__file__).resolve().parent / "weights" / "shapes"

# PIL warns of damaged EXIF, which is left out, and of large pictures. Its refusals are enough.
warnings.filterwarnings("ignore", module="PIL")
logging.getLogger("PIL").setLevel(logging.CRITICAL)


class MediaError(ValueError):
    """A file that cannot be read as an image or a clip; the message names it."""


@dataclass
class Media:
    """A file that was read: its pixels, and what it takes to write a result that is like it."""

    path: Path
    frames: np.ndarray  # uint8 (T, H, W, 3); T = 1 for an image
    length: int = 1  # T, or more if only the first few were to be kept
    fps: Fraction | None = None  # frames per second, or their average; None for an image
    total: int = 1  # frames in the file
    times: tuple = ()  # where the rate varies: seconds from frame 0 to each frame and to the end
    alpha: np.ndarray | None = None  # uint8 (T, H, W)
    profile: dict = field(default_factory=dict)  # icc_profile and exif of an image, for PIL's save
    loop: int = 0  # how often an animation plays; 0: for ever
    start: Fraction | None = None  # of a clip: seconds into the file at which frame 0 is shown
    sound: bool = False
    colors: tuple = ()  # matrix, primaries and transfer of a clip that names them
    aspect: Fraction | None = None  # width to height of a pixel, where it is not 1
    remarks: list = field(default_factory=list)  # what the owner of the file should know

    @property
    def is_video(self):
        return self.fps is not None


# Images in


def unless_opaque(alphas):
    """[uint8 (H, W)] -> (T, H, W), or None where nothing is transparent."""
    opaque = all(alpha.min() == 255 for alpha in alphas)
    return None if opaque else np.stack(alphas)


def to_srgb(image, icc):
    """Converts a PIL image by its color profile, unless that is damaged or of other colors."""
    image = image.convert("RGBA") if image.mode == "P" else image
    mode = "RGBA" if image.mode == "RGBA" else "RGB"
    intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        srgb = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, profile, srgb, intent, outputMode=mode)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image


def pixels(image, size=None, icc=None):
    """A PIL image -> uint8 (H, W, 3), laid on white where transparent, and alpha, uint8 (H, W).

    Args:
        size: (width, height) to which it is scaled. None for its own.
        icc: the color profile from which it is converted to sRGB.
    """
    if image.mode == "F":
        raise ValueError("floating point pixels; 8 or 16 bits can be read")
    if image.mode.startswith("I"):  # 16 bits of grey, which PIL would clip at 255
        grey = (np.asarray(image) / 257).round().clip(0, 255)
        image = Image.fromarray(grey.astype(np.uint8))
    if icc:
        image = to_srgb(image, icc)
    image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    image = image.resize(size or image.size, Image.Resampling.LANCZOS)
    if image.mode == "RGB":
        return np.asarray(image), np.broadcast_to(np.uint8(255), image.size[::-1])
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    return np.asarray(white.convert("RGB")), np.asarray(image.getchannel("A"))


def frame_count(image):
    """The number of frames of an open PIL image; 1 for a format that is never animated."""
    return image.n_frames if image.format in ANIMATED_FORMATS else 1


def is_preview(path, image):
    """Whether only a preview or a tile of a photo would be opened. Most camera raws are TIFFs."""
    with path.open("rb") as file:
        head = file.read(12)
    if image and image.format == "TIFF":
        tags = image.tag_v2
        return tags.get(NEW_SUBFILE_TYPE, 0) & 1 or DNG_VERSION in tags or head[8:10] == b"CR"
    return head[4:8] == b"ftyp" and head[8:11] in PHOTO_BRANDS


@contextlib.contextmanager
def open_image(path):
    """Gives the PIL image at `path`, None for what may be a clip. Errors inside are MediaErrors."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    image = None
    try:
        with contextlib.suppress(UnidentifiedImageError):
            image = Image.open(path, formats=IMAGE_FORMATS)
        with image or contextlib.nullcontext():
            if is_preview(path, image):
                photo = "a camera raw, HEIC or AVIF photo"
                raise MediaError(f"{path} is {photo}; convert it to JPEG, PNG or TIFF first")
            yield image
    except Exception as error:  # each decoder fails in its own way
        # PyAV has its own MemoryError, for sizes that a damaged file claims.
        no_memory = isinstance(error, MemoryError) and not isinstance(error, av.FFmpegError)
        if no_memory or isinstance(error, MediaError):
            raise
        raise MediaError(f"{path} cannot be read, or is damaged or truncated ({error})") from None


def read_image(path, image, size):
    """A PIL image -> Media of one frame, with its transparency, color profile and EXIF."""
    profile = {}
    ImageOps.exif_transpose(image, in_place=True)
    with contextlib.suppress(Exception):  # damaged EXIF is left out
        exif = image.getexif()
        for tag in set(exif) - TIFF_TAGS if image.format == "TIFF" else ():
            del exif[tag]
        if len(exif):
            profile["exif"] = exif.tobytes()
    icc = image.info.get("icc_profile") or b""
    if icc[16:20] == b"RGB ":  # CMYK and grey become sRGB, as the result is RGB
        profile["icc_profile"], icc = icc, None
    frame, alpha = pixels(image, size, icc)
    return Media(path, frame[None], alpha=unless_opaque([alpha]), profile=profile)


def animation_frames(image, size):
    """Yields (seconds, frame, alpha) of an animation; frame and alpha as `pixels` gives them."""
    icc = image.info.get("icc_profile")
    for picture in ImageSequence.Iterator(image):
        picture.load()  # before, WebP tells no duration
        milliseconds = picture.info.get("duration") or 100  # browsers too show 0 as 100
        yield Fraction(milliseconds) / 1000, *pixels(picture, size, icc)


def read_animation(path, image, limit, size, kept):
    """An animated PNG, WebP or GIF -> Media."""
    frames, alphas, durations = [], [], []
    for duration, frame, alpha in itertools.islice(animation_frames(image, size), limit):
        durations.append(duration)
        alphas.append(alpha)
        if kept is None or len(frames) < kept:
            frames.append(frame)
    times, length = (0, *itertools.accumulate(durations)), len(durations)
    fps = (length / times[-1]).limit_denominator(1001)
    if max(durations) - min(durations) <= Fraction(1, 100):  # GIF counts in hundredths of a second
        times = ()
    loop = image.info.get("loop", 1)  # a GIF without it plays once
    alpha, frames = unless_opaque(alphas), np.stack(frames)
    return Media(path, frames, length, fps, image.n_frames, times, alpha, loop=loop)


# Clips in


class SeekableFile(io.BufferedReader):
    """A file in which seeking to where nothing can be tells FFmpeg -1; PyAV prints exceptions."""

    def seek(self, offset, whence=os.SEEK_SET):
        try:
            return super().seek(offset, whence)
        except (OSError, ValueError):
            return -1


@contextlib.contextmanager
def open_clip(path):
    """Gives (container, its picture track). FFmpeg gets an open file and can open no other one."""
    options = {"format_whitelist": CLIP_FORMATS, "protocol_whitelist": "none"}
    cover = Disposition.attached_pic | Disposition.timed_thumbnails
    error = MediaError(f"{path} is neither an image nor a video that can be read, or it is damaged")
    with SeekableFile(path.open("rb", buffering=0)) as file:
        try:
            container = av.open(file, container_options=options, metadata_errors="replace")
        except av.FFmpegError:
            raise error from None
        with container:
            tracks = [track for track in container.streams.video if not track.disposition & cover]
            if not tracks or not tracks[0].codec_context:
                raise error
            yield container, tracks[0]


@functools.lru_cache(maxsize=16)  # `media_shape` and `read_frames` ask one after the other
def count_frames(path, file_size, changed):
    """How many frames a clip shows. Decodes nothing; raises MediaError if its end is missing.

    `changed` is there for the cache alone: another time, another file.
    """
    total, end, size, has_key_frame = 0, 0.0, 0, False
    with open_clip(path) as (container, track):
        for packet in container.demux():
            size += max(1, packet.size)
            if size > 2 * file_size + 1_000_000:
                raise MediaError(f"{path} is damaged: it claims more frames than it has bytes for")
            if not packet.size:
                continue
            if packet.pts is not None:
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream.index == track.index:
                has_key_frame = has_key_frame or packet.is_keyframe  # a recording starts anywhere
                total += has_key_frame and not packet.is_discard  # edit lists hide frames
        declared = (container.duration or 0) / av.time_base
        if container.format.name.startswith(("mov", "matroska")) and end < 0.98 * declared - 0.2:
            raise MediaError(f"{path} is truncated: it ends after {end:.1f} of {declared:.1f} s")
    return total


def decode(container, track):
    """Yields the frames of a clip, av.VideoFrame. Like players it skips what cannot be decoded."""
    decoder, failures = track.codec_context, 0
    decoder.thread_type = "SLICE"  # whole frames in threads would be lost beside a damaged one
    metadata = {name.lower(): value for name, value in track.metadata.items()}
    if metadata.get("alpha_mode") == "1" and decoder.name in ALPHA_DECODERS:
        decoder = av.CodecContext.create(ALPHA_DECODERS[decoder.name], "r")
    for packet in container.demux(track):
        if not packet.size and packet.dts is not None:
            continue  # an empty packet; only one without a time stamp ends the clip
        try:
            yield from decoder.decode(packet)
        except av.FFmpegError:
            failures += 1
            if failures > 1000:  # no clip but an attack
                raise


def turn_of(display_matrix):
    """How a clip's display matrix turns and mirrors it -> (sides are swapped, y step, x step)."""
    if display_matrix is None:
        return False, 1, 1
    # Pixel (x, y) is shown at (ax + cy, bx + dy).
    a, b, _, c, d = np.frombuffer(bytes(display_matrix), np.int32)[:5].tolist()
    lies = abs(b) > abs(a)
    right, down = (c, b) if lies else (a, d)
    return lies, -1 if down < 0 else 1, -1 if right < 0 else 1


def default_colors(width, height):
    """What players take a clip for that names no colors: BT.709 if it is larger than a DVD."""
    return BT709 if width > 1024 or height > 576 else BT601


def clip_colors(picture, track, remarks):
    """(matrix, primaries, transfer) of a clip; () where it names none, or is RGB."""
    context = track.codec_context
    matrix, primaries, transfer = context.colorspace, context.color_primaries, context.color_trc
    if picture.format.is_rgb or {matrix, primaries, transfer} <= {0, UNKNOWN}:
        return ()
    if matrix not in MATRICES:
        if matrix not in (0, UNKNOWN):
            remarks.append(f"has colors (matrix {matrix} of H.273) that are not converted exactly")
        default = default_colors(picture.width, picture.height)[0]
        matrix = BT2020 if primaries == BT2020 else default
    return matrix, primaries, transfer


def filter_graph(width, height, layout, interlaced, tick, scale, new_layout):
    """FFmpeg's filters from one pixel format to another. PyAV's `reformat` would shift chroma."""
    graph = av.filter.Graph()
    nodes = [graph.add_buffer(width=width, height=height, format=layout, time_base=tick)]
    if interlaced:
        nodes.append(graph.add("bwdif", "mode=send_frame"))
    nodes += [graph.add("scale", scale), graph.add("format", f"pix_fmts={new_layout}")]
    graph.link_nodes(*nodes, graph.add("buffersink")).configure()
    return graph


def pulled(graph, picture):
    """Gives a filter graph a frame, or None at the end, and yields what it has ready."""
    graph.push(picture)
    with contextlib.suppress(av.BlockingIOError, av.EOFError):
        while True:
            yield graph.pull()


def to_rgb(pictures, layout, media):
    """Yields frames as RGB or RGBA; from the first interlaced one on they are deinterlaced."""
    graph = buffer = None
    interlaced = False
    for picture in pictures:
        if picture.interlaced_frame and not interlaced:
            interlaced = True
            media.remarks.append("is interlaced; the result is not")
        previous, buffer = buffer, (picture.width, picture.height, picture.format.name, interlaced)
        if buffer != previous:  # seldom after the first
            yield from pulled(graph, None) if graph else ()
            scale = EXACT
            if not picture.format.is_rgb:
                matrix = (media.colors or default_colors(picture.width, picture.height))[0]
                limits = "full" if picture.color_range == FULL_RANGE else "auto"
                scale += f":in_color_matrix={MATRICES[matrix]}:in_range={limits}"
            graph = filter_graph(*buffer, picture.time_base, scale, layout)
        yield from pulled(graph, picture)
    yield from pulled(graph, None)


def clip_frames(container, track, media, size):
    """Yields (time, duration, frame, alpha) of a clip, in seconds and as `pixels` gives them.

    `media` gets what the first frame says of all: colors, aspect, remarks.
    """
    pictures = decode(container, track)
    first = next(pictures, None)
    if first is None:
        raise MediaError(f"{media.path} has no frame that can be decoded")
    components = first.format.components
    lies, down, right = turn_of(first.side_data.get("DISPLAYMATRIX"))
    aspect = (not size and track.sample_aspect_ratio) or Fraction(1)
    if aspect != 1:
        media.aspect = 1 / aspect if lies else aspect
    media.colors = clip_colors(first, track, media.remarks)
    transparent = first.format.has_palette or any(channel.is_alpha for channel in components)
    bits = max(channel.bits for channel in components)
    if bits > 8:
        media.remarks.append(f"has {bits} bits per color, as HDR has; the result has 8")
    layout = "rgba" if transparent else "rgb24"
    for picture in to_rgb(itertools.chain([first], pictures), layout, media):
        stamp = None if picture.pts is None else picture.pts * picture.time_base
        lasts = (picture.duration or 0) * picture.time_base
        array = picture.to_ndarray()
        array = (array.swapaxes(0, 1) if lies else array)[::down, ::right]
        frame, alpha = pixels(Image.fromarray(array), size)
        size = frame.shape[1::-1]
        yield stamp, lasts, frame, alpha


def frame_rate(stamps, count, lasts, track):
    """The rate of a clip -> (frames per second, ()), or (their average, times) where it varies.

    A stated rate that agrees with every time stamp is taken for the true one: Matroska rounds
    stamps to 1 ms, and does not tell 29.97 from 30000/1001.

    Args:
        stamps: seconds of the `count` frames, perhaps of one more; [] where there are none.
        lasts: seconds that the last of them is shown, or 0.
    """
    stated = track.guessed_rate or track.average_rate or Fraction(25)
    usual = [Fraction(round(stated)), Fraction(1000 * round(float(stated) * 1.001), 1001)]
    rates = [rate for rate in usual if rate and abs(rate - stated) < 0.0051]
    rates += [stated, track.average_rate or stated]
    in_order = len(stamps) >= count > 1 and stamps == sorted(set(stamps))  # AVI has none to show
    gaps = (later - earlier for earlier, later in itertools.pairwise(stamps))
    if not in_order or max(gaps) > LONGEST:
        return rates[0], ()
    times = [stamp - stamps[0] for stamp in stamps]
    rates.append(((len(times) - 1) / times[-1]).limit_denominator(100_000))
    for rate in rates:
        if all(abs(time - i / rate) <= track.time_base for i, time in enumerate(times)):
            return rate, ()
    if len(times) == count:
        times.append(times[-1] + (lasts or times[-1] / (count - 1)))
    return (count / times[-1]).limit_denominator(100_000), tuple(times)


def read_clip(path, limit=None, size=None, kept=None):
    """A clip -> Media."""
    media, frames, alphas, stamps = Media(path, None), [], [], []
    status = path.stat()
    total = count_frames(path, status.st_size, status.st_mtime_ns)
    with open_clip(path) as (container, track):
        for stamp, lasts, frame, alpha in clip_frames(container, track, media, size):
            if stamp is not None:
                stamps.append(stamp)
            if len(alphas) == limit:  # one more frame tells how long the last one is shown
                break
            alphas.append(alpha)
            if kept is None or len(frames) < kept:
                frames.append(frame)
        media.sound, media.length = len(container.streams.audio) > 0, len(alphas)
        media.fps, media.times = frame_rate(stamps, media.length, lasts, track)
    media.frames, media.alpha = np.stack(frames), unless_opaque(alphas)
    media.total, media.start = max(total, media.length), min(stamps, default=Fraction(0))
    return media


# Media in: images, clips and folders


def frame_files(path):
    """The images of a folder, frame_2.png before frame_10.png, without hidden ones."""

    def by_numbers(file):
        pieces = re.split(r"(\d+)", file.name)
        return [int(piece) if piece.isdecimal() else piece for piece in pieces]

    files = [file for file in path.glob("[!.]*") if file.suffix.lower() in IMAGE_OPTIONS]
    if not files:
        raise MediaError(f"{path} is a folder without images")
    return sorted(files, key=by_numbers)


def holds_clip(path):
    """Whether `read_frames` takes a path for a clip, by headers. Raises its errors."""
    if path.is_dir():
        return bool(frame_files(path))
    with open_image(path) as image:
        if image is None:
            with open_clip(path):
                return True
        return frame_count(image) > 1


def media_shape(path):
    """(T, H, W) of what `read_frames` reads, by headers if possible. Raises its errors."""
    path = Path(path)
    if path.is_dir():
        files = frame_files(path)
        return len(files), *media_shape(files[0])[1:]
    with open_image(path) as image:
        if image is None:
            clip = read_clip(path, 1)
            return clip.total, *clip.frames.shape[1:3]
        length = frame_count(image)
        # A PNG's EXIF counts only before its pixels, so that none need be decoded.
        lies = length == 1 and Image.Image.getexif(image).get(0x0112) in (5, 6, 7, 8)
        lies = lies and image.format != "TIFF"  # of which PIL tells the turned size
        return length, *(image.size if lies else image.size[::-1])


def read_folder(path, limit, size, kept):
    """The images of a folder, which must be of one size, as a clip of 16 frames per second."""
    files = frame_files(path)
    total, files = len(files), files[:limit]
    if len({media_shape(file)[1:] for file in files}) != 1:
        raise MediaError(f"{path} is not a folder of images of one size")
    frames = [read_frames(file, 1, size).frames[0] for file in files[:kept]]
    return Media(path, np.stack(frames), len(files), fps=Fraction(16), total=total)


def read_frames(path, limit=None, size=None, kept=None):
    """Reads an image, a clip, or a folder of images as a clip (16 fps, in the order of numbers).

    Args:
        limit: at most so many frames are decoded. None for all.
        size: (width, height) to which every frame is scaled. None for its own.
        kept: of a clip, only so many frames are returned; `each_frame` gives all of them.

    Returns: Media. Frames are turned as the file says, and laid on white where transparent.
    Raises FileNotFoundError, or MediaError for anything else than a whole image or clip.
    """
    path = Path(path)
    if path.is_dir():
        return read_folder(path, limit, size, kept)
    with open_image(path) as image:
        if image is None:
            return read_clip(path, limit, size, kept)
        if frame_count(image) > 1:
            return read_animation(path, image, limit, size, kept)
        return read_image(path, image, size)


def each_frame(path, size=None):
    """Yields the frames of a clip, uint8 (H, W, 3), one by one. `path` is a Path.

    `size` and errors as for `read_frames`.
    """
    if path.is_dir():
        yield from (read_frames(file, 1, size).frames[0] for file in frame_files(path))
        return
    with open_image(path) as image:
        if image is None:
            with open_clip(path) as (container, track):
                pictures = clip_frames(container, track, Media(path, None), size)
                yield from (frame for _, _, frame, _ in pictures)
        else:
            yield from (frame for _, frame, _ in animation_frames(image, size))


# Media out


@contextlib.contextmanager
def whole(path):
    """Gives a temporary path beside `path`, which takes its name if all goes well.

    The file gets the permissions of a new file, whatever writes it. A link is followed.
    """
    target = Path(os.path.realpath(path))
    name = zlib.crc32(os.fsencode(target.name))  # short, whatever the name
    unfinished = target.with_name(f".{name:08x}-{platform.node()}-{os.getpid()}.partial")
    try:
        try:
            unfinished.touch()
        except OSError as error:
            raise OSError(f"{path} cannot be written ({error.strerror})") from None
        mode = unfinished.stat().st_mode
        yield unfinished
        unfinished.chmod(mode)
        os.replace(unfinished, target)
    finally:
        with contextlib.suppress(OSError):  # where nothing could be written
            unfinished.unlink()


@functools.cache  # once per folder: with thousands of results each look takes a while
def sweep(folder):
    """Removes what killed processes of this machine left unfinished."""
    leftovers = folder.glob(f".????????-{platform.node()}-*.partial")
    for file in leftovers if os.name == "posix" else ():  # elsewhere asking ends the process
        try:
            os.kill(int(file.stem.rpartition("-")[2]), 0)  # asks only
        except ProcessLookupError:
            file.unlink(missing_ok=True)
        except (OSError, ValueError):
            continue


def without_white(frame, alpha):
    """Frame (H, W, 3), alpha (H, W) -> (H, W, 4). White around what was edited would be a rim."""
    share = alpha[..., None] / 255
    color = np.where(share, (frame - 255 * (1 - share)) / np.maximum(share, 1 / 255), frame)
    return np.dstack([color.round().clip(0, 255).astype(np.uint8), alpha])


def alpha_for(suffix, source, note):
    """The transparency of a Media as a format takes it: uint8 (T, H, W), or None."""
    if source.alpha is not None and suffix not in TRANSPARENT_CLIP_OPTIONS:
        note(f"{suffix} cannot be transparent here; the result lies on white")
        return None
    if source.alpha is not None and suffix == ".gif":  # which has no half transparent pixels
        return np.where(source.alpha < 128, np.uint8(0), np.uint8(255))
    return source.alpha


@contextlib.contextmanager
def image_writer(path, source=None, note=lambda text: None):
    """Gives write(frame) for an image, as the extension says; arguments as for `clip_writer`."""
    suffix, source = Path(path).suffix.lower(), source or Media(path, None)
    options = IMAGE_OPTIONS[suffix] | source.profile  # of which PIL writes nothing to a GIF
    try:
        Image.new("RGB", (1, 1)).save(io.BytesIO(), **options)
    except Exception:  # a JPEG has room for 64 KB
        note(f"{suffix} has no room for the EXIF of {source.path}, which is left out")
        options.pop("exif", None)
    alphas = alpha_for(suffix, source, note)
    with whole(path) as unfinished:

        def write(frame):
            if alphas is not None:
                frame = without_white(frame, alphas[0])
            image = Image.fromarray(frame)
            if suffix == ".gif" and "icc_profile" in source.profile:
                image = to_srgb(image, source.profile["icc_profile"])
            image.save(unfinished, **options)

        yield write


@contextlib.contextmanager
def closing(container):
    """Gives a container and closes it. After an error, one that closing adds is of no interest."""
    try:
        yield container
    except BaseException:
        with contextlib.suppress(av.FFmpegError):  # FFmpeg cannot end a GIF without frames
            container.close()
        raise
    container.close()


def schedule(suffix, length, fps, times):
    """When frames are shown -> (tick in seconds, [ticks of each frame and of the end]).

    A GIF counts in hundredths of a second, and browsers play one of them as ten. So it shows at
    most 50 frames per second, and those that would share a time are left out.
    """
    times = times[: length + 1] or [i / fps for i in range(length + 1)]
    gaps = {later - earlier for earlier, later in itertools.pairwise(times)}
    if suffix == ".gif":
        tick = Fraction(1, 50 if min(gaps) < Fraction(1, 50) else 100)
    else:
        tick = min(gaps) if len(gaps) == 1 else Fraction(1, 90_000)
    stamps = [round(time / tick) for time in times]
    return tick, [*stamps[:-1], max(stamps[-1], stamps[-2] + 1)]


def muxer_options(suffix, loop, lasts):
    """FFmpeg's options for a container; an animation plays `loop` times, its end `lasts` seconds.

    WebP cannot say how long its last frame lasts: it is the average of the others.
    """
    if suffix == ".png":
        return {"plays": str(loop), "final_delay": str(lasts.limit_denominator(1000))}
    if suffix == ".gif":  # whose -1 is once, and which has two bytes for hundredths of a second
        delay = min(round(100 * lasts), 65535)
        return {"loop": str(-1 if loop == 1 else loop), "final_delay": str(delay)}
    if suffix == ".webp":
        return {"loop": str(loop)}
    return {"max_interleave_delta": "0", "movflags": "faststart"}  # sound waits for later pictures


def add_pictures(container, options, shape, fps, tick, source):
    """Adds the picture track of a clip and opens its encoder -> the track."""
    _, codec, layout, settings = options
    height, width = shape[1:3]
    settings = settings | {"flags": "+bitexact+frame_duration"}
    if codec == "libx264" and source.times:
        settings["bf"] = "0"  # B-frames come earlier, and take others' durations along
    if codec == "libx264" and (width % 2 or height % 2):
        layout = "yuv444p"  # colors at half the resolution take even sides
    track = container.add_stream(codec, fps, settings, width=width, height=height, pix_fmt=layout)
    context = track.codec_context
    context.time_base, context.thread_count = tick, THREADS
    if layout.startswith("yuv"):
        colors = source.colors or default_colors(width, height)
        context.colorspace, context.color_primaries, context.color_trc = colors
        context.color_range = ColorRange.MPEG
    if source.aspect:
        context.sample_aspect_ratio = source.aspect
    context.open()
    return track


def encoder_graph(encoder, layout, tick):
    """The filters that make frames what an encoder takes. A GIF gets one palette for all."""
    size = encoder.width, encoder.height
    if encoder.pix_fmt != "pal8":
        scale = EXACT
        if encoder.colorspace in MATRICES:
            scale += f":out_color_matrix={MATRICES[encoder.colorspace]}:out_range=limited"
        return filter_graph(*size, layout, False, tick, scale, encoder.pix_fmt)
    graph = av.filter.Graph()
    buffer = graph.add_buffer(width=size[0], height=size[1], format=layout, time_base=tick)
    split, palette, paint = map(graph.add, ("split", "palettegen", "paletteuse"))
    graph.link_nodes(buffer, split, paint, graph.add("buffersink"))
    split.link_to(palette, 1, 0)
    palette.link_to(paint, 0, 1)
    graph.configure()
    return graph


def carry(container, source, codecs, end):
    """Adds tracks of a clip, with what they hold until `end` seconds after frame 0.

    codecs: {index of a track: None to copy it, or the codec by which its sound is coded anew}
    """
    with open_clip(source.path) as (original, _):
        tracks, added = [original.streams[index] for index in codecs], {}
        for track in tracks:
            if codecs[track.index]:
                sound = {"layout": "stereo", "bit_rate": 192_000, "options": {"flags": "+bitexact"}}
                new = container.add_stream(codecs[track.index], 48_000, **sound)
            else:
                new = container.add_stream_from_template(track)
            new.disposition = track.disposition.value  # default, forced, commentary ...
            for name in {"language", "title"} & set(track.metadata):
                new.metadata[name] = track.metadata[name]
            added[track.index] = new

        def encode_sound(track, packet):  # None empties the decoder
            with contextlib.suppress(av.InvalidDataError):  # a damaged packet is passed over
                for frame in track.decode(packet):
                    if frame.pts is not None:  # the last of WMA has none: it follows on
                        frame.pts -= round(source.start / frame.time_base)
                    container.mux(added[track.index].encode(frame))

        ended = set()
        for packet in original.demux(tracks):
            if not packet.size:
                continue
            track = packet.stream
            packet.pts = packet.dts if packet.pts is None else packet.pts
            seconds = float(packet.pts * packet.time_base - source.start)
            lasts = float((packet.duration or 0) * packet.time_base)
            if seconds >= end:
                ended.add(track.index)
                if len(ended) == len(tracks):  # what follows in a long film is not read
                    break
            elif seconds + lasts < -LEAD_IN:
                continue
            elif codecs[track.index]:
                encode_sound(track, packet)
            else:
                shift = round(source.start / packet.time_base)
                packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
                packet.stream = added[track.index]
                container.mux(packet)
        for track in tracks:
            if codecs[track.index]:
                encode_sound(track, None)
                container.mux(added[track.index].encode(None))


def fits(format_name, source, codecs, end):
    """Whether a format takes tracks: they are written to memory."""
    try:
        with av.open(io.BytesIO(), "w", format_name) as trial:
            carry(trial, source, codecs, end)
            trial.start_encoding()
        return True
    except Exception:  # muxers, decoders and encoders refuse in their own ways
        return False


def add_other_tracks(container, source, end, note):
    """Adds sound, subtitles and titles of a clip, up to `end` seconds, but no chapters."""
    sound_codec = "libopus" if container.format.name == "webm" else "aac"
    ways = {"audio": (None, sound_codec), "subtitle": (None,)}  # None copies
    codecs, left_out = {}, []
    with open_clip(source.path) as (original, pictures):
        for title, text in original.metadata.items():
            if title.lower() not in TECHNICAL_TITLES:
                container.metadata[title] = text
        if original.chapters():
            left_out.append("chapters")
        for track in original.streams:
            if track.index == pictures.index or track.type == "data":
                continue
            for codec in ways.get(track.type, ()):
                if fits(container.format.name, source, {track.index: codec}, end):
                    codecs[track.index] = codec
                    break
            else:
                name = track.codec_context.name if track.codec_context else "unknown codec"
                left_out.append(f"{track.type} track {track.index} ({name})")
    if codecs:
        carry(container, source, codecs, end)
    if left_out:
        note(f"{source.path}: left out of the result: {', '.join(left_out)}")


@contextlib.contextmanager
def clip_writer(path, shape, fps, source=None, note=lambda text: None):
    """Gives write(frame) for a clip of `shape` (T, H, W, 3) at `fps`, as the extension says.

    What can fail fails before: the encoder is open, and sound and header are written. Sound and
    subtitles are copied where the format takes them; else sound is coded anew, in stereo. They are
    cut where the frames are only the first of the source.

    Args:
        source: the Media whose times, colors, transparency, tracks and titles go along.
        note: called with one line on what cannot go along.

    Raises OSError if the file cannot be written.
    """
    suffix, source, length = Path(path).suffix.lower(), source or Media(path, None), shape[0]
    alphas = alpha_for(suffix, source, note)
    transparent = alphas is not None
    options = (TRANSPARENT_CLIP_OPTIONS if transparent else CLIP_OPTIONS)[suffix]
    fps = Fraction(fps).limit_denominator(100_000)
    tick, stamps = schedule(suffix, length, fps, source.times)
    if source.aspect and (suffix in ANIMATIONS or suffix == ".webm"):  # PyAV cannot say it
        note(f"{suffix} is written with square pixels; those of {source.path} are not")
    if len(set(stamps)) <= length:
        note(f"{suffix} shows at most 50 frames per second; some are left out to keep the speed")
    muxing = muxer_options(suffix, source.loop, (stamps[-1] - stamps[-2]) * tick)
    opening = {"format": options[0], "container_options": muxing}
    try:
        with whole(path) as file, closing(av.open(str(file), "w", **opening)) as container:
            container.flags |= av.container.Flags.bitexact.value  # no version, no random ids
            track = add_pictures(container, options, shape, fps, tick, source)
            if suffix not in ANIMATIONS and source.start is not None:
                end = float(stamps[-1] * tick) if source.total > length else math.inf
                add_other_tracks(container, source, end, note)
            elif source.sound:
                note(f"{suffix} holds no sound; that of {source.path} is left out")
            container.start_encoding()
            layout = "rgba" if transparent else "rgb24"
            graph = encoder_graph(track.codec_context, layout, tick)
            numbers = itertools.count()

            def write(frame):
                i = next(numbers)
                if stamps[i] == stamps[i - 1]:  # left out: see `schedule`
                    return
                frame = without_white(frame, alphas[i]) if transparent else frame
                picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), layout)
                picture.pts, picture.time_base = stamps[i], tick
                picture.duration = stamps[i + 1] - stamps[i]
                for ready in pulled(graph, picture):
                    container.mux(track.encode(ready))

            yield write
            for ready in (*pulled(graph, None), None):
                container.mux(track.encode(ready))
    except av.FFmpegError as error:
        raise OSError(f"{path} could not be written: {error.strerror}") from None


def write_clip(path, frames, fps, source=None):
    """Writes uint8 (T, H, W, 3); arguments and errors as for `clip_writer`."""
    with clip_writer(path, frames.shape, fps, source) as write:
        for frame in frames:
            write(frame)


# Rows: edits in a file, for --batch and for train.py


def read_json_lines(stream):
    """See `read_lines`."""
    for i, line in enumerate(stream, 1):
        line = line.strip("\ufeff \t\r\n")
        if line:
            yield i, line


def read_csv(stream):
    """See `read_lines`."""
    reader = csv.DictReader(stream, strict=True)  # an open quote would swallow edits
    missing = {"src_video", "tgt_video", "prompt"}.difference(reader.fieldnames or ())
    if missing:
        raise ValueError(f"no column {', '.join(sorted(missing))}")
    for row in reader:
        references = [row["ref_image"]] if row.get("ref_image") else []
        edit = {"source": row["src_video"], "target": row["tgt_video"], "references": references}
        yield reader.line_num, json.dumps(edit | {"instruction": row["prompt"]})


def read_lines(file):
    """Yields (line number, JSON) for each edit of JSON lines, or of a CSV in Kiwi-Edit's format.

    Raises ValueError, with the file's name, where nothing can be read any more.
    """
    with file.open("rb") as stream:
        encoding = json.detect_encoding(stream.read(4))  # of UTF-8, -16 and -32
    is_csv = file.suffix.lower() == ".csv"
    newline = "" if is_csv else "\n"  # other line ends may stand in a JSON string
    try:
        # Bytes that are no text become surrogates, so that only their own line is broken.
        with file.open(encoding=encoding, errors="surrogateescape", newline=newline) as stream:
            yield from (read_csv if is_csv else read_json_lines)(stream)
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{file}: {error}") from None


def read_row(line, folder, files=("source",)):
    """One edit of JSON -> its object, in which `files` and references are paths from `folder`.

    Raises ValueError for anything else than texts in the places of paths and instruction.
    """
    try:
        row = dict(json.loads(line))
        references = row.get("references") or []
        paths = [*(row[name] for name in files), *references]
        are_paths = all(isinstance(path, str) and path for path in paths)
        if not are_paths or not isinstance(references, list):
            raise TypeError("a path is empty or no text, or references are no list")
        if not isinstance(row["instruction"], str):
            raise TypeError("the instruction is no text")
        for text in (row["instruction"], *paths):
            text.encode()  # raises for bytes that were no text
        if "\0" in "".join(paths):
            raise ValueError("no path holds a zero byte")
    except Exception as error:  # JSON can be nested too deep, too
        names = ", ".join(files)
        raise ValueError(f"not an edit with {names} and instruction ({error!r})") from None
    row |= {name: folder / row[name] for name in files}
    return row | {"references": [folder / path for path in references]}


# The terminal


def say(text, stream):
    """Prints a line; if nobody takes it (`| head`, a full disk), the work goes on without."""
    try:
        tqdm.write(str(text), file=stream)  # above the bars, if there are any
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def note(text):
    """A remark on stderr; not an error."""
    say(f"edit.py: {' '.join(text.split())}", sys.stderr)


note_once = functools.cache(note)


signals = []  # that should have ended this process


def end_after_signals():
    """Ends the process if a signal came: C code may swallow the handler's SystemExit."""
    if signals:
        sys.exit(128 + signals[0])


def is_out_of_memory(error):
    """Whether an error is Python's or torch's for too little memory."""
    words = "out of memory|not enough memory|allocate memory|ALLOC_FAILED"
    by_torch = isinstance(error, RuntimeError) and re.search(words, str(error))
    return isinstance(error, MemoryError) or bool(by_torch)


def explain(error):
    """What is wrong, and what would be right, in words; None for a fault of the program."""
    end_after_signals()
    if is_out_of_memory(error):
        return "out of memory; a smaller --area, fewer --frames, --offload or --tile need less"
    return str(error) if isinstance(error, (ValueError, OSError, FloatingPointError)) else None


def wait_for(device):
    """Returns once a CUDA device has done what it was given."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)


def peak_memory(device):
    """Bytes: the peak of a CUDA device since the last call, else of the process so far."""
    if device.startswith("cuda"):
        import torch

        wait_for(device)
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    if os.name != "posix":
        return 0
    import resource  # which Windows has not

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Phases:
    """Shows progress; measures seconds and peak memory of phases. InstructX.edit calls it."""

    def __init__(self):
        self.phase, self.device = None, "cpu"
        self.rows = {}  # phase: (seconds, peak in bytes, remark)

    def __call__(self, phase, done, total):
        end_after_signals()
        if phase != self.phase:
            self.end()
            self.phase, self.start = phase, time.perf_counter()
            self.reported = self.start
            # disable=None: shown on a terminal only
            self.bar = tqdm(desc=f"{phase:10}", total=total, leave=False, disable=None)
        if done == 1:
            wait_for(self.device)
            self.first = time.perf_counter() - self.start  # the first step, with any compilation
        now, self.done = time.perf_counter(), done
        self.bar.update(done - self.bar.n)
        if self.bar.disable and now - self.reported > REPORT_EVERY:
            self.reported = now
            note(f"{phase} {done} of {total} after {now - self.start:.0f} s")

    def end(self):
        """Closes the current phase, if there is one."""
        end_after_signals()
        if self.phase:
            peak = peak_memory(self.device)  # first, since on a GPU it waits for pending work
            self.bar.close()
            seconds, remark = time.perf_counter() - self.start, ""
            if self.phase == "denoise" and self.done > 1:
                each = (seconds - self.first) / (self.done - 1)
                remark = f"   first step {self.first:.2f} s, then {each:.2f} s each"
            before, highest, _ = self.rows.get(self.phase, (0, 0, ""))  # in an earlier window
            self.rows[self.phase] = before + seconds, max(highest, peak), remark
        self.phase = None

    def table(self):
        """A line of text for each phase: seconds, and the peak of memory."""
        seconds, peaks, _ = zip(*self.rows.values())
        rows = self.rows | {"total": (sum(seconds), max(peaks), "")}
        lines = [f"{'phase':10} {'seconds':>9} {'peak GB':>9}"]
        for phase, (duration, peak, remark) in rows.items():
            lines.append(f"{phase:10} {duration:9.1f} {peak / 1e9:9.2f}{remark}")
        return "\n".join(lines)


class Parser(argparse.ArgumentParser):
    """argparse that reports a mistake in one line: its own usage page hides what is wrong."""

    def error(self, message):
        say(f"{self.prog}: error: {' '.join(message.split())}", sys.stderr)
        self.exit(2)


def number(convert, least, most):
    """A type for argparse: an int or a float within bounds, which NaN never is."""

    def parse(text):
        value = math.nan
        with contextlib.suppress(ValueError):
            value = convert(text)
        if not least <= value <= most:
            name = "a whole number" if convert is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {name} from {least} to {most}")
        return value

    return parse


def pair(sign, kind):
    """A type for argparse: two whole numbers with a sign between them, as in "832x480"."""

    def parse(text):
        match = re.fullmatch(rf"(\d{{1,6}}){sign}(\d{{1,6}})", text)
        if not match:
            raise argparse.ArgumentTypeError(f"{text!r} is not {kind}")
        return int(match[1]), int(match[2])

    return parse


SHARE = "a share such as 0/4, 1/4, 2/4 or 3/4"
USAGE = 'INPUT [INPUT ...] "INSTRUCTION IN QUOTES"'
EPILOG = f"""\
Several edits need -o FOLDER. The model is loaded once. A result that is there is left alone, so
that the same command goes on where it was stopped; delete a result to have it made again. What
fails is named and costs no other edit. FOLDER/settings.json and .made.jsonl hold what the results
were made of; other settings, or another row for a result, are refused. Exit code 0: all are there;
1: some failed. Rows: paths are relative to their file; output is the source's name by default,
references are those of --ref. With - each row is answered by a line of JSON: output, and seconds
if it was made, or error.

Formats: {" ".join(IMAGE_OPTIONS)} for an image; {" ".join(CLIP_OPTIONS)}
for a clip (.png is APNG, lossless). Sides of {SMALLEST} to {LARGEST} pixels, {LARGEST_AREA} in all.
The model sees transparent pictures on white;
{" ".join(TRANSPARENT_CLIP_OPTIONS)} keep their transparency. A clip with an odd side keeps
it, in .mp4, .mov and .mkv as H.264 4:4:4, which not every player shows."""


def interpret(args):
    """Tells inputs and instruction apart, and one edit from many. Raises ValueError."""
    if args.words == ["-"] and not args.batch:
        args.batch, args.words = STDIN, []
    *inputs, args.instruction = args.words or [""]
    args.inputs = [Path(word) for word in inputs]
    if args.batch and args.words:
        raise ValueError(f"there is no use for {args.words[0]}: --batch {args.batch} has all edits")
    if not args.batch and not inputs:
        raise ValueError(f"expected {USAGE}, and the options that --help lists")
    if args.output == "":
        raise ValueError("-o is empty; name a file or a folder")
    is_folder = args.output and (args.output.endswith(("/", os.sep)) or os.path.isdir(args.output))
    args.many = bool(args.batch or len(inputs) > 1 or is_folder)
    args.output = args.output and Path(args.output)
    part, parts = args.shard
    if part >= parts:
        raise ValueError(f"--shard: '{part}/{parts}' is not {SHARE}")
    if parts > 1 and (not args.many or args.batch == STDIN):
        raise ValueError("--shard is for several edits, but not for those of stdin")


def parse(argv):
    """The arguments; --help shows every default. A mistake ends the program or is a ValueError."""
    parser = Parser(
        prog="edit.py",
        usage=f"edit.py {USAGE} [options]\n       edit.py --batch FILE -o FOLDER [options]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__.split("\n\nPIL reads")[0],
        epilog=EPILOG,
    )

    def add(names, metavar, convert, help, **settings):
        parser.add_argument(*names.split(), metavar=metavar, type=convert, help=help, **settings)

    def switch(name, help):
        parser.add_argument(name, action="store_true", help=help)

    configured = "(default: what the weights' config.json says; {} where it says nothing)".format
    help = 'images or videos, and last the instruction, such as "turn the scene into night"'
    add("words", "INPUT", str, help, nargs="*")
    help = "the file to write (default: INPUT's name and -edited), or a folder"
    add("-o --output", "PATH", str, help)
    help = 'edits as lines of JSON, {"source": "a.png", "instruction": "..."}, and if wanted '
    help += '"references": ["b.png"], "output": "c.png", "seed": 1; - is stdin'
    add("--batch", "FILE", Path, help)
    help = "every N-th of several edits: 0/4, 1/4, 2/4 and 3/4 make all"
    add("--shard", "I/N", pair("/", SHARE), help, default=(0, 1))
    add("--ref", "IMAGE", Path, "reference image; may be repeated", action="append", default=[])
    help = "folder with mllm/, dit/ and vae/ (default: weights/shapes)"
    add("--weights", "DIR", Path, help, default=DEFAULT_WEIGHTS)
    help = "instructx/ of train.py's --out, instead of the one in the weights folder"
    add("--instructx", "DIR", Path, help)
    add("--steps", "N", number(int, 1, 1000), f"sampling steps {configured(50)}")
    scale = number(float, 1, 100)
    add("--guidance", "G", scale, f"weight of the instruction; 1 is fastest {configured(5)}")
    add("--seed", "N", number(int, 0, 2**63 - 1), "of the noise (default: 0)", default=0)
    help = "scale the input to this size first (default: its own)"
    add("--size", "WxH", pair("x", "a size such as 832x480"), help)
    help = f"edit larger inputs at this, and scale back {configured('none')}"
    add("--area", "PIXELS", number(int, SMALLEST**2, LARGEST_AREA), help)
    count = number(int, 1, 10**6)
    add("--frames", "N", count, "edit the first N frames of a clip (default: 81)", default=81)
    help = "edit all of a longer clip, in windows of --frames that share N; 1 + a multiple of 4"
    add("--overlap", "N", count, help)
    help = "also write source and result side by side, as PATH with _compare before its extension"
    switch("--compare", help)
    help = "write a strip of six pictures: what the model expects at six of the steps"
    add("--progress", "FILE", Path, help)
    add("--device", "NAME", str, "cpu, cuda, cuda:1, ... (default: cuda if there is one, else cpu)")
    help = "float32 or bfloat16, for all but the VAE (default: bfloat16 on CUDA, else float32)"
    add("--dtype", "TYPE", str, help, choices=("float32", "bfloat16"))
    switch("--compile", "compile the DiT's blocks: a slower first step, faster others")
    switch("--offload", "read each block when it is needed: the same result in far less memory")
    help = "int8: half the memory for the DiT, and a slightly different result"
    add("--quantize", "TYPE", str, help, choices=("int8",))
    help = "let the VAE work on squares of this side: less memory, and a slightly different result"
    add("--tile", "PIXELS", number(int, 64, LARGEST), help)
    args = parser.parse_intermixed_args(argv)
    interpret(args)
    return args


def read_config(folder, name="config.json"):
    """The config of a folder; {} if it is missing or damaged, as loading will report."""
    try:
        config = json.loads((folder / name).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def check_arguments(args):
    """Checks what can be checked before a file is read. Raises ValueError."""
    for path in args.inputs:
        if path.is_dir():
            raise ValueError(f"{path} is a folder; name what is in it, such as {path}/*.jpg")
        if not path.is_file():
            expected = "images or videos come first, and then the instruction in quotes"
            raise ValueError(f"there is no file {path}; {expected}")
    if args.batch not in (None, STDIN) and not args.batch.is_file():
        raise ValueError(f"there is no file {args.batch}; what comes through a pipe: --batch -")
    if args.many and not args.output:
        raise ValueError("several edits need -o FOLDER; the instruction stands in quotes")
    if args.many and not args.output.is_dir():
        if args.output.exists() or args.output.suffix.lower() in {*IMAGE_OPTIONS, *CLIP_OPTIONS}:
            raise ValueError(f"{args.output} is no folder; several edits need one")
    wide = (".png", ".jpg", ".jpeg")  # a WebP has no room for six large pictures
    if args.progress and (args.many or args.progress.suffix.lower() not in wide):
        raise ValueError(f"--progress {args.progress}: name one .png or .jpg, for one edit")
    lengths = args.frames, args.overlap
    if args.overlap and not (args.overlap < args.frames and {n % 4 for n in lengths} == {1}):
        rule = "each is 1 + a multiple of 4, and windows are longer than what they share"
        raise ValueError(f"--overlap {args.overlap} of --frames {args.frames}: {rule}")
    if not args.batch and not args.instruction.strip():
        raise ValueError("the instruction is empty; say what to do")
    if os.path.isfile(args.instruction) or args.instruction.endswith(("/", os.sep)):
        raise ValueError(f"{args.instruction} is a file or a folder; the instruction comes last")
    if not args.weights.is_dir():
        raise ValueError(f"--weights {args.weights}: there is no such folder")
    if args.instructx and not args.instructx.is_dir():
        raise ValueError(f"--instructx {args.instructx}: there is no such folder")
    if read_config(args.weights).get("_class_name") == "InstructX":
        raise ValueError(f"{args.weights} is what train.py wrote: use --instructx {args.weights}")


def trained_area(args):
    """Pixels of the pictures that the weights were trained on; 0 if they do not say."""
    if not args.instructx and read_config(args.weights / "mllm_encoder"):
        return 1280 * 720  # Kiwi-Edit
    area = read_config(args.instructx or args.weights / "instructx").get("area")
    return area if isinstance(area, int) and area > 0 else 0


# One edit


@dataclass
class Job:
    """One edit that is asked for. All that several edits share is in the arguments."""

    source: Path
    instruction: str
    references: list  # of paths
    seed: int
    output: Path | None = None  # None: the source tells the name

    def row(self):
        """What decides the result, as JSON gives it back."""
        paths = [str(path.resolve()) for path in (self.source, *self.references)]
        words = {"source": paths[0], "instruction": self.instruction, "references": paths[1:]}
        return words | {"seed": self.seed}


def working_size(width, height, area):
    """The size at which a picture is edited: its own, or inside `area` pixels if it is larger.

    Its sides are then multiples of 32, so that nothing is padded, or of 8 if it is small.
    """
    if not area or width * height <= area:
        return width, height
    scale = math.sqrt(area / (width * height))
    side = 32 if area > 256 * 256 else 8  # pixels; small pictures would be stretched by 32
    width, height = (max(1, int(length * scale / side)) * side for length in (width, height))
    return max(SMALLEST, width), max(SMALLEST, height)


def check_size(path, width, height):
    """Raises MediaError for a size that cannot be edited."""
    short, long = sorted((width, height))
    narrow = long >= MOST_NARROW * short
    if narrow or not SMALLEST <= short <= long <= LARGEST or short * long > LARGEST_AREA:
        raise MediaError(
            f"{path} at {width}x{height} is too small, large or narrow: sides must have {SMALLEST} "
            f"to {LARGEST} pixels, {LARGEST_AREA} in all, the longer less than {MOST_NARROW} times "
            "the shorter; scale it first (--size WxH or --area PIXELS scale the INPUT)"
        )


def read_inputs(args, job):
    """Media of the source, [uint8 (H, W, 3)] of the references. Notes what is unusual."""
    _, height, width = media_shape(job.source)
    check_size(job.source, *working_size(*(args.size or (width, height)), args.area))
    for path in job.references:
        length, height, width = media_shape(path)
        if length > 1 or path.is_dir():
            raise ValueError(f"--ref {path} is a clip or a folder; a reference is an image")
        check_size(path, width, height)
    limits = {"kept": 1} if args.overlap else {"limit": args.frames}
    source = read_frames(job.source, size=args.size, **limits)
    for remark in source.remarks:
        note(f"{job.source} {remark}")
    count, total = source.length, source.total
    if count < min(total, limits.get("limit", total)):
        note(f"{job.source} has {total} frames, of which {count} can be decoded")
    elif count < total:
        note(f"{job.source} has {total} frames; the first {count} are edited (see --overlap)")
    return source, [read_frames(path).frames[0] for path in job.references]


def file_id(path):
    """What all names of a file share; None if there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def files_read(jobs):
    """{file_id} of all that jobs read."""
    return {file_id(path) for job in jobs for path in (job.source, *job.references)} - {None}


def name_outputs(args, job, inputs):
    """The files to write. Raises ValueError for one that cannot be, or that is among `inputs`."""
    source, output, is_clip = job.source, job.output, holds_clip(job.source)
    options = CLIP_OPTIONS if is_clip else IMAGE_OPTIONS
    if not output:
        stem, suffix = (source.stem, source.suffix) if source.is_file() else (source.name, "")
        if suffix.lower() not in options:
            suffix = ".mp4" if is_clip else ".png"
        folder, stem = (args.output, stem) if args.many else (source.parent, f"{stem}-edited")
        output = folder / f"{stem}{suffix}"
    outputs = [output]
    if args.compare:
        outputs.append(output.with_stem(f"{output.stem}_compare"))
    for path in outputs:
        if path.suffix.lower() not in options:
            kind = f"{'a clip' if is_clip else 'an image'}; known are {' '.join(options)}"
            raise ValueError(f"{path} has no known extension of {kind}")
        if path.exists() and not (job.output or args.many):
            raise ValueError(f"{path} exists; -o {output} replaces it")
        if path == args.progress:
            raise ValueError(f"--progress {path} is the result; name another file")
    for path in filter(None, (*outputs, args.progress)):
        if path.exists() and not path.is_file():
            raise ValueError(f"{path} is a folder or a device; name a file")
        if file_id(path) in inputs:
            raise ValueError(f"{path} is an input, which would be lost; name another file")
        if file_id(path.parent) in inputs:
            raise ValueError(f"{path} would become a frame of an input; name another folder")
        sweep(path.parent)
    return outputs


def find_compiler(user):
    """Raises ValueError where torch.compile has no C++ compiler for what `user` wants of a CPU."""
    usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    if not shutil.which(os.environ.get("CXX", usual)):
        raise ValueError(f"{user} needs the compiler {usual}, or the one that CXX names")


def check_device(name):
    """Raises ValueError for a device that is not there."""
    import torch  # here and not at the top: seconds, which a mistyped option should not cost

    try:
        torch.zeros(1, device=name).item()
    except Exception as error:  # some devices lack a module, others an attribute
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--device {name} is not available ({reason}); try cpu") from None


def load(args):
    """(model, device). Raises ValueError for a device that is not there, or by from_pretrained."""
    import torch

    from connector import InstructX, compile_blocks, tile

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.dtype = args.dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    check_device(device)
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    elif args.compile and not device.startswith("cuda"):
        find_compiler("--compile")
    settings = getattr(torch, args.dtype), args.instructx, args.offload, bool(args.quantize)
    model = InstructX.from_pretrained(args.weights, device, *settings)
    if args.tile:
        tile(model.vae, args.tile)
    if args.compile:
        compile_blocks(model.dit.blocks)
    if (args.guidance or 1) > 1 == model.config.guidance:
        note(f"{args.weights} never saw an empty instruction, so guidance makes results worse")
    if not model.trained:
        random = "queries and connector are random; --instructx names trained ones"
        note(f"warning: {args.weights} has no instructx/: {random}")
    return model, device


def scaled(frame, size):
    """Scales a uint8 frame (H, W, 3) to `size`, (width, height) in pixels."""
    return pixels(Image.fromarray(frame), size)[0]


def media_writer(path, source, width, note=lambda text: None):
    """Gives write(frame) for a file like `source`, but `width` pixels wide."""
    if path.suffix.lower() == ".webp" and max(width, source.frames.shape[1]) > LARGEST_WEBP:
        raise ValueError(f"{path}: a WebP has at most {LARGEST_WEBP} pixels a side; name a .png")
    if not source.is_video:
        return image_writer(path, source, note)
    shape = source.length, source.frames.shape[1], width, 3
    return clip_writer(path, shape, source.fps, source, note)


def windows(frames, total, length, overlap, name="the clip"):
    """Cuts `total` frames into windows of `length`: ([frame], how many were in the one before).

    The last window is as long as the others, so it shares more. What is shared is `overlap` or
    more, and 1 + a multiple of 4. Raises ValueError, with a name, if there are fewer than `total`.
    """
    frames, window, done = iter(frames), [], 0
    while done < total:
        left = total - done
        shared = max(overlap, (length - left - 1) // 4 * 4 + 1) if done else 0
        new = list(itertools.islice(frames, min(left, length - shared)))
        if not new:
            raise ValueError(f"{name} became shorter while it was read")
        window = [*window[len(window) - shared :], *new]
        yield window, shared
        done += len(window) - shared


def edit(args, job, outputs, loaded):
    """Makes one edit -> its times and memory in lines of text.

    loaded() -> (model, device) is called once all else is fine.
    """
    source, references = read_inputs(args, job)
    height, width = source.frames.shape[1:3]
    size = working_size(width, height, args.area)
    is_small = args.weights == DEFAULT_WEIGHTS and not args.instructx
    is_windowed = args.overlap and source.is_video  # of which the first frame was kept
    if size != (width, height):
        sizes = f"{size[0]}x{size[1]} and scaled back to {width}x{height}"
        note(f"{job.source} is edited at {sizes} (see --area)")
        if is_small:
            note_once("weights/shapes knows drawings of simple shapes only; --weights names others")
    if is_small and args.frames > 9 and (is_windowed or len(source.frames) > 9):
        note_once("weights/shapes knows clips of 9 frames; longer ones take --frames 9 --overlap 5")
    frames = source.frames
    if is_windowed:
        frames = each_frame(job.source, args.size)
    phases, done, results, expected = Phases(), 0, [], []
    with contextlib.ExitStack() as stack:
        write = stack.enter_context(media_writer(outputs[0], source, width, note))
        if args.compare:
            both = media_writer(outputs[1], replace(source, alpha=None, profile={}), 2 * width)
            write_both = stack.enter_context(both)
        draw = args.progress and stack.enter_context(image_writer(args.progress))
        phases("load", 0, 1)
        model, phases.device = loaded()
        settings = args.steps, args.guidance, job.seed, float(source.fps or 16), phases
        lengths = source.length, args.frames, args.overlap
        for window, shared in windows(frames, *lengths, name=job.source):
            known = {"start": np.stack(results[-shared:])} if shared else {}
            if draw and not done:  # the first window
                known["watch"] = lambda z: expected.append(z[:, :, :1].clone())
            results, shown = [], np.stack([scaled(frame, size) for frame in window])
            model.edit(shown, job.instruction, references, *settings, results.extend, **known)
            for frame, result in zip(window[shared:], results[shared:]):
                result = scaled(result, (width, height))
                write(result)
                if args.compare:
                    write_both(np.concatenate([frame, result], axis=1))
            done += len(window) - shared
            if done < source.length:
                note(f"{job.source}: {done} of {source.length} frames are done")
        if draw:
            chosen = np.linspace(0, len(expected) - 1, 6).round().astype(int)
            shape = 1, size[1], size[0], 3
            pictures = [next(model.decode(expected[i], shape))[0] for i in chosen]
            draw(np.concatenate(pictures, axis=1))
    phases.end()
    return phases.table()


# Many edits


def read_job(args, line):
    """A row of --batch -> Job. Raises ValueError."""
    row = read_row(line, args.batch.parent)
    if not row["instruction"].strip():
        raise ValueError("the instruction is empty; say what to do")
    seed = args.seed if row.get("seed") is None else row["seed"]
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise ValueError(f"the seed {seed!r} is not a whole number from 0 to {2**63 - 1}")
    output = row.get("output")
    if output is not None:
        # Rows come from anywhere, and must not reach files outside.
        path = Path(output if isinstance(output, str) else "")
        if not path.parts or path.is_absolute() or ".." in path.parts:
            problem = f"is not a file inside of {args.output}, named relative to it"
            raise ValueError(f"the output {output!r} {problem}")
        output = args.output / path
    return Job(row["source"], row["instruction"], row["references"] or args.ref, seed, output)


def read_jobs(args):
    """Yields (name, Job, or a ValueError that says why there is none) of several edits."""
    for path in args.inputs:
        yield str(path), Job(path, args.instruction, args.ref, args.seed)
    lines, name = (), args.batch
    if args.batch == STDIN:
        lines, name = read_json_lines(sys.stdin), "stdin"
    elif args.batch:
        lines = read_lines(args.batch)
    for i, line in lines:
        try:
            job = read_job(args, line)
        except ValueError as error:
            job = error
        yield f"{name}:{i}", job


class Tally:
    """What became of several edits; prints it as it comes."""

    def __init__(self, args):
        self.is_dialogue = args.batch == STDIN  # one line of JSON for each line that was read
        self.seconds, self.kept, self.failed = [], 0, 0
        self.owners = {}  # of results: {real path: name of the edit}
        self.file, self.rows = args.output / ".made.jsonl", {}  # {result: the row it was made of}
        with contextlib.suppress(OSError):
            for line in self.file.read_text(errors="replace").splitlines():
                with contextlib.suppress(Exception):  # the last may be half written
                    row = json.loads(line)
                    self.rows[row.pop("output")] = row

    def claim(self, name, paths):
        """Raises ValueError if another edit has one of these results."""
        for path in paths:
            owner = self.owners.setdefault(os.path.realpath(path), name)
            if owner != name:
                raise ValueError(f'{path} is the result of {owner} already; "output" names another')

    def make(self, job, outputs, seconds):
        """Counts an edit that was made, and writes down its row."""
        self.seconds.append(seconds)
        name = os.path.relpath(outputs[0], self.file.parent)
        with self.file.open("a") as stream:
            stream.write("\n" + json.dumps({"output": name} | job.row()))  # after a line cut off
        self.answer(output=str(outputs[0]), seconds=round(seconds, 2))
        for path in () if self.is_dialogue else outputs:
            say(path, sys.stdout)

    def keep(self, job, outputs):
        """Whether the results are there. The first gets its name last, so it stands for all.

        Raises ValueError if they were made of another row.
        """
        name = os.path.relpath(outputs[0], self.file.parent)
        if not outputs[0].exists():
            self.rows.pop(name, None)  # of a result that was deleted
            return False
        earlier = self.rows.get(name, {})
        for key, value in job.row().items():
            if earlier.get(key, value) != value:
                change = f"{key} was {earlier[key]!r} and is {value!r}"
                problem = f"{outputs[0]} was made of another row ({change})"
                raise ValueError(f"{problem}; delete it first")
        self.kept += 1
        self.answer(output=str(outputs[0]))
        return True

    def fail(self, name, error):
        """Counts an edit that failed, and says why in a line."""
        problem = " ".join((explain(error) or repr(error)).split())[:600]
        self.failed += 1
        note(f"error: {problem}" if name in problem else f"error: {name}: {problem}")
        self.answer(error=problem)
        if self.is_dialogue:  # whoever asks again means the same result
            self.owners = {path: owner for path, owner in self.owners.items() if owner != name}

    def answer(self, **values):
        """The line of a dialogue."""
        if self.is_dialogue:
            say(json.dumps(values), sys.stdout)

    def summary(self):
        """How many were made, kept and failed, in a line."""
        each = f" ({sum(self.seconds) / len(self.seconds):.1f} s each)" if self.seconds else ""
        return f"{len(self.seconds)} made{each}, {self.kept} kept, {self.failed} failed"


def to_do(args, tally):
    """Yields (name, Job, outputs) of the edits to make. Tallies the others of this share."""
    jobs = read_jobs(args)
    if args.batch != STDIN:
        jobs = list(jobs)
        inputs = files_read(job for _, job in jobs if isinstance(job, Job))
    part, parts = args.shard
    for number, (name, job) in enumerate(jobs):
        is_ours = number % parts == part
        try:
            if isinstance(job, ValueError):
                raise job
            if job.output:
                tally.claim(name, [job.output])  # whatever else is wrong
            outputs = name_outputs(args, job, files_read([job]) if args.batch == STDIN else inputs)
            tally.claim(name, outputs)
            if not is_ours or tally.keep(job, outputs):
                continue
        except Exception as error:
            if is_ours:
                tally.fail(name, error)
            continue
        yield name, job, outputs


# What decides a result, beside its own row. The device is not among them: shards may differ in it.
SETTINGS = ("weights", "instructx", "instruction", "ref", "steps", "guidance", "seed", "size")
SETTINGS += ("area", "frames", "overlap", "compare", "dtype", "compile", "quantize", "tile")


def check_settings(args, write=False):
    """Raises ValueError if FOLDER/settings.json has other settings. `write` makes a missing one.

    dtype counts once the model is loaded, as its default depends on the device.
    """
    file = args.output / "settings.json"
    values = {name: getattr(args, name) for name in SETTINGS if name != "dtype" or args.dtype}
    values = json.loads(json.dumps(values, default=lambda path: str(path.resolve())))
    if file.exists():
        earlier = read_config(args.output, file.name)
        if not earlier:
            raise ValueError(f"{file} cannot be read; delete it if all settings are the same")
        for name, value in values.items():
            if earlier.get(name) != value:
                change = f"{name} was {earlier.get(name)!r} and is {value!r}"
                problem = f"{args.output} holds results of other settings ({change})"
                raise ValueError(f"{problem}; name another folder")
    elif write:
        args.output.mkdir(parents=True, exist_ok=True)
        with whole(file) as unfinished:
            unfinished.write_text(json.dumps(values, indent=1) + "\n")


def edit_many(args):
    """Makes all edits that are not there yet, with one model -> exit code 0, or 1 if some failed.

    What can be checked is checked before the model is loaded, and that only if there is work.
    """
    check_settings(args)
    tally, loaded = Tally(args), functools.cache(functools.partial(load, args))
    try:
        jobs = to_do(args, tally)
        if args.batch != STDIN:
            jobs = tqdm(list(jobs), "edits", leave=False, disable=None)
        for name, job, outputs in jobs:
            if not tally.seconds:
                loaded()
                check_settings(args, write=True)
            if tally.keep(job, outputs):  # another process was faster
                continue
            began = time.perf_counter()
            try:
                outputs[0].parent.mkdir(parents=True, exist_ok=True)
                edit(args, job, outputs, loaded)
            except Exception as error:
                tally.fail(name, error)
            else:
                tally.make(job, outputs, time.perf_counter() - began)
    finally:
        if tally.seconds or tally.kept or tally.failed:
            note(tally.summary())
    return 1 if tally.failed else 0


# The program


def prepare_process():
    """Lets names be read and printed in any locale, and signals be exceptions that clean up."""

    def stop(number, _):
        signals.append(number)
        note("interrupted" if number == signal.SIGINT else "terminated")
        sys.exit(128 + number)

    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # the caller closed it
            setattr(sys, name, open(os.devnull, "r+"))
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):  # not where a test has replaced it
            stream.reconfigure(encoding="utf-8", errors="surrogateescape")
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # see the top of this file
        signal.signal(signal.SIGINT, stop)
    for name in {"SIGTERM", "SIGHUP"} & set(dir(signal)):  # Windows has no SIGHUP
        if signal.getsignal(getattr(signal, name)) != signal.SIG_IGN:  # as under nohup
            signal.signal(getattr(signal, name), stop)


def main(argv=None):
    """Edits what the command line names, and prints the files written.

    Exit code 1 if some of several edits failed, 2 after one line on what is wrong, 130 after
    Ctrl-C, 143 after SIGTERM, and 129 when the terminal closes.
    """
    prepare_process()
    try:
        args = parse(argv)
        check_arguments(args)
        args.area = args.area or trained_area(args)
        if args.many:
            sys.exit(edit_many(args))
        job = Job(args.inputs[0], args.instruction, args.ref, args.seed, args.output)
        outputs = name_outputs(args, job, files_read([job]))
        say(edit(args, job, outputs, functools.partial(load, args)), sys.stderr)
        for path in filter(None, (*outputs, args.progress)):
            say(path, sys.stdout)
    except Exception as error:
        problem = explain(error)
        if not problem:
            raise
        Parser(prog="edit.py").error(problem)
    except KeyboardInterrupt:
        note("interrupted")
        sys.exit(130)
    finally:
        signals.clear()  # for the next call from Python


if __name__ == "__main__":
    main()
