"""Clients that close their sockets: a real server frees their slots, and what waits for them is forgotten."""

import json
import socket
import threading
from urllib.parse import urlsplit

import pytest
import torch
from faults import wait_for
from serving import PATIENCE, served
from tiny_site import tiny_site

from nanochameleon.generation.engine import Engine
from nanochameleon.web.app import application

OPTIONS = {"guidance_scale": 1}  # so that a sample takes one slot
BODY = {"turns": [{"role": "user", "segments": [{"text": "a red star"}]}], "mode": "free", "options": OPTIONS}
STREAMED = [("/api/generate", BODY)]


def post(address: str, path: str, body: dict) -> socket.socket:
    """Send a request and return its socket once the answer begins."""
    connection = socket.create_connection((urlsplit(address).hostname, urlsplit(address).port), timeout=PATIENCE)
    content = json.dumps(body).encode()
    lines = f"POST {path} HTTP/1.1", f"Host: {urlsplit(address).netloc}", "Content-Type: application/json"
    head = "\r\n".join([*lines, "Connection: close", f"Content-Length: {len(content)}", "", ""])
    connection.sendall(head.encode() + content)
    assert connection.recv(12) == b"HTTP/1.1 200"
    return connection


@torch.inference_mode()
def endless(engine: Engine) -> list:
    """A step after which no request is further: each keeps its slot."""
    engine.schedule()
    threading.Event().wait(0.001)
    return []


@pytest.mark.parametrize(("path", "body"), STREAMED)
def test_a_socket_that_closes_frees_its_slot(monkeypatch, path, body):
    site = tiny_site()  # 4 slots
    worker = site.worker
    with served(application(site)) as address:
        monkeypatch.setattr(Engine, "step", endless)
        running = [post(address, path, body) for _ in range(4)]
        wait_for(lambda: worker.slots_in_use == 4)
        waiting = [post(address, path, body) for _ in range(2)]
        wait_for(lambda: len(worker.batch.engine.waiting) == 2)
        waiting.pop().close()
        wait_for(lambda: len(worker.batch.engine.waiting) == 1)
        running.pop().close()
        wait_for(lambda: not worker.batch.engine.waiting and worker.slots_in_use == 4)  # who waited has the slot
        for connection in running + waiting:
            connection.close()
        wait_for(lambda: worker.slots_in_use == 0 and not worker.clients and not worker.batch.clients)
        monkeypatch.undo()
        with post(address, path, body) as connection, connection.makefile("rb") as answer:
            assert b'"end"' in answer.read()


def test_a_server_that_ends_says_so_to_its_streams(monkeypatch):
    site = tiny_site()
    with served(application(site)) as address:
        monkeypatch.setattr(Engine, "step", endless)
        with post(address, "/api/generate", BODY) as connection, connection.makefile("rb") as answer:
            wait_for(lambda: site.worker.slots_in_use == 1)
            site.worker.stop()
            assert b"the server is ending" in answer.read()
