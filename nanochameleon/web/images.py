"""Images between browsers and the model: files and data URLs -> codes, and codes -> data URLs.

    POST /api/images?fit=crop     bytes of an image file        -> {"codes", "url": the codes decoded again, as a PNG}
    POST /api/images/decode       {"codes": [[...], ...]}       -> {"urls": [...]}

Bytes are counted before pixels, pixels before anything is decoded (images/files.py). Few files are in work at once; the
rest get 429 (uploads.py). Left out: addresses. Nothing is ever fetched.
"""

import base64
import re
from collections.abc import Sequence

import anyio
import numpy as np
import torch
from PIL import Image as Pillow
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from nanochameleon.documents import Image
from nanochameleon.errors import UserError
from nanochameleon.images.files import FORMATS, MAX_SIDE
from nanochameleon.images.terminal import png
from nanochameleon.images.tokenizer import NO_DECODER, Fit, load_square
from nanochameleon.web import limits
from nanochameleon.web.bodies import field, json_body
from nanochameleon.web.conversation import read_codes
from nanochameleon.web.head import media_type
from nanochameleon.web.refusals import Refused
from nanochameleon.web.site import Site

DATA_URL = re.compile(r"data:image/[\w.+-]+(;[\w-]+=[\w-]+)*;base64", re.ASCII | re.IGNORECASE)
NO_FETCH = "must be a data URL, data:image/png;base64,...: the server fetches nothing"
UNREADABLE = f"the file is not an image that can be read: use a whole {', '.join(FORMATS[:-1])} or {FORMATS[-1]}"


# ---------------------------------------------------------------------------------------------------------------------
# Files and URLs


async def read_image(data: bytes, site: Site, fit: Fit = "crop") -> tuple[Image, np.ndarray]:
    """Return a file's codes and its square, uint8 (R, R, 3). Raises Refused for a file that is no good image."""
    with site.uploads.place():
        return await encode(data, site, fit)


async def encode(data: bytes, site: Site, fit: Fit) -> tuple[Image, np.ndarray]:
    async with site.uploads.threads:
        square = await anyio.to_thread.run_sync(read_square, data, site.run.cfg.vqgan.resolution, fit)
    codes = await site.worker.call(lambda run: run.image_tokenizer.encode(square[None])[0].tolist())
    return Image(tuple(codes)), square


def read_square(data: bytes, resolution: int, fit: Fit) -> np.ndarray:
    """load_square, whose sentences may end in a library's words: those stay here."""
    if len(data) > limits.IMAGE:
        raise Refused(f"the image has {len(data):,} bytes: at most {limits.IMAGE:,} are read", 413)
    if not data:
        raise Refused("the image is empty: send the bytes of an image file")
    try:
        return load_square("file", resolution, fit, data)
    except UserError as error:
        cause = error.__cause__
        if isinstance(cause, Pillow.DecompressionBombError):
            raise Refused(f"the image has too many pixels: use at most {MAX_SIDE:,} a side") from None
        raise Refused(str(error) if cause is None else UNREADABLE) from None


def from_data_url(url: str, place: str) -> bytes:
    """Return the bytes in a data URL. place: the name of its field."""
    most = -(-limits.IMAGE // 3) * 4  # characters of base64
    head, comma, text = url[: most + 200].partition(",")
    if not comma or not DATA_URL.fullmatch(head):
        raise Refused(f"{place} {NO_FETCH}", param=place)
    if len(url) - len(head) - 1 > most:
        raise Refused(f"{place} has an image of more than {limits.IMAGE:,} bytes: use a smaller one", 413, place)
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise Refused(f"{place} is not base64 after its comma: encode the bytes of the file", param=place) from None


def data_url(file: bytes) -> str:
    """The data URL of a PNG file."""
    return "data:image/png;base64," + base64.b64encode(file).decode()


def png_url(pixels: np.ndarray) -> str:
    """The data URL of uint8 (H, W, 3)."""
    return data_url(png(pixels))


async def pngs_of(codes: Sequence[Sequence[int]], site: Site) -> list[bytes]:
    """Decode images into PNG files, a batch of bounded size at a time: in between, the model serves other clients."""
    files: list[bytes] = []
    size = site.run.image_tokenizer.batch_size
    for i in range(0, len(codes), size):
        part = torch.tensor(codes[i : i + size])
        images = await site.worker.call(lambda run, part=part: run.image_tokenizer.decode(part))
        files += await anyio.to_thread.run_sync(lambda images=images: [png(pixels) for pixels in images])
    return files


# ---------------------------------------------------------------------------------------------------------------------
# Routes


async def upload(request: Request) -> JSONResponse:
    site = request.app.state.site
    fit = request.query_params.get("fit", "crop")
    if fit not in ("crop", "pad"):
        raise Refused("fit must be crop or pad", param="fit")
    with site.uploads.place():
        image, square = await encode(await file_body(request), site, fit)
    if site.run.image_tokenizer.can_draw:
        url = data_url(*await pngs_of([image.codes], site))
    else:
        url = await anyio.to_thread.run_sync(png_url, square)
    return JSONResponse({"codes": image.codes, "url": url})


async def file_body(request: Request) -> bytes:
    """Return the body of a request that sends a file."""
    kind = media_type(request.headers.get("content-type", ""))
    if not (kind.startswith("image/") or kind == "application/octet-stream"):
        raise Refused("the body must have the content-type image/... or application/octet-stream", 415)
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > limits.IMAGE:
            raise Refused(f"the image has more than {limits.IMAGE:,} bytes: use a smaller one", 413)
    return bytes(data)


async def decode(request: Request) -> JSONResponse:
    site = request.app.state.site
    images = field(await json_body(request), "codes", list)
    if len(images) > limits.DECODED:
        raise Refused(f"codes has {len(images):,} images: at most {limits.DECODED} are decoded at once", param="codes")
    if not site.run.image_tokenizer.can_draw:
        raise Refused(NO_DECODER, code="no_decoder")
    codes = [read_codes(image, f"codes[{number}]", site.run) for number, image in enumerate(images)]
    return JSONResponse({"urls": [data_url(file) for file in await pngs_of(codes, site)]})


ROUTES = [
    Route("/api/images", upload, methods=["POST"]),
    Route("/api/images/decode", decode, methods=["POST"]),
]
