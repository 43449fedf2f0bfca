"""Round trips and a bulk transfer over TCP between two hosts, for the tests of the links.

python echo.py serve PORT | python echo.py measure ADDRESS PORT NUM_BYTES -> one JSON object
"""

from __future__ import annotations

import json
import socket
import sys
import time

_NUM_TRIPS = 20


def serve(port: int) -> None:
    with socket.create_server(("", port)) as listener:
        connection, _ = listener.accept()
        with connection:
            for _ in range(_NUM_TRIPS):
                connection.sendall(_read(connection, 1))
            size = int.from_bytes(_read(connection, 8), "big")
            _read(connection, size)
            connection.sendall(b"x")


def measure(address: str, port: int, num_bytes: int) -> dict[str, float]:
    """Least of some round trips, and the seconds of `num_bytes` one way and an answer."""
    with _connect(address, port) as connection:
        trips = []
        for _ in range(_NUM_TRIPS):
            start_s = time.perf_counter()
            connection.sendall(b"x")
            _read(connection, 1)
            trips.append(time.perf_counter() - start_s)
        start_s = time.perf_counter()
        connection.sendall(num_bytes.to_bytes(8, "big"))
        connection.sendall(bytes(num_bytes))
        _read(connection, 1)
        return {"round_trip_s": min(trips), "bulk_s": time.perf_counter() - start_s}


def _connect(address: str, port: int) -> socket.socket:
    deadline = time.monotonic() + 10
    while True:
        try:
            connection = socket.create_connection((address, port), timeout=30)
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        else:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return connection


def _read(connection: socket.socket, size: int) -> bytes:
    data = b""
    while size:
        data = connection.recv(min(size, 1 << 20))
        if not data:
            raise EOFError("the other host closed the connection")
        size -= len(data)
    return data


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(int(sys.argv[2]))
    else:
        print(json.dumps(measure(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
