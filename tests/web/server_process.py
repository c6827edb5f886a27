"""The server as a process of its own, which a test may kill and start again at the same address.

with ServerProcess("models/toy") as server: server.address; server.kill(); server.start()
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import httpx
from serving import PATIENCE

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


class ServerProcess:
    def __init__(self, log: Path, *arguments: str):
        self.port, self.log = free_port(), log
        self.address = f"http://127.0.0.1:{self.port}"
        self.command = [sys.executable, "-m", "nanochameleon.web", *arguments, "--port", str(self.port)]

    def start(self) -> None:
        """Return once it answers. Raises RuntimeError with its output where it ends instead."""
        threads = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, cwd=ROOT, env={**os.environ, **threads}, stdout=log, stderr=log
            )
        while not self.answers():
            try:
                self.process.wait(0.05)
            except subprocess.TimeoutExpired:
                continue
            raise RuntimeError(f"the server ended with {self.process.returncode}: {self.log.read_text()}")

    def answers(self) -> bool:
        try:
            return httpx.get(f"{self.address}/healthz", timeout=PATIENCE).is_success
        except httpx.TransportError:
            return False

    def kill(self) -> None:
        """End it at once, as a power cut does."""
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> "ServerProcess":
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.kill()
