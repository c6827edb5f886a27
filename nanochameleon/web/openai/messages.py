"""Messages in OpenAI's form -> turns of a conversation.

    [{"role": "user", "content": [{"type": "text", "text": "how many stars?"}, {"type": "image_url", ...}]}] -> [Turn]

content: a text, or parts {"type": "text", "text": ...} and {"type": "image_url", "image_url": {"url": "data:..."}}.
An assistant's message is read as we send it: content, images, and parts, which say their order. An image that the
model drew carries its codes in JSON, so it returns to the model exactly. They are not put into the PNG: a stranger's
file could then show one image to people and another to the model.

Chameleon has no system turn, and only the order of turns says who speaks. So text of the system or the developer is
read as the user's, which puts it at the beginning, and neighbouring messages of one speaker become one turn.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from nanochameleon.documents import Image, Text
from nanochameleon.training.run import Run
from nanochameleon.web.bodies import field
from nanochameleon.web.conversation import ASSISTANT, MAX_SEGMENTS, MAX_TEXT, MAX_TURNS, USER, Turn, read_codes
from nanochameleon.web.images import from_data_url, read_image
from nanochameleon.web.openai.fields import check_fields
from nanochameleon.web.refusals import Refused
from nanochameleon.web.site import Site

SPEAKERS = {"user": USER, "system": USER, "developer": USER, "assistant": ASSISTANT}
FIELDS = ("role", "content", "images", "parts", "name", "refusal", "annotations")
NO_TOOLS = "this model calls no tools"
NEUTRAL = {"tool_calls": ([[]], NO_TOOLS), "function_call": ([], NO_TOOLS), "audio": ([], "this model hears nothing")}
FORM_OF_PARTS = '{"type": "text", "text": "..."} or {"type": "image", "image": 0}'


@dataclass(frozen=True)
class ImageFile:
    """The bytes of an image that is not decoded yet, and the field that they came in."""

    data: bytes
    place: str


Unread = Text | Image | ImageFile


async def read_messages(body: dict, site: Site) -> list[Turn]:
    """Return the checked "messages" of a body. All but the pixels is checked before the first image is decoded."""
    messages = field(body, "messages", list)
    if not 1 <= len(messages) <= MAX_TURNS:
        raise Refused(f"messages must have 1 to {MAX_TURNS} messages, not {len(messages)}", param="messages")
    spoken: list[tuple[str, list[Unread]]] = []
    for number, message in enumerate(messages):
        speaker, segments = read_message(message, f"messages[{number}]", site.run)
        if spoken and spoken[-1][0] == speaker:
            spoken[-1][1].extend([Text("\n"), *segments])
        else:
            spoken.append((speaker, segments))
    check_conversation(spoken, site.run)
    return [Turn(speaker, tuple([await read_pixels(s, site) for s in segments])) for speaker, segments in spoken]


def check_conversation(spoken: Sequence[tuple[str, list[Unread]]], run: Run) -> None:
    """The user begins and ends, and there is not more than the model can read."""
    if spoken[0][0] != USER or spoken[-1][0] != USER:
        raise Refused("the first and the last message must be the user's", param="messages")
    segments = [segment for _, segments in spoken for segment in segments]
    letters = sum(len(segment.text) for segment in segments if isinstance(segment, Text))
    if letters > MAX_TEXT:
        raise Refused(f"messages have {letters:,} characters: at most {MAX_TEXT:,} are read", param="messages")
    n_images = sum(not isinstance(segment, Text) for segment in segments)
    if n_images * (run.image_tokenizer.n_codes_per_image + 2) >= (context := run.cfg.model.max_seq_len):
        raise Refused(f"messages have {n_images} images, which do not fit in a context of {context}", param="messages")


async def read_pixels(segment: Unread, site: Site) -> Text | Image:
    if not isinstance(segment, ImageFile):
        return segment
    try:
        return (await read_image(segment.data, site))[0]
    except Refused as error:
        raise Refused(f"{segment.place}: {error}", error.status, segment.place, error.code, error.retry_after) from None


# ---------------------------------------------------------------------------------------------------------------------
# One message


def read_message(message: object, place: str, run: Run) -> tuple[str, list[Unread]]:
    if not isinstance(message, dict):
        raise Refused(f"{place} must be an object", param=place)
    role = field(message, "role", str, place=f"{place}.")
    if role not in SPEAKERS:
        raise Refused(f"{place}.role must be one of {', '.join(SPEAKERS)}: {NO_TOOLS}", param=f"{place}.role")
    check_fields(message, FIELDS, NEUTRAL, f"{place}.")
    segments = read_content(message, place, run)
    if role == "assistant":
        images = read_list(message, "images", place)
        drawn = [read_image_part(part, f"{place}.images[{i}]", run) for i, part in enumerate(images)]
        segments = in_order(segments + drawn, read_list(message, "parts", place), f"{place}.parts")
    elif not segments:
        raise Refused(f"{place} is empty: give its content", param=f"{place}.content")
    return SPEAKERS[role], segments


def read_list(message: dict, name: str, place: str) -> list:
    """Return a list of a message, empty where it is left out. Its length is checked before its parts."""
    parts, where = field(message, name, list, [], f"{place}."), f"{place}.{name}"
    if len(parts) > MAX_SEGMENTS:
        raise Refused(f"{where} has {len(parts):,} parts: at most {MAX_SEGMENTS} are read", param=where)
    return parts


def read_content(message: dict, place: str, run: Run) -> list[Unread]:
    if isinstance(message.get("content"), str):
        text = field(message, "content", str, place=f"{place}.")
        return [Text(text)] if text else []
    parts = read_list(message, "content", place)
    return [read_part(part, f"{place}.content[{number}]", run) for number, part in enumerate(parts)]


def read_part(part: object, place: str, run: Run) -> Unread:
    if not isinstance(part, dict) or part.get("type") not in ("text", "image_url"):
        raise Refused(f"{place} must be an object whose type is text or image_url", param=place)
    if part["type"] == "text":
        return Text(field(part, "text", str, place=f"{place}."))
    return read_image_part(part, place, run)


def read_image_part(part: object, place: str, run: Run) -> Image | ImageFile:
    """Return the image's codes where they are given, or the bytes in its URL."""
    if not isinstance(part, dict):
        raise Refused(f"{place} must be an object", param=place)
    if part.get("codes") is not None:
        return Image(read_codes(part["codes"], f"{place}.codes", run))
    url = field(field(part, "image_url", dict, place=f"{place}."), "url", str, place=f"{place}.image_url.")
    place = f"{place}.image_url.url"
    return ImageFile(from_data_url(url, place), place)


def in_order(segments: list[Unread], parts: list, place: str) -> list[Unread]:
    """Return an assistant's segments in the order of its parts, which must hold just these. None keep their order."""
    if not parts:
        return segments
    images = [segment for segment in segments if not isinstance(segment, Text)]
    ordered, numbers = [], []
    for part in parts:
        if isinstance(part, dict) and part.get("type") == "text":
            ordered.append(Text(field(part, "text", str, place=f"{place}.")))
        elif isinstance(part, dict) and type(i := part.get("image")) is int and 0 <= i < len(images):
            ordered.append(images[i])
            numbers.append(i)
        else:
            raise Refused(f"{place} must hold {FORM_OF_PARTS}", param=place)
    if text_of(ordered) != text_of(segments) or numbers != list(range(len(images))):
        raise Refused(f"{place} must hold what content and images hold, or be left out", param=place)
    return ordered


def text_of(segments: Sequence[Unread]) -> str:
    return "".join(segment.text for segment in segments if isinstance(segment, Text))
