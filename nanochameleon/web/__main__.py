"""A page in the browser: talk to a model, see its tokens, judge its answers; and an HTTP API.

    python -m nanochameleon.web models/toy                              the page, at http://127.0.0.1:8000/
    python -m nanochameleon.web models/toy --red-team log.jsonl         with labels for red teaming
    python -m nanochameleon.web --study study                           people judge pairs of answers
    python -m nanochameleon.web models/toy --host 0.0.0.0 --token T     for other machines, too

MODEL is a run, models/toy or a model in any layout. Only this machine is answered, unless --host says otherwise.
"""

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from nanochameleon.cli import check_kernels, parse
from nanochameleon.errors import UserError, exit_on_user_error, say, shown

if TYPE_CHECKING:  # torch is imported after the arguments are parsed, so that mistakes in them are found at once
    from nanochameleon.web.head import Access
    from nanochameleon.web.site import Site

PROGRAM = "python -m nanochameleon.web"
MAKE_TOKEN = 'python -c "import secrets; print(secrets.token_urlsafe())"'
MIN_TOKEN = 16  # characters
TOKEN_VARIABLE = "NANOCHAMELEON_TOKEN"


@dataclass(frozen=True)
class Args:
    """Serve the page."""

    model: tyro.conf.Positional[Path | None] = None
    """A run, such as runs/toy, or a model in our, Hugging Face's or Meta's layout."""
    host: str = "127.0.0.1"
    """The address to listen at. One that other machines reach needs --token."""
    port: int = 8000
    """0 takes a free one."""
    token: str | None = None
    """What clients must know: Authorization: Bearer TOKEN, or once /?token=TOKEN in a browser. The environment may give
    it as NANOCHAMELEON_TOKEN instead, since other users of this machine see the words of a command."""
    allow_host: tuple[str, ...] = ()
    """Further names of this server, as they are in the browser's address."""
    device: str = "auto"
    """cpu, cuda, ...; auto takes a GPU if there is one."""
    dtype: Literal["auto", "fp32", "bf16", "int8"] = "auto"
    """Type of the transformer's weights; auto keeps that of its files."""
    vqgan: Path | None = None
    """A file with the image decoder, for a model from transformers, which drops it."""
    slots: int | None = None
    """Samples that the model makes at once; guidance takes 2 or 3 for one. None takes 16, or fewer where their KV
    caches would need more than 4 GB."""
    red_team: Path | None = None
    """Add labels to the page, and log what people label to this file (.jsonl)."""
    study: Path | None = None
    """Instead of a model: the folder of a study that people judge."""

    def check(self) -> None:
        """Raise UserError, naming the option, for a value out of range."""
        for name, good, requested in (
            ("port", 0 <= self.port < 2**16, f"from 0 to {2**16 - 1}"),
            ("slots", self.slots is None or 1 <= self.slots <= 1024, "from 1 to 1,024"),
        ):
            if not good:
                raise UserError(f"--{name} must be {requested}, not {shown(getattr(self, name))}")
        if (self.model is None) == (self.study is None):
            raise UserError("give either a model, such as models/toy, or --study DIR")
        if self.study and self.red_team:
            raise UserError("--red-team is for a model: leave it out with --study")
        if self.token is not None and not (
            len(self.token) >= MIN_TOKEN and self.token.isascii() and self.token.isprintable()
        ):
            raise UserError(f"--token must have {MIN_TOKEN} or more characters of ASCII: make one by {MAKE_TOKEN}")


def listen(args: Args) -> socket.socket:
    """Take the port, before a model is loaded in vain. Raises UserError."""
    try:
        kind, _, _, _, address = socket.getaddrinfo(args.host, args.port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise UserError(f"--host {shown(args.host)} is no address of this machine") from None
    try:
        return socket.create_server(address, family=kind)
    except OSError as error:
        why = os.strerror(error.errno)
        raise UserError(
            f"cannot listen at {shown(args.host)}, port {args.port} ({why}): try another --host or --port"
        ) from None


def access_of(args: Args, listening: socket.socket) -> "Access":
    """Return who may ask. Raises UserError where other machines could, and no token is set."""
    from nanochameleon.web.head import Access

    address, given = ip_address(listening.getsockname()[0]), args.host.lower()
    if not (address.is_loopback or args.token):
        host = shown(args.host)
        raise UserError(f"--host {host} lets other machines in, so it needs a --token: make one by {MAKE_TOKEN}")
    names = [] if address.is_unspecified else [f"[{given}]" if ":" in given else given]
    return Access((*map(str.lower, args.allow_host), *names), args.token)


def open_model_site(args: Args) -> "Site":
    from nanochameleon.generation.quantize import quantize_
    from nanochameleon.training.run import pick_device
    from nanochameleon.web.site import Site
    from nanochameleon.web.worker import Worker
    from nanochameleon.weights.model_folder import open_model

    check_kernels(pick_device(args.device))
    run = open_model(args.model, args.device, "auto" if args.dtype == "int8" else args.dtype, args.vqgan)
    if args.dtype == "int8":
        quantize_(run.model)
    return Site(args.model.resolve().name, run, Worker(run, args.slots), args.red_team)


def main(args: Args) -> None:
    args.check()
    if args.red_team:
        from nanochameleon.evaluate.red_team import prepare

        prepare(args.red_team)
    from nanochameleon.web import judge
    from nanochameleon.web.app import application
    from nanochameleon.web.server import serve

    with listen(args) as listening:
        access = access_of(args, listening)
        site = judge.open_site(args.study) if args.study else open_model_site(args)
        address = access.address(listening.getsockname()[1])
        lines = [f"the page is at {address}{'?token=TOKEN' if args.token else ''} (Ctrl-C ends the server)"]
        lines += [f"its owner sees the results at {address}owner#key={site.owner_key}"] if args.study else []
        if not args.study:
            say("starting the model; the first start on a machine also compiles kernels, for up to a minute")
        serve(application(site, access), listening, lines)


def start(arguments: Sequence[str] | None = None) -> None:
    if missing := [name for name in ("starlette", "uvicorn") if not find_spec(name)]:
        raise UserError(f"{missing[0]} is missing: pip install -c constraints.txt -e '.[web]'")
    args = parse(Args, arguments, description=__doc__, prog=PROGRAM)
    main(args if args.token is not None else replace(args, token=os.environ.get(TOKEN_VARIABLE)))


if __name__ == "__main__":
    exit_on_user_error(start)
