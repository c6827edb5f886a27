"""Images as PNG bytes, and printed inside a terminal.

    as_terminal(image, terminal_mode(os.environ, isatty)) -> text that shows the image when printed

kitty and iTerm2 take a PNG inside an escape sequence; every other terminal with 24-bit colours gets half blocks.
"""

import base64
import io
import shutil
import textwrap
from collections.abc import Mapping

import numpy as np
from PIL import Image

BLOCK = "\u2580"  # the upper half of a character
MAX_COLUMNS = 64  # of a terminal, for half blocks; narrower terminals get fewer
COMFORTABLE = 256  # pixels a side, for terminals that show pixels


def enlarge(image: np.ndarray, scale: int) -> Image.Image:
    """uint8 (H, W, 3) -> the image with every pixel repeated `scale` times, without smoothing."""
    return Image.fromarray(np.asarray(image).repeat(scale, 0).repeat(scale, 1))


def png(image: Image.Image | np.ndarray) -> bytes:
    """Encode an image, or uint8 (H, W, 3), as a PNG."""
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, "PNG")
    return buffer.getvalue()


def terminal_mode(env: Mapping[str, str], isatty: bool, encoding: str | None = "utf-8") -> str | None:
    """How this terminal shows images: 'kitty', 'iterm', 'blocks' (24-bit colours), or None (a file, a dumb terminal).

    tmux and screen pass colours through but not the image protocols. encoding: of its text, which may lack the block.
    """
    term, program = env.get("TERM", ""), env.get("TERM_PROGRAM", "")
    if not isatty or term == "dumb":
        return None
    blocks = "blocks" if has_character(encoding, BLOCK) else None
    if env.get("TMUX") or term.startswith(("screen", "tmux")):
        return blocks
    if env.get("KITTY_WINDOW_ID") or "kitty" in term or program == "ghostty":
        return "kitty"
    if program in ("iTerm.app", "WezTerm") or env.get("LC_TERMINAL") == "iTerm2":
        return "iterm"
    return blocks


def has_character(encoding: str | None, character: str) -> bool:
    try:
        return bool(character.encode(encoding or "utf-8"))
    except (UnicodeEncodeError, LookupError):
        return False


def as_terminal(image: np.ndarray, mode: str = "blocks") -> str:
    """uint8 (H, W, 3) -> text that shows the image when printed, in a mode of terminal_mode."""
    if mode == "blocks":
        return half_blocks(image)
    data = png(enlarge(image, max(1, COMFORTABLE // image.shape[1])))
    text = base64.b64encode(data).decode()
    if mode == "iterm":
        return f"\x1b]1337;File=inline=1;size={len(data)}:{text}\a"
    chunks = textwrap.wrap(text, 4096)  # kitty's limit for one chunk; m=1 says that more follow
    controls = [f"m={int(number < len(chunks) - 1)}" for number in range(len(chunks))]
    controls[0] = "a=T,f=100," + controls[0]
    return "".join(f"\x1b_G{c};{chunk}\x1b\\" for c, chunk in zip(controls, chunks, strict=True))


def half_blocks(image: np.ndarray) -> str:
    """Print two pixels per character: the foreground colours the upper half block, the background the lower pixel."""
    height, width = image.shape[:2]
    columns = min(MAX_COLUMNS, shutil.get_terminal_size().columns)
    if width > columns:
        size = (columns, max(1, round(height * columns / width)))
        image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))
    lines = []
    for top in range(0, len(image), 2):
        pairs = zip(image[top], image[top + 1], strict=True) if top + 1 < len(image) else ((p,) for p in image[top])
        lines.append("".join(half_block(*pair) for pair in pairs) + "\x1b[0m")
    return "\n".join(lines)


def half_block(upper: np.ndarray, lower: np.ndarray | None = None) -> str:
    red, green, blue = upper
    below = "49" if lower is None else "48;2;{};{};{}".format(*lower)  # 49: the terminal's own background
    return f"\x1b[38;2;{red};{green};{blue};{below}m{BLOCK}"
