"""Time the page's server with models/toy: one client, then 32 at once next to the engine alone, and its memory.

The server is a process of its own, as a user starts it, and the clients are another one. Between its turns the engine
alone runs the same requests in this process: same slots, as many at once. It gives tokens, or tokens, text and pixels,
which is what a server needs for its answers.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

from nanochameleon.bench.rows import Row, make_row
from nanochameleon.bench.web_client import Load, Result
from nanochameleon.documents import Image
from nanochameleon.errors import UserError, shown
from nanochameleon.generation.engine import Engine
from nanochameleon.generation.events import Detokenizer
from nanochameleon.training.run import Run
from nanochameleon.web.talk import read_body
from nanochameleon.weights.model_folder import open_model

ROOT = Path(__file__).parents[2]
SLOTS, CLIENTS = 16, 32


def body(mode: str, *segments: dict) -> dict:
    return {"mode": mode, "turns": [{"role": "user", "segments": list(segments)}]}


CODES = {"codes": [54] * 64}
TEXT = body("chat", {"text": "say backwards: red star"})
DRAW = body("draw", {"text": "a big red star on white"})
MIX = (  # images, text and both; prompts with and without an image
    DRAW,
    body("chat", {"text": "show a big red star on white, then two small blue crosses on black"}),
    body("draw", {"text": "a small green circle above a big yellow square"}),
    body("answer", CODES, {"text": "what is in the picture?"}),
    body("chat", {"text": "please draw two small blue crosses on black"}),
    body("chat", {"text": "write code for a big red star on white"}),
)


# ---------------------------------------------------------------------------------------------------------------------
# The server and its clients


@dataclass(frozen=True)
class Server:
    process: subprocess.Popen
    host: str
    port: int

    def load(self, bodies: Sequence[dict], clients: int, **more: float) -> Result:
        """Put a load on it. Raises UserError for any error but 429."""
        load = Load(self.host, self.port, list(bodies), clients, **more)
        command = [sys.executable, "-m", "nanochameleon.bench.web_client"]
        done = subprocess.run(command, cwd=ROOT, input=json.dumps(asdict(load)), capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"the clients failed: {shown(done.stderr.strip(), 300)}")
        result = Result(**json.loads(done.stdout))
        if result.errors:
            raise UserError(f"the server failed {len(result.errors)} times: {shown(result.errors[0], 300)}")
        return result

    def memory(self) -> float:
        """Return the MB that the process holds in memory."""
        return memory(Path(f"/proc/{self.process.pid}/status").read_text())


def memory(status: str) -> float:
    """/proc/PID/status -> MB in memory"""
    [line] = [line for line in status.splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1]) / 1024


@contextmanager
def serving(model: Path) -> Iterator[Server]:
    """Start the server on a free port, and end it."""
    command = [sys.executable, "-m", "nanochameleon.web", str(model), "--port", "0", "--slots", str(SLOTS)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        said = ""
        for line in process.stdout:
            said += line
            if "http://" in line:
                host, port = line.split("http://")[1].split("/")[0].rsplit(":", 1)
                yield Server(process, host, int(port))
                return
        raise UserError(f"the server did not start: {shown(said.strip(), 300)}")
    finally:
        process.terminate()
        process.wait()


# ---------------------------------------------------------------------------------------------------------------------
# The engine alone


def engine_alone(run: Run, bodies: Sequence[dict], seconds: float, pixels: bool) -> float:
    """Return its tokens a second. pixels: also turn tokens into text and images."""
    engine = Engine(run.model, run.vocab, run.image_tokenizer.n_codes_per_image, SLOTS)
    readers, seeds, tokens = {}, count(), 0

    def ask() -> None:
        seed = next(seeds)
        [request] = read_body(bodies[seed % len(bodies)] | {"seed": seed}, run)[1]
        readers[engine.add_request(request)] = Detokenizer(request.prompt, run.tokenizer)

    start = perf_counter()
    for _ in range(CLIENTS):
        ask()
    while readers:
        for output in engine.step():
            tokens += len(output.tokens)
            if pixels:
                for event in readers[output.request_id].add(output.tokens, output.finished):
                    if isinstance(event, Image):
                        run.image_tokenizer.decode(torch.tensor([event.codes]))
            if output.finished:
                del readers[output.request_id]
                if perf_counter() - start < seconds:
                    ask()
    return tokens / (perf_counter() - start)


# ---------------------------------------------------------------------------------------------------------------------
# Rows

Make = Callable[..., Row]


def one_client(server: Server, n: int, row: Make) -> Iterator[Row]:
    for name, asked in (("text", TEXT), ("a 64-code image", DRAW), ("a watched image", DRAW | {"preview": True})):
        result = server.load([asked], 1, requests=n)
        yield row(f"1 client: {name}", "first token", 1e3 * median(result.first), "ms")
        yield row(f"1 client: {name}", "whole answer", 1e3 * median(result.whole), "ms")


def many_clients(server: Server, run: Run, rounds: int, seconds: float, row: Make) -> Iterator[Row]:
    case = f"{CLIENTS} clients, {SLOTS} slots"
    jobs = {
        "engine alone: tokens": lambda: engine_alone(run, MIX, seconds / 2, pixels=False),
        "engine alone: text and pixels": lambda: engine_alone(run, MIX, seconds / 2, pixels=True),
    }
    rates, results = {name: [] for name in jobs}, []
    for _ in range(rounds):
        for name, job in jobs.items():
            rates[name].append(job())
        results.append(server.load(MIX, CLIENTS, seconds=seconds))
    rate = median(result.tokens / result.seconds for result in results)
    for name, each in rates.items():
        yield row(case, "server", rate, "tokens/s", rate / median(each), name)
    for name, each in rates.items():
        yield row(case, name, median(each), "tokens/s")
    yield row(case, "answers", sum(result.answers for result in results), "in all")
    yield row(case, "429 (busy)", sum(result.busy for result in results), "in all")
    watched = server.load([asked | {"preview": True} for asked in MIX], CLIENTS, seconds=seconds)
    yield row(case, "server, all images watched", watched.tokens / watched.seconds, "tokens/s")
    for name, each in (("first token", "first"), ("whole answer", "whole")):
        yield row(case, name, 1e3 * median(x for result in results for x in getattr(result, each)), "ms")


def bench(device: torch.device, quick: bool) -> Iterator[Row]:
    if device.type != "cpu":
        raise UserError("the server is measured on a CPU: leave out --device")
    model = ROOT / "models" / "toy"
    if not model.is_dir():
        raise UserError(f"{ROOT} holds no models/toy: run the bench `web` in a clone of the project")

    def row(case: str, variant: str, value: float, unit: str, *ratio) -> Row:
        return make_row("web", case, variant, value, unit, device, *ratio)

    run = open_model(model, "cpu", "auto", None)
    with serving(model) as server:
        server.load(MIX, CLIENTS, requests=8 * CLIENTS)
        yield from one_client(server, 11 if quick else 101, row)
        yield from many_clients(server, run, *((1, 4.0) if quick else (3, 20.0)), row)
        before, n = server.memory(), 200 if quick else 2_000
        server.load(MIX, CLIENTS, requests=n)
        yield row("memory", "before", before, "MB")
        yield row("memory", f"more after {n:,} requests", server.memory() - before, "MB")
