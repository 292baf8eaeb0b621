r"""An OpenAI-compatible endpoint that streams tokens at known times, for measuring what measures:
thousands of streams.

    python -m benchmarks.fake_endpoint --port 8000 --ttft-ms 200 --itl-ms 20 [--jitter 0.5] \
        [--error-share 0.05]

Tokens are due at absolute times, so that lateness does not add up. With jitter, the gaps between
tokens differ by up to that share, and are the same on average. Every so many requests, by the error
share, one ends with HTTP 500.
"""

from __future__ import annotations

import asyncio
import json
import random
from itertools import count
from typing import Annotated, Any

import typer

HEAD = b"HTTP/1.1 %s\r\nContent-Type: %s\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"


class Endpoint:
    def __init__(self, ttft_s: float, itl_s: float, jitter: float, error_share: float) -> None:
        self.ttft_s, self.itl_s, self.jitter = ttft_s, itl_s, jitter
        self.fails_each = round(1 / error_share) if error_share else 0
        self.numbers = count(1)
        self.generator = random.Random(0)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answers the requests of one connection, until the client closes it."""
        try:
            while (request := await _read_request(reader)) is not None:
                if not request:
                    _answer(writer, b"200 OK", {"data": [{"id": "fake"}]})
                elif self.fails_each and next(self.numbers) % self.fails_each == 0:
                    _answer(writer, b"500 Internal Server Error", {"error": "as asked"})
                else:
                    await self._stream(writer, request["max_tokens"])
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _stream(self, writer: asyncio.StreamWriter, tokens: int) -> None:
        clock = asyncio.get_running_loop().time
        begun_s = clock()
        writer.write(HEAD % (b"200 OK", b"text/event-stream") + CHUNKED)
        for number in range(1, tokens + 1):
            swing = self.jitter * self.generator.uniform(-1, 1) if 1 < number < tokens else 0.0
            due_s = begun_s + self.ttft_s + self.itl_s * (number - 1 + swing / 2)
            await asyncio.sleep(max(0.0, due_s - clock()))
            _write_event(
                writer, {"choices": [{"text": "x"}], "usage": {"completion_tokens": number}}
            )
        writer.write(_chunk(b"data: [DONE]\n\n") + _chunk(b""))


async def _read_request(reader: asyncio.StreamReader) -> dict[str, Any] | None:
    """The JSON of a POST, {} for a GET, None where the connection ended."""
    head = await reader.readuntil(b"\r\n\r\n")
    lengths = [
        line.partition(b":")[2]
        for line in head.lower().split(b"\r\n")
        if line.startswith(b"content-length:")
    ]
    if not head.startswith(b"POST"):
        return {}
    body: dict[str, Any] = json.loads(await reader.readexactly(int(lengths[0])))
    return body


def _answer(writer: asyncio.StreamWriter, status: bytes, value: Any) -> None:
    body = json.dumps(value).encode()
    writer.write(
        HEAD % (status, b"application/json") + b"Content-Length: %d\r\n\r\n" % len(body) + body
    )


def _write_event(writer: asyncio.StreamWriter, event: dict[str, Any]) -> None:
    writer.write(_chunk(b"data: " + json.dumps(event).encode() + b"\n\n"))


def _chunk(body: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(body), body)


def main(
    port: Annotated[int, typer.Option()],
    ttft_ms: float = 200.0,
    itl_ms: float = 20.0,
    jitter: float = 0.0,
    error_share: float = 0.0,
) -> None:
    endpoint = Endpoint(ttft_ms / 1000, itl_ms / 1000, jitter, error_share)

    async def run() -> None:
        server = await asyncio.start_server(endpoint.serve, "127.0.0.1", port, backlog=4096)
        await server.serve_forever()

    asyncio.run(run())


if __name__ == "__main__":
    typer.run(main)
