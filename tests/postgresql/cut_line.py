"""A TCP proxy for a PostgreSQL server that a test can cut at a given message."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress

from sqlalchemy import URL, make_url


class CutLine:
    """Forwards bytes between clients on a loopback port and a server, until a test cuts the connections."""

    def __init__(self, url: str) -> None:
        self._server = make_url(url)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._mutex = threading.Lock()
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._word = b""
        self._answered = False
        self.refusing = False
        """Whether new clients are refused."""
        self.cuts = 0
        """Number of connections that were cut at the given word."""
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        query = {name: value for name, value in self._server.query.items() if name not in {"host", "port"}}
        port = self._listener.getsockname()[1]
        return self._server.set(host="127.0.0.1", port=port, query=query).render_as_string(hide_password=False)

    def cut_at(self, word: str, *, answered: bool) -> None:
        """Cut the next connection on which a client sends this word, once. If `answered`, only the answer is lost."""
        with self._mutex:
            self._word, self._answered = word.encode(), answered

    def cut_all(self) -> None:
        with self._mutex:
            pairs = list(self._pairs)
        for pair in pairs:
            self._end(pair)

    def close(self) -> None:
        self._listener.close()
        self.cut_all()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.refusing:
                client.close()
                continue
            pair = (client, self._connect(self._server))
            with self._mutex:
                self._pairs.add(pair)
            answer = threading.Event()
            threading.Thread(target=self._forward, args=(pair, answer), daemon=True).start()
            threading.Thread(target=self._answer, args=(pair, answer), daemon=True).start()

    @staticmethod
    def _connect(url: URL) -> socket.socket:
        host = url.host or str(url.query.get("host", "127.0.0.1"))
        port = url.port or int(str(url.query.get("port", 5432)))
        if host.startswith("/"):
            server = socket.socket(socket.AF_UNIX)
            server.connect(f"{host}/.s.PGSQL.{port}")
            return server
        return socket.create_connection((host, port))

    def _end(self, pair: tuple[socket.socket, socket.socket]) -> None:
        with self._mutex:
            self._pairs.discard(pair)
        for end in pair:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _forward(self, pair: tuple[socket.socket, socket.socket], answer: threading.Event) -> None:
        client, server = pair
        with suppress(OSError):
            while data := client.recv(65536):
                with self._mutex:
                    found = bool(self._word) and self._word in data
                    if found:
                        self._word = b""
                        self.cuts += 1
                if found:
                    if not self._answered:
                        break
                    answer.set()
                server.sendall(data)
        if not answer.is_set():
            self._end(pair)

    def _answer(self, pair: tuple[socket.socket, socket.socket], answer: threading.Event) -> None:
        client, server = pair
        with suppress(OSError):
            while data := server.recv(65536):
                if answer.is_set():
                    break  # the server has executed the statement, but no client gets the answer
                client.sendall(data)
        self._end(pair)
