"""Fields of a body in OpenAI's form: which are read, which change nothing, and which ask for what is not there.

    check_fields(body, KNOWN, NEUTRAL)  ->  Refused, naming the first field that cannot be carried out

A field that is ignored in silence would be a promise that is not kept, so each one that is ignored is listed here.
"""

import secrets
from collections.abc import Collection, Mapping
from typing import Any

from nanochameleon.errors import shown
from nanochameleon.web import limits
from nanochameleon.web.bodies import field
from nanochameleon.web.refusals import Refused
from nanochameleon.web.talk import MAX_SEED, OPTIONS, read_whole

MAX_STOPS, MAX_STOP_LENGTH = 4, 100
SAMPLING = OPTIONS.keys() - {"max_new_tokens"}  # temperature and top_p are OpenAI's, the others our own
IGNORED = {  # of accounts, bills and caches, and hints without a meaning here
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "prompt_cache_options", "parallel_tool_calls", "reasoning_effort", "verbosity",
}  # fmt: skip

Neutral = Mapping[str, tuple[list[Any], str]]  # field -> values that ask for nothing more, and why others are refused


def check_fields(row: dict, known: Collection[str], neutral: Neutral, place: str = "") -> None:
    """Refuse what is neither known, nor ignored, nor neutral. null is the same as a field that is left out."""
    for name, value in row.items():
        if value is None or name in known or name in IGNORED:
            continue
        values, why = neutral.get(name, ([], "it is not known here"))
        if value not in values:
            where = place + shown(name)
            raise Refused(f"{where} cannot be used: {why}", param=where, code="unsupported_parameter")


def check_model(body: dict, served: str) -> None:
    """404 as OpenAI says it. The only model is also the one that is meant where none is named."""
    if (name := field(body, "model", str, served)) != served:
        sentence = f"the model {shown(name)} is not served here: use {shown(served)}"
        raise Refused(sentence, 404, param="model", code="model_not_found")


def read_n(body: dict) -> int:
    return read_whole(body, "n", 1, 1, limits.SAMPLES)


def read_seed(body: dict) -> int:
    """The given seed, or a random one, which the answer names."""
    return read_whole(body, "seed", secrets.randbelow(MAX_SEED), 0, MAX_SEED)


def read_stops(body: dict) -> tuple[str, ...]:
    """Return the strings that end an answer: one, or up to four."""
    stops = [stop] if isinstance(stop := body.get("stop"), str) else field(body, "stop", list, [])
    if len(stops) > MAX_STOPS or not all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_LENGTH for s in stops):
        rule = f"a text of 1 to {MAX_STOP_LENGTH} characters, or a list of up to {MAX_STOPS}"
        raise Refused(f"stop must be {rule}", param="stop")
    return tuple(stops)
