"""Clients of a server in one light process: raw sockets and the standard library, so that they cost little of the CPU.

    python -m nanochameleon.bench.web_client    one line of JSON in (class Load), one line of JSON out (class Result)

Each client sends a request, reads its events to the end, and sends the next one.
"""

import asyncio
import json
import sys
import time
from dataclasses import asdict, dataclass, field

from nanochameleon.errors import say

LIMIT = 2**24  # bytes of an answer
LAST = b"\r\n0\r\n\r\n"  # ends chunks; events hold no \r


@dataclass(frozen=True)
class Load:
    host: str
    port: int
    bodies: list[dict]  # of POST /api/generate; each use of one has another seed
    clients: int
    seconds: float | None = None  # when to send no more requests
    requests: int | None = None  # how many to send


@dataclass
class Result:
    seconds: float = 0.0  # from the start to the end of the last answer
    tokens: int = 0
    answers: int = 0
    busy: int = 0  # 429: sent again after as long as the server said
    errors: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)  # seconds to the first event of a sample
    whole: list[float] = field(default_factory=list)  # seconds to the end of an answer


def message(load: Load, body: dict) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST /api/generate HTTP/1.1\r\nHost: {load.host}:{load.port}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


async def ask(load: Load, body: dict, connection: tuple, result: Result) -> float:
    """Send a request and read its answer. Returns the seconds to wait before the next try, 0 after an answer."""
    reader, writer = connection
    start = time.perf_counter()
    writer.write(message(load, body))
    head = await reader.readuntil(b"\r\n\r\n")
    status = int(head.split(b" ", 2)[1])
    if status != 200:
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line)
        answer = await reader.readexactly(int(fields[b"content-length"]))
        if status != 429:
            result.errors.append(answer.decode())
        result.busy += status == 429
        return float(fields.get(b"retry-after", 0))
    answer = await reader.readuntil(b'"sample"')
    first = time.perf_counter() - start
    answer += await reader.readuntil(LAST)
    result.first.append(first)  # only now: another answer may end in between, and both lists must have the same order
    result.whole.append(time.perf_counter() - start)
    result.answers += 1
    note(answer, result)
    return 0.0


def note(answer: bytes, result: Result) -> None:
    """Count the tokens of an answer, or keep its error."""
    n = answer.count(b'"new_tokens": ')
    if b'{"error"' in answer or not n:
        result.errors.append(answer[-300:].decode(errors="replace"))
    result.tokens += sum(int(part.split(b",", 1)[0]) for part in answer.split(b'"new_tokens": ')[1:])


async def client(load: Load, number: int, end: float, result: Result) -> None:
    connection, sent = await asyncio.open_connection(load.host, load.port, limit=LIMIT), number
    while time.perf_counter() < end and (load.requests is None or sent < load.requests):
        body = load.bodies[sent % len(load.bodies)] | {"seed": sent}
        while wait := await ask(load, body, connection, result):
            await asyncio.sleep(wait)
        sent += load.clients
    connection[1].close()


async def run(load: Load) -> Result:
    result, start = Result(), time.perf_counter()
    end = start + (load.seconds or float("inf"))
    await asyncio.gather(*(client(load, number, end, result) for number in range(load.clients)))
    result.seconds = time.perf_counter() - start
    return result


if __name__ == "__main__":
    say(json.dumps(asdict(asyncio.run(run(Load(**json.load(sys.stdin)))))))
