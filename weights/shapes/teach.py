"""Makes pairs that teach an edit: crops of photos, and the same crops edited by a few lines.

    python weights/shapes/teach.py data/swap [PHOTO ...]    # without photos: scikit-image's samples

Change `edit` and INSTRUCTION, and train.py teaches an edit of your own.
"""

import argparse
import json
import random
from pathlib import Path

from PIL import Image, ImageOps

INSTRUCTION = "swap red and blue"
SIDE = 64  # pixels, the size that the model of the shapes world was trained on


def edit(crop):
    """A PIL image -> the same after the edit."""
    red, green, blue = crop.split()
    return Image.merge("RGB", (blue, green, red))


def samples():
    """Two photos that scikit-image brings along, and a third that is kept for trying the result."""
    import skimage.data

    Image.fromarray(skimage.data.chelsea()).save("cat.png")
    return [Image.fromarray(skimage.data.astronaut()), Image.fromarray(skimage.data.coffee())]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where the pairs and data.jsonl go")
    parser.add_argument("photos", nargs="*", help="your photos (default: scikit-image's samples)")
    parser.add_argument("--count", type=int, default=48, help="pairs (default: 48)")
    args = parser.parse_args()
    if args.photos:
        photos = [ImageOps.exif_transpose(Image.open(path)).convert("RGB") for path in args.photos]
    else:
        photos = samples()
    args.folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(0)
    rows = []
    for i in range(args.count):
        photo = photos[i % len(photos)]
        side = chance.randint(min(photo.size) // 4, min(photo.size))
        left = chance.randint(0, photo.width - side)
        top = chance.randint(0, photo.height - side)
        crop = photo.crop((left, top, left + side, top + side)).resize((SIDE, SIDE))
        crop.save(args.folder / f"{i}.png")
        edit(crop).save(args.folder / f"{i}-edited.png")
        rows.append({"source": f"{i}.png", "target": f"{i}-edited.png", "instruction": INSTRUCTION})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (args.folder / "data.jsonl").write_text(lines)


if __name__ == "__main__":
    main()
