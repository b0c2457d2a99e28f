"""A real S3 API for tests: moto's server in a process of its own, and a way to it that can jam."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

START_S = 60.0


@contextmanager
def s3_server() -> Iterator[int]:
    """The port of a server that is there while the block runs."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            _wait_for(port)
            yield port
        finally:
            server.kill()


def environment(port: int) -> dict[str, str]:
    """What leads AWS's clients there, and nowhere else."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    raise TimeoutError("moto's server does not start")


class JammedWay:
    """A port that leads to another, until `mark` is sent: of that connection half goes through.

    `jammed` is set then. As its client dies, so does the connection to the server.
    """

    def __init__(self, port: int, mark: bytes) -> None:
        self._server_port, self._mark = port, mark
        self.jammed = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._server_port))
                for ends in ((client, server), (server, client)):
                    threading.Thread(target=self._pass_on, args=ends, daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        is_jammed = False
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if self._mark in data:
                    is_jammed = True
                    target.sendall(data[: data.index(self._mark) + len(self._mark)])
                    head, _, body = data.partition(b"\r\n\r\n")
                    target.sendall(head[head.index(self._mark) + len(self._mark) :] + b"\r\n\r\n")
                    target.sendall(body[: len(body) // 2])
                    self.jammed.set()
                elif not is_jammed:
                    target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
