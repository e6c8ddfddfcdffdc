"""The server: checks what was asked for, loads the base, and answers until Ctrl-C."""

import ipaddress
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import uvicorn

from perce_lite.console import say
from perce_lite.errors import ServeError
from perce_lite.serve.answers import Answers
from perce_lite.serve.app import Service, build_app
from perce_lite.serve.desk import Desk
from perce_lite.serve.directory import Directory, Fleet, OneAdapter, tied_users
from perce_lite.serve.guard import Guard, Hosts, is_loopback
from perce_lite.serve.keys import read_keys
from perce_lite.serve.pool import Pool
from perce_lite.words import counted


@dataclass(frozen=True)
class Settings:
    """How to serve.

    port: 0: one that is free
    allow_hosts: names beside `host` that the server may be called by
    max_queue, queue_seconds: of `Desk`; answer_seconds: of `Service`
    adapter_mib: MiB of adapters in memory
    framed: whether a notebook may show the page
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: Path | None = None
    allow_hosts: Sequence[str] = field(default=())
    max_queue: int = 8
    queue_seconds: float = 120.0
    answer_seconds: float = 600.0
    adapter_mib: int = 1024
    framed: bool = False


class Server(uvicorn.Server):
    """Answers what is under way when it is stopped, and sends away who waits."""

    def __init__(self, service: Service, app: Guard, listening: socket.socket) -> None:
        config = uvicorn.Config(
            app, log_level="critical", access_log=False, log_config=None, server_header=False, ws="none"
        )  # uvicorn's own lines would hold users' names and, in a trace, texts
        super().__init__(config)
        self.service, self._listening = service, listening

    @property
    def url(self) -> str:
        """Where the page is."""
        host, port = self._listening.getsockname()[:2]
        return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"

    def serve_until_stopped(self) -> None:
        """Answers until Ctrl-C, or `stop`."""
        try:
            self.run(sockets=[self._listening])
        finally:
            self.service.held_out.close()

    def stop(self) -> None:
        """Ends it from another thread."""
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Sends away who waits, then lets the answer under way end."""
        self.service.desk.close()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first Ctrl-C ends it when the answer under way is finished, the second at once."""
        if not self.should_exit:
            say("Stopping: the answer under way is finished; Ctrl-C again leaves it.")
        super().handle_exit(sig, frame)


def make_server(adapter: Path | None, fleet: Path | None, settings: Settings) -> Server:
    """A server of the adapter in `adapter`, or of the fleet in `fleet`, that listens already.

    Raises:
        ServeError: an address that may not or cannot be listened to, keys that cannot be used.
        AdapterError, FleetError: nothing to serve there; ModelError, DeviceError: the base cannot be loaded.
    """
    if settings.api_key_file is None and not (is_loopback(settings.host) and not settings.allow_hosts):
        raise ServeError(
            f"--host {settings.host}: others could reach it, so it needs --api-key-file FILE with a key a line, such "
            "as `openssl rand -hex 24` makes. Without: --host 127.0.0.1 and no --allow-host."
        )
    keys = read_keys(settings.api_key_file)
    directory: Directory = OneAdapter(adapter) if adapter is not None else Fleet(fleet or Path())
    tied_users(keys.callers.values(), directory)
    listening = _listening(settings.host, settings.port)
    say("Loading the base ...")
    pool = Pool(directory.reference, settings.adapter_mib * 2**20)
    desk = Desk(settings.max_queue, settings.queue_seconds)
    service = Service(directory, Answers(directory, pool), desk, settings.answer_seconds, settings.framed)
    return Server(service, build_app(service, Hosts(settings.host, settings.allow_hosts), keys), listening)


def told_at_start(server: Server, settings: Settings) -> str:
    """What the terminal shows when it is ready."""
    entries = server.service.directory.entries()
    users = sum(entry.kind == "user" for entry in entries)
    shared = ", ".join(entry.id for entry in entries if entry.kind != "user")
    return (
        f"The page: {server.url}   OpenAI clients: {server.url}v1\n"
        f"Models: {shared} and {counted(users, 'user')}. Adapters are loaded when they are asked for, up to "
        f"{settings.adapter_mib} MiB, and dropped by least use. One answer at a time, {settings.max_queue} may wait.\n"
        "Ctrl-C ends it."
    )


@contextmanager
def running(server: Server) -> Iterator[Server]:
    """Runs it in a thread inside the block."""
    thread = threading.Thread(target=server.serve_until_stopped, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join()


def _listening(host: str, port: int) -> socket.socket:
    """A socket that listens; raises ServeError."""
    try:
        family = socket.AF_INET6 if ":" in host and ipaddress.ip_address(host).version == 6 else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except (OSError, ValueError, OverflowError) as error:
        raise ServeError(
            f"--host {host} --port {port}: cannot be listened to: {error}. Give another --port; 0 takes a free one."
        ) from error
