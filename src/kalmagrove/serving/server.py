"""kalmagrove serve: listens, answers, and stops when it is asked to."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from types import FrameType
from typing import Any

import uvicorn

from kalmagrove.errors import KalmaGroveError, UsageError
from kalmagrove.nn.grove import composed_weights
from kalmagrove.serving.app import Service, make_app
from kalmagrove.serving.models import open_models
from kalmagrove.serving.options import ServeLimits
from kalmagrove.serving.slots import Slots
from kalmagrove.training.signals import STOP_SIGNALS

SECONDS_AFTER_GRACE = 5
"""For a forward that is under way when the time of the running answers is over."""


def serve(
    source: str,
    *,
    host: str,
    port: int,
    name: str | None,
    adaptors: str,
    limits: ServeLimits,
    seed: int,
    device: str,
    say: Callable[[str], None],
) -> None:
    """Answers requests until a stop signal, and then what has begun, within the limit.

    Args:
        source: A run folder, a model folder or a Hub name.
        host: Address to listen at.
        port: 0 is any free one.
        name: Of the model in requests; None is the source as it was given.
        adaptors: "all" of the model's, "none", or names with commas between them.
        limits: Of the server.
        seed: Of the first request that has none; the next one has the next number.
        device: auto, cpu, cuda, cuda:N or mps.
        say: Takes lines for a person.

    Raises:
        UsageError: An option does not fit.
        KalmaGroveError: The model cannot be read, or the address is in use.
    """
    if not 0 <= seed < 2**62:
        raise UsageError(f"--seed must be between 0 and 2**62, got {seed}")
    # Before the model is read, so that an address in use is known at once.
    listener = _bound(host, port)
    with listener:
        served = open_models(source, name=name, adaptors=adaptors, device=device)
        with composed_weights(served.models[served.name].model):
            slots = Slots(limits.concurrency, limits.queue)
            service = Service(served, limits, slots, count(seed), say)
            asyncio.run(_run(service, listener, say))


async def _run(service: Service, listener: socket.socket, say: Callable[[str], None]) -> None:
    grace = service.limits.grace
    config = uvicorn.Config(
        make_app(service),
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=int(grace) + SECONDS_AFTER_GRACE,
    )
    host, port = listener.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    server = _Server(config, lambda: say(f"serving {', '.join(service.served.models)} at {address}; Ctrl-C stops it"))
    with _stop_signals(server, service.slots, grace, say):
        await server.serve(sockets=[listener])


class _Server(uvicorn.Server):
    """Says when it listens, and leaves signals to others."""

    def __init__(self, config: uvicorn.Config, when_started: Callable[[], None]) -> None:
        super().__init__(config)
        self._when_started = when_started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._when_started()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextmanager
def _stop_signals(server: uvicorn.Server, slots: Slots, grace: float, say: Callable[[str], None]) -> Iterator[None]:
    """The first signal lets running answers end within the limit, the second one ends them at their next token."""
    loop = asyncio.get_running_loop()

    def stop() -> None:
        if server.should_exit:
            slots.end()
            return
        say(f"stopping: running answers have {grace:g} seconds; the same again stops at once")
        server.should_exit = True
        slots.stop()
        loop.call_later(grace, slots.end)

    def remember(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(stop)

    before: dict[Any, Any] = {number: signal.signal(number, remember) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _bound(host: str, port: int) -> socket.socket:
    if not 0 <= port < 1 << 16:
        raise UsageError(f"--port must be between 0 and 65535, got {port}")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
            0
        ]
        listener = socket.socket(family, kind)
        try:
            # A port that was in use until just now is free.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen()
        except BaseException:
            listener.close()
            raise
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise KalmaGroveError(f"cannot listen at {host}:{port}: {reason}; choose another --port or --host") from error
    return listener
