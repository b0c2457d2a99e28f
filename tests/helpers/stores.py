"""Servers for tests: a real S3 API, a proxy to it that jams, and a scripted web server."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec

START_S = 60.0


@contextmanager
def s3_server() -> Iterator[int]:
    """Run a server during the block; yield its port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            _wait_for(port)
            _forget_servers()
            yield port
        finally:
            _forget_servers()
            server.kill()


def environment(port: int) -> dict[str, str]:
    """Variables that lead AWS's clients to this port only."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }


@contextmanager
def web_server(answers: Mapping[str, bytes]) -> Iterator[str]:
    """Run a server that answers `HEAD /x` and `GET /x` with these bytes, head and body.

    Yields its URL. It closes the connection after each answer. Other paths are 404.
    """

    class Answer(BaseHTTPRequestHandler):
        def handle_one_request(self) -> None:
            self.close_connection = True
            method, path = self.rfile.readline().decode().split()[:2]
            while self.rfile.readline().strip():
                pass
            answer = answers.get(f"{method} {path}", answers.get(path, status(404)))
            head, _, body = answer.partition(b"\r\n\r\n")
            self.wfile.write(head + b"\r\n\r\n" + (body if method == "GET" else b""))

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def status(code: int) -> bytes:
    """An answer without a body."""
    return b"HTTP/1.1 %d Answer %d\r\nContent-Length: 0\r\n\r\n" % (code, code)


def answer(body: bytes, *headers: str) -> bytes:
    """An answer with these headers, which may omit the length."""
    head = "\r\n".join(["HTTP/1.1 200 OK", "Connection: close", *headers])
    return head.encode() + b"\r\n\r\n" + body


def _forget_servers() -> None:
    """Make fsspec connect anew: it reuses connections even if the address has changed."""
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    raise TimeoutError("moto's server does not start")


class JammingProxy:
    """A proxy to a port that jams at `mark`: it passes on half of that request's body.

    Then `jammed` is set. When the client dies, the connection to the server closes too.
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
