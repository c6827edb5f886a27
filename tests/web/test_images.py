"""Images between browsers and the model: what comes in is limited and checked, and no file can break the server."""

import asyncio
import base64
import io
import json
import random

import numpy as np
import pytest
import torch
from httpx import ASGITransport, AsyncClient
from hypothesis import given
from hypothesis import strategies as st
from image_bytes import bomb, encoded, noise, odd_images, png
from mutators import mutated
from PIL import Image
from starlette.testclient import TestClient
from tiny_site import tiny_run, tiny_site

from nanochameleon.errors import UserError
from nanochameleon.images.tokenizer import preprocess
from nanochameleon.web import images, limits
from nanochameleon.web.app import application
from nanochameleon.web.images import from_data_url, png_url

PNG = {"content-type": "image/png"}


@pytest.fixture(scope="module")
def site():
    return tiny_site()


@pytest.fixture(scope="module")
def client(site):
    with TestClient(application(site), base_url="http://127.0.0.1") as client:
        yield client


def send(client: TestClient, data: bytes, address: str = "/api/images", **headers: str):
    return client.post(address, content=data, headers=PNG | headers)


def pixels_of(url: str) -> np.ndarray:
    start, _, text = url.partition(",")
    assert start == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text, validate=True))))


def sentence(answer) -> str:
    """The error of an answer, which never holds what is ours alone."""
    message = answer.json()["error"]["message"]
    assert not any(
        word in message for word in ("/tmp", "/etc", "nanochameleon", "Pillow", "PIL", "Error", "0x", "<_io")
    ), message
    return message


# ---------------------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_a_file_becomes_its_codes_and_what_they_decode_to(client, site, fit):
    picture = noise(size=32).resize((40, 20))
    answer = send(client, encoded(picture), f"/api/images?fit={fit}").json()
    square = preprocess(picture, 4, fit)
    codes = site.run.image_tokenizer.encode(square[None])[0].tolist()
    assert answer["codes"] == codes
    assert np.array_equal(pixels_of(answer["url"]), site.run.image_tokenizer.decode(torch.tensor([codes]))[0])


def test_crop_is_the_default_and_another_fit_is_refused(client):
    data = encoded(noise().resize((40, 20)))
    assert send(client, data).json() == send(client, data, "/api/images?fit=crop").json()
    assert send(client, data).json() != send(client, data, "/api/images?fit=pad").json()
    answer = send(client, data, "/api/images?fit=../../etc")
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "fit"


def test_a_model_without_a_decoder_gives_the_square_back():
    picture = noise(size=8)
    with TestClient(application(tiny_site(run=tiny_run(can_draw=False))), base_url="http://127.0.0.1") as client:
        answer = send(client, encoded(picture)).json()
        assert np.array_equal(pixels_of(answer["url"]), preprocess(picture, 4, "crop"))
        refused = client.post("/api/images/decode", json={"codes": [answer["codes"]]})
    assert refused.status_code == 400 and "decoder" in sentence(refused)


def test_unusual_files_are_read(client):
    for kind, data in odd_images().items():
        assert send(client, data).status_code == 200, kind


def test_a_file_is_upright_blended_on_white_and_its_first_frame(client):
    turned = Image.Exif()
    turned[0x0112] = 3
    picture = Image.new("RGB", (32, 32), "red")
    picture.paste("blue", (0, 0, 32, 16))
    clear, white = Image.new("RGBA", (8, 8), (200, 0, 0, 0)), Image.new("RGB", (8, 8), "white")
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for odd, plain in (
        (encoded(picture, exif=turned), encoded(picture.transpose(Image.Transpose.ROTATE_180))),
        (encoded(clear), encoded(white)),
        (encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), encoded(frames[0])),
    ):
        assert send(client, odd).json() == send(client, plain).json()


BAD = {
    "empty": b"",
    "a page": b"<!doctype html><script>alert(1)</script>" * 40,
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
    "cut off": encoded(noise())[:-900],
    "32 bits a channel": encoded(Image.fromarray(np.full((4, 4), 2**30, np.int32)), "TIFF"),
    "a pickle": b"\x80\x04\x95.",
    "too wide": bomb(9_000, 1),
    "a bomb": png(20_000, 20_000, 8, 0, bytes(9)),  # the header alone tells
    "a larger bomb": png(2**31 - 1, 2**31 - 1, 8, 0, bytes(9)),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_are_refused_in_one_sentence(client, kind):
    answer = send(client, BAD[kind])
    assert answer.status_code == 400
    assert sentence(answer).startswith(("the file", "the image", "image file")), sentence(answer)
    if kind in ("too wide", "a bomb"):
        assert "8,192 a side" in sentence(answer)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_no_damage_is_an_error_of_the_server(client, kind):
    rng = random.Random(kind)
    data = encoded(noise(size=16), kind)
    for _ in range(25):
        answer = send(client, mutated(f"x.{kind.lower()}", data, rng))
        assert answer.status_code in (200, 400), answer.text
        if answer.status_code == 400:
            sentence(answer)


def test_bytes_are_limited_before_they_are_decoded(client, site):
    many = limits.IMAGE + 1
    for data in (bytes(many), (bytes(2**16) for _ in range(many // 2**16 + 1))):  # the second comes in chunks
        answer = send(client, data)
        assert answer.status_code == 413 and f"{limits.IMAGE:,}" in sentence(answer)
    with pytest.raises(UserError, match="at most"):
        asyncio.run(images.read_image(bytes(many), site))


@pytest.mark.parametrize("kind", ["text/html", "application/json", "multipart/form-data; boundary=x", "", "imagepng"])
def test_other_content_types_are_refused(client, kind):
    answer = send(client, encoded(noise()), **{"content-type": kind})
    assert answer.status_code == 415 and "content-type" in sentence(answer)


@pytest.mark.parametrize("kind", ["image/webp", "IMAGE/PNG; x=y", "application/octet-stream"])
def test_the_content_decides_what_a_file_is(client, kind):
    assert send(client, encoded(noise()), **{"content-type": kind}).status_code == 200


# ---------------------------------------------------------------------------------------------------------------------
# Crowds


def test_a_hundred_at_once_are_served_or_sent_away_and_the_places_are_free_again(client, site):
    app, data = application(site), encoded(noise())

    async def crowd() -> list[int]:
        async with AsyncClient(transport=ASGITransport(app), base_url="http://127.0.0.1") as client:
            posts = [client.post("/api/images", content=data, headers=PNG) for _ in range(100)]
            answers = await asyncio.gather(*posts)
            assert all(answer.headers["retry-after"] for answer in answers if answer.status_code == 429)
            again = await client.post("/api/images", content=data, headers=PNG)
            return [answer.status_code for answer in (*answers, again)]

    codes = asyncio.run(crowd())
    assert codes.count(200) >= site.uploads.most + 1 and codes.count(200) + codes.count(429) == 101
    assert codes.count(429) and codes[-1] == 200 and site.uploads.n == 0


# ---------------------------------------------------------------------------------------------------------------------
# Codes


def test_codes_are_decoded_in_order(client, site):
    codes = torch.tensor(np.random.default_rng(0).integers(0, 8, (limits.DECODED, 4)))
    urls = client.post("/api/images/decode", json={"codes": codes.tolist()}).json()["urls"]
    assert np.array_equal(np.stack([pixels_of(url) for url in urls]), site.run.image_tokenizer.decode(codes))
    assert client.post("/api/images/decode", json={"codes": []}).json() == {"urls": []}


@pytest.mark.parametrize(
    "codes",
    [[[0, 1, 2]], [[0, 1, 2, 8]], [[0, 1, 2, -1]], [[0, 1, 2, True]], [[0, 1, 2, 1.0]], [0], [None], [[]], "x", None,
     [["0", "1", "2", "3"]], [[0, 1, 2, 10**400]], [[0, 0, 0, 0]] * 65],
)  # fmt: skip
def test_codes_that_are_none_are_refused(client, codes):
    body = json.dumps({"codes": codes})  # by hand, since the client refuses some numbers
    answer = client.post("/api/images/decode", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["param"].startswith("codes")


# ---------------------------------------------------------------------------------------------------------------------
# Data URLs


@given(st.binary(max_size=200), st.sampled_from(["png", "jpeg", "svg+xml", "x-any.kind"]), st.booleans())
def test_a_data_url_gives_its_bytes(data, kind, parameter):
    url = f"data:image/{kind}{';name=x' * parameter};base64,{base64.b64encode(data).decode()}"
    assert from_data_url(url, "url") == data


def test_png_url_is_read_back_exactly():
    pixels = np.asarray(noise())
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(from_data_url(png_url(pixels), "url")))), pixels)


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1/a.png", "https://x.org/a.png", "file:///etc/passwd", "//x/y", "/etc/passwd", "", "data:", ",",
     "data:image/png,abc", "data:text/html;base64,PGI+", "data:image/png;base64;charset=x,AAAA", "javascript:alert(1)",
     "data:image/png\n;base64,AAAA", " data:image/png;base64,AAAA", "data:;base64,AAAA", "ftp://x/data:image/png;base64,AA"],
)  # fmt: skip
def test_any_other_address_is_refused(url):
    with pytest.raises(images.Refused, match=r"messages\[0\] must be a data URL.*fetches nothing") as refused:
        from_data_url(url, "messages[0]")
    assert refused.value.param == "messages[0]"


@pytest.mark.parametrize("text", ["AAA", "A A=", "AAAA\n", "AA-_", "%41AAA", "=AAA", "AAé=", "AA==AA=="])
def test_what_is_not_base64_is_refused(text):
    with pytest.raises(images.Refused, match="base64"):
        from_data_url("data:image/png;base64," + text, "url")


@given(st.text(max_size=60), st.sampled_from(["", "data:image/png;base64,"]))
def test_any_text_gives_bytes_or_a_sentence(text, start):
    try:
        from_data_url(start + text, "url")
    except images.Refused as refused:
        assert refused.status == 400


@pytest.mark.parametrize("more", [0, 1, 2, 3])
def test_the_size_of_a_data_url_is_limited_before_decoding(more, monkeypatch):
    monkeypatch.setattr(limits, "IMAGE", 1_002)
    url = "data:image/png;base64," + base64.b64encode(bytes(1_002 + more)).decode()
    if more == 0:
        assert len(from_data_url(url, "url")) == 1_002
    else:
        with pytest.raises(images.Refused) as refused:
            from_data_url(url, "url")
        assert refused.value.status == 413
