"""What tests of the API send, and what they read of its answers."""

import base64
import io

import numpy as np
from openai.types.chat import ChatCompletion
from PIL import Image as Pillow

STAR = "please draw a big red star on white"
COUNT = "how many stars are there?"
USER = {"role": "user", "content": "a"}


def pixels(url: str) -> np.ndarray:
    head, _, data = url.partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Pillow.open(io.BytesIO(base64.b64decode(data))))


def png_of(image: Pillow.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def image_of(answer: ChatCompletion) -> dict:
    [image] = answer.choices[0].message.images
    return image


def about(url: str, question: str = COUNT) -> list[dict]:
    parts = [{"type": "image_url", "image_url": {"url": url, "detail": "low"}}, {"type": "text", "text": question}]
    return [{"role": "user", "content": parts}]


def part(url, n=1):
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}] * n}]
