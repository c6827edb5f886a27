"""The command: mistakes are one sentence and exit code 2 before torch is imported; Ctrl-C ends open streams at once."""

import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from serving import PATIENCE
from tiny import tiny_run

from nanochameleon.errors import UserError
from nanochameleon.evaluate.people.make import build
from nanochameleon.evaluate.people.prompts import Prompt
from nanochameleon.web import __main__ as command

ROOT = Path(__file__).parents[2]
get = partial(httpx.get, timeout=PATIENCE)
TOKEN = "a-token-of-23-characters"
WITHOUT_TORCH = """
import runpy, sys

class NoTorch:
    def find_spec(self, name, *_):
        if name == "torch":
            raise ImportError("torch is imported")

sys.meta_path.insert(0, NoTorch())
runpy.run_module("nanochameleon.web", run_name="__main__")
"""
ENDLESS = """
import asyncio, socket
from starlette.applications import Starlette
from starlette.routing import Route
from nanochameleon.errors import exit_on_user_error
from nanochameleon.web import limits
from nanochameleon.web.bodies import event_stream
from nanochameleon.web.server import serve

limits.END_SECONDS = 1_000_000  # nothing may need it

async def stream(request):
    async def events():
        while True:
            yield "x"
            await asyncio.sleep(0)
    return event_stream(events())

async def silent(request):
    await asyncio.sleep(1_000_000)

async def crash(request):
    raise ZeroDivisionError("\\x1b]0;PWNED\\x07")

listening = socket.create_server(("127.0.0.1", 0))
lines = [f"the page is at http://127.0.0.1:{listening.getsockname()[1]}/"]
app = Starlette(routes=[Route("/stream", stream), Route("/silent", silent), Route("/crash", crash)])
exit_on_user_error(lambda: serve(app, listening, lines))
"""


COMPILING = """
import socket, threading
from contextlib import asynccontextmanager
from starlette.applications import Starlette
from nanochameleon.errors import exit_on_user_error
from nanochameleon.web.server import serve

@asynccontextmanager
async def lifespan(app):
    threading.Timer(0, print, ["soon the page is at"], {"flush": True}).start()
    threading.Event().wait(60)
    yield

listening = socket.create_server(("127.0.0.1", 0))
exit_on_user_error(lambda: serve(Starlette(lifespan=lifespan), listening, []))
"""


def sentence(*words: str) -> str:
    """Return what the command says of a mistake."""
    with pytest.raises(UserError) as found:
        command.start([*words])
    return str(found.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "models/toy"),
        (["models/toy", "--study", "study"], "--study DIR"),
        (["models/toy", "--port", "65536"], "--port must be from 0 to 65535, not 65536"),
        (["models/toy", "--port", "-1"], "--port"),
        (["models/toy", "--slots", "0"], "--slots must be from 1"),
        (["models/toy", "--token", "short"], "--token must have 16 or more characters"),
        (["models/toy", "--token", ""], "secrets.token_urlsafe"),
        (["models/toy", "--token", "\u00e9" * 20], "ASCII"),
        (["--study", "study", "--red-team", "log.jsonl"], "--red-team"),
        (["models/toy", "--red-team", "log.txt"], ".jsonl"),
        (["models/toy", "--host", "no.such.host.invalid", "--port", "0"], "--host no.such.host.invalid"),
        (["models/toy", "--host", "192.0.2.1", "--port", "0"], "cannot listen at 192.0.2.1"),
        (["no/such/model", "--port", "0"], "no/such/model"),
        (["--study", "no/such/study", "--port", "0"], "no/such/study"),
    ],
)
def test_a_mistake_is_a_sentence_that_says_what_to_do(words, said):
    assert said in sentence(*words)


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_other_machines_are_let_in_with_a_token_alone(host):
    if host == "::" and not socket.has_ipv6:
        pytest.fail("this machine has no IPv6: run this test on one that has")
    said = sentence("no/such/model", "--host", host, "--port", "0")
    assert "--token" in said and "secrets.token_urlsafe" in said
    made = subprocess.run([sys.executable, "-c", re.search(r'-c "(.*)"', said)[1]], capture_output=True, text=True)
    assert len(made.stdout.strip()) >= command.MIN_TOKEN


def test_the_environment_may_hold_the_token_which_a_command_shows_to_every_user(monkeypatch):
    words = ["no/such/model", "--host", "0.0.0.0", "--port", "0"]
    monkeypatch.setenv(command.TOKEN_VARIABLE, "short")
    assert "must have 16 or more characters" in sentence(*words)
    assert "no/such/model" in sentence(*words, "--token", TOKEN)  # the option counts before the environment
    monkeypatch.setenv(command.TOKEN_VARIABLE, TOKEN)
    assert "no/such/model" in sentence(*words)


@pytest.mark.parametrize("mistake", [["--port", "70000"], ["--token", "short"], ["--host", "0.0.0.0"], ["--nothing"]])
def test_a_mistake_ends_with_2_and_one_line_before_torch_is_imported(mistake):
    words = [sys.executable, "-c", WITHOUT_TORCH, "models/toy", "--port", "0", *mistake]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stdout == ""
    assert mistake == ["--nothing"] or (done.stderr.startswith("error: ") and done.stderr.count("\n") == 1)


def test_a_busy_port_is_found_before_the_model_is_opened():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        said = sentence("no/such/model", "--port", port)
    assert "--port" in said and port in said


@pytest.mark.parametrize("missing", ["starlette", "uvicorn"])
def test_without_the_extra_the_sentence_says_what_to_install(missing, monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == missing else object())
    assert sentence("models/toy") == f"{missing} is missing: pip install -c constraints.txt -e '.[web]'"


def access(*words: str) -> set[str]:
    """The names that a server with these options answers to, without the ports."""
    args = command.parse(command.Args, ["models/toy", "--port", "0", *words])
    with command.listen(args) as listening:
        port = listening.getsockname()[1]
        return {host.removesuffix(f":{port}") for host in command.access_of(args, listening).hosts(port)}


def test_the_server_answers_to_the_names_that_are_given():
    here = {"127.0.0.1", "localhost", "[::1]"}
    assert access() == access("--host", "localhost") == here
    assert access("--host", "127.0.0.2") == here | {"127.0.0.2"}
    names = ["--allow-host", "Chat.Example", "10.0.0.7"]
    assert access("--host", "0.0.0.0", "--token", TOKEN, *names) == here | {"chat.example", "10.0.0.7"}  # not 0.0.0.0


# ---------------------------------------------------------------------------------------------------------------------
# Servers


@contextmanager
def started(*words: str, code: str | None = None):
    """Yield a running server and the line that it says."""
    program = ["-c", code] if code else ["-m", "nanochameleon.web"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, *program, *words], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        lines = iter(process.stdout.readline, "")
        yield process, next(line for line in lines if "the page is at" in line)
    finally:
        process.kill()
        process.communicate()


def address_in(line: str) -> str:
    return re.search(r"http://127\.0\.0\.1:\d+/", line)[0]


POSIX = pytest.mark.skipif(os.name != "posix", reason="signals are sent as a terminal of POSIX sends them")


@POSIX
def test_ctrl_c_ends_what_would_never_end_at_once_and_says_only_that():
    with started(code=ENDLESS) as (process, line):
        at = "127.0.0.1", urlsplit(address_in(line)).port
        with (
            socket.create_connection(at) as waiting,
            socket.create_connection(at) as not_reading,
            httpx.stream("GET", address_in(line) + "stream", timeout=PATIENCE) as answer,
        ):
            waiting.sendall(b"GET /silent HTTP/1.1\r\nHost: x\r\n\r\n")
            not_reading.sendall(b"GET /stream HTTP/1.1\r\nHost: x\r\n\r\n")
            next(answer.iter_raw())
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=PATIENCE)
        assert (process.returncode, out, err) == (130, "", "\nstopped\n")


@POSIX
def test_a_crash_is_logged_once_and_a_mistake_of_a_client_is_not():
    with started(code=ENDLESS) as (process, line):
        assert get(address_in(line) + "crash").status_code == 500
        with socket.create_connection(("127.0.0.1", urlsplit(address_in(line)).port)) as client:
            client.sendall(b"no HTTP\r\n\r\n")
            assert client.recv(100).startswith(b"HTTP/1.1 400")
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=PATIENCE)[1]
    assert err.count("ZeroDivisionError") == err.count("Traceback") == 1 and "in crash" in err
    assert err.endswith("]0;PWNED\ufffd\n\nstopped\n") and "\x1b" not in err


@POSIX
def test_a_model_is_served_without_its_path_and_ctrl_c_ends_its_streams(tmp_path):
    model = tiny_run(tmp_path / "tiny")
    with started(str(model), "--port", "0") as (process, line):
        for path in ("", "api/settings", "v1/models", "v1/models/nothing", "metrics", "static/nothing", "nothing"):
            answer = get(address_in(line) + path)
            assert answer.text and str(tmp_path) not in answer.text and str(ROOT) not in answer.text
        assert get(address_in(line) + "v1/models").json()["data"][0]["id"] == "tiny"
        body = {"turns": [{"role": "user", "segments": [{"text": "a red star"}]}], "mode": "free", "samples": 8}
        with httpx.stream("POST", address_in(line) + "api/generate", json=body, timeout=PATIENCE) as answer:
            next(answer.iter_raw())
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=PATIENCE)
        assert (process.returncode, out, err) == (130, "", "\nstopped\n")


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("study") / "study"
    prompts = [Prompt(f"p{i}", "kind", [{"text": f"draw {i}"}]) for i in range(3)]
    build(folder, prompts, {name: [[{"text": f"{name} {i}"}] for i in range(3)] for name in ("one", "two")})
    return folder


def test_a_study_is_served_without_torch_and_its_owner_gets_a_link(study):
    with started("--study", str(study), "--port", "0", code=WITHOUT_TORCH) as (process, line):
        owner = process.stdout.readline()
        page = get(address_in(line)).content
        assert page == (Path(command.__file__).parent / "static" / "study.html").read_bytes()
        key = re.fullmatch(rf"its owner sees the results at {address_in(line)}owner#key=(\S+)\n", owner)[1]
        results = get(address_in(line) + "api/owner/results", headers={"x-owner-key": key})
        assert results.status_code == 200
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=PATIENCE)
        assert (process.returncode, err) == (130, "\nstopped\n")


@POSIX
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_server_while_its_model_starts(number):
    """Kernels may compile for a minute."""
    with started(code=COMPILING) as (process, _):
        process.send_signal(number)
        assert process.wait(20) == -number and process.stderr.read() == ""
