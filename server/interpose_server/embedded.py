"""`interpose serve`: broker, gateway and one worker a model, on one machine from one command."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from contextlib import suppress
from functools import partial

from interpose.errors import ConfigError, InternalError, InterposeError, ModelUnavailable
from redis.exceptions import RedisError

from .broker.accounts import Accounts
from .broker.connect import Broker, connect
from .broker.states import ModelState
from .datadir import DataDir, default_dir
from .models.spec import LOAD_S
from .processes import Child
from .settings import Settings
from .sockets import address_of, listen, url_of
from .tasks import end
from .valkey import EmbeddedValkey
from .wanted import Wanted
from .worker.status import USELESS_TO_RETRY

LOCAL = "local"
"""The user of the key made when there is none."""


async def serve(wanted: Wanted) -> None:
    """Serve until SIGTERM or SIGINT. Raises ConfigError if it can't start as asked."""
    data = DataDir(wanted.data_dir or default_dir())
    lock = data.lock()
    try:
        await Supervisor(wanted, data, lock).run()
    finally:
        data.unlock()


class Supervisor:
    """Starts everything in order, watches it, and stops it in the opposite order.

    Args:
        lock: descriptor of the data folder's lock.
    """

    verb = "serve"
    """By which it was started, for whoever finds its note in the data folder."""

    fsync = "everysec"
    """Of the embedded Valkey, where nobody says: "always" would make a trace of few milliseconds twice as long."""

    def __init__(self, wanted: Wanted, data: DataDir, lock: int) -> None:
        self._wanted = wanted
        self._data = data
        self._lock = lock
        self._stages: list[list[Child]] = []
        self._workers: list[Child] = []
        self._vouching: list[asyncio.Task[None]] = []
        self._stop = asyncio.Event()

    async def run(self) -> None:
        self._take_signals()
        settings, broker = self._settings("redis://unknown"), None
        bound = listen(self._wanted.host, self._wanted.port) if self._wanted.gateway else None
        try:
            settings = self._settings(self._wanted.redis_url or await self._valkey())
            broker = connect(settings)
            await broker.reach()
            token = await self._access(broker.accounts)
            host = url_of(bound) if bound else "no gateway"
            self._data.note(verb=self.verb, redis_url=settings.redis_url, host=host, pid=str(os.getpid()))
            await self._host(settings, broker)
            if bound:
                await self._gateway(settings, bound)
            if await self._ready(broker, bound):
                self._tell(bound, token)
                await self._stop.wait()
            say(await self._ended(broker))
        finally:
            await end(self._vouching)
            await self._finish(settings.grace_s)
            if bound:
                bound.close()
            self._data.forget()
            if broker is not None:
                await broker.close()
            say("stopped")

    def _take_signals(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._stop.set)

    async def _ended(self, broker: Broker) -> str:
        """What is said when it stops."""
        return "stopping"

    def _settings(self, redis_url: str) -> Settings:
        """The environment's settings, with what this command decides."""
        base = Settings.read()
        threads = base.worker_threads or max((os.cpu_count() or 1) // len(self._wanted.models), 1)
        changes = {
            "redis_url": redis_url,
            "data_dir": self._data.path,
            "metrics_open": base.metrics_open or self._wanted.private,
            "worker_threads": threads,
        }
        return base.model_copy(update=changes)

    async def _valkey(self) -> str:
        """Start the embedded broker. Returns its URL."""
        say("starting the embedded Valkey")
        valkey = EmbeddedValkey(self._data.path, Settings.read().valkey_fsync or self.fsync)
        # It inherits the lock: should this process be killed, the folder is free only once Valkey is gone.
        child = Child("Valkey", valkey.command(), say, pass_fds=[self._lock])
        self._stages.append([child])
        await child.start()
        await valkey.ready()
        return valkey.url

    async def _access(self, accounts: Accounts) -> str | None:
        """The token of the local key, if it is at hand.

        On loopback it is made when there are no keys, or when its token is to be printed and isn't known.

        Raises:
            ConfigError: others can connect, and there are no keys.
        """
        kept = self._data.read("local-key")
        if kept and await accounts.find(kept):
            return kept
        some = await accounts.any()
        if not self._wanted.private:
            if not some:
                raise ConfigError(
                    f"others can reach {self._wanted.host} and there are no keys; make one first: "
                    f"interpose keys create --user NAME --data-dir {self._data.path}"
                )
            return None
        if some and not self._wanted.print_env:
            return None
        token, _ = await accounts.create(LOCAL, admin=True)
        self._data.write_private("local-key", token)
        return token

    async def _host(self, settings: Settings, broker: Broker) -> None:
        """Have the models loaded. Returns before they are."""
        names = {model.name for model in self._wanted.models}
        if self._wanted.redis_url is None:
            # What an earlier command served here. With a shared Redis, others may be serving it.
            for hosted in await broker.models.list():
                if hosted.name not in names:
                    await broker.models.forget(hosted.name)
        env = _environment(settings)
        say(f"starting {len(names)} worker{'s' * (len(names) > 1)}")
        for index, model in enumerate(self._wanted.models):
            name = f"{socket.gethostname()}#{index}:{model.name}"
            await broker.models.announce(model.name, name, ModelState.LOADING)
            command = [sys.executable, "-m", "interpose_server.worker", "--model", model.name]
            command += ["--source", model.source, "--name", name]
            command += [part for name, at in model.adapters.items() for part in ("--adapter", f"{name}={at}")]
            command += ["--device", self._wanted.device] if self._wanted.device else []
            command += ["--dtype", self._wanted.dtype] if self._wanted.dtype else []
            label = f"the worker of {model.name}"
            ended = partial(tell_end, broker, model.name, name)
            again = partial(tell_start, broker, model.name, name)
            worker = Child(label, command, say, env=env, give_up=[USELESS_TO_RETRY], ended=ended, again=again)
            self._workers.append(worker)
            self._vouching.append(asyncio.create_task(vouch(broker, model.name, name, worker)))
        self._stages.append(self._workers)
        for worker in self._workers:
            await worker.start()

    async def _gateway(self, settings: Settings, bound: socket.socket) -> None:
        say(f"starting the gateway at {url_of(bound)}")
        command = [sys.executable, "-m", "interpose_server.gateway", "--fd", str(bound.fileno())]
        gateway = Child("the gateway", command, say, env=_environment(settings), pass_fds=[bound.fileno()])
        self._stages.append([gateway])
        await gateway.start()

    async def _ready(self, broker: Broker, bound: socket.socket | None) -> bool:
        """Wait until each model runs jobs and the gateway answers. False if told to stop meanwhile."""
        loaded = answered = False
        while not self._stop.is_set():
            loaded = loaded or await self._loaded(broker)
            answered = answered or bound is None or await _answers(bound)
            if answered and loaded:
                return True
            with suppress(TimeoutError):
                async with asyncio.timeout(0.03):
                    await self._stop.wait()
        return False

    async def _loaded(self, broker: Broker) -> bool:
        """Whether each model runs jobs. Raises ConfigError if one never will."""
        for worker in self._workers:
            if worker.gave_up.is_set():
                raise ConfigError(f"{worker.label} can't start; the line above says why")
        for model in self._wanted.models:
            if (await broker.models.get(model.name)).state is not ModelState.READY:
                return False
        return True

    def _served(self) -> list[str]:
        """The models that can be used."""
        return [model.name for model in self._wanted.models]

    def _tell(self, bound: socket.socket | None, token: str | None) -> None:
        """Say how to reach the server."""
        if bound is None:
            say(f"ready: {', '.join(self._served())}; Ctrl-C stops it")
            return
        say(f"ready at {url_of(bound)}: {', '.join(self._served()) or 'no model'}")
        if self._wanted.print_env:
            print(f"INTERPOSE_HOST={url_of(bound)}", flush=True)
            if token is not None:
                print(f"INTERPOSE_API_KEY={token}", flush=True)
            else:
                say("no key to print: keys are shown once, when they are made; see `interpose keys`")
            return
        key = token if token is not None else "the key you were given"
        say(f"  export INTERPOSE_HOST={url_of(bound)}")
        say(f"  export INTERPOSE_API_KEY={key}")
        say("Ctrl-C stops it")

    async def _finish(self, grace_s: float) -> None:
        """Gateway first, so that nothing new comes; the broker last, so that nothing is lost."""
        for stage in reversed(self._stages):
            await asyncio.gather(*(child.stop(grace_s) for child in stage))


async def vouch(broker: Broker, model: str, name: str, worker: Child, load_s: float = LOAD_S) -> None:
    """Say that a worker's process lives, while it loads.

    Until it has imported what it needs it can't say so itself: on a busy machine for longer than silence is borne.
    One that has said nothing for `load_s`, since its start or its last word, hangs: it is ended, and starts anew.
    """
    pid, vouched_ms, since = worker.pid, 0, time.monotonic()
    while True:
        spoke = True
        if worker.alive:
            # While the broker is away nobody can speak.
            with suppress(RedisError, OSError):
                heard_ms, now_ms = await broker.models.vouch(model, name)
                spoke, vouched_ms = heard_ms != vouched_ms, now_ms
        if spoke or worker.pid != pid:
            pid, since = worker.pid, time.monotonic()
        elif time.monotonic() - since > load_s:
            say(f"nothing was heard of {worker.label} for {load_s:g} s; ending it")
            hung = ModelUnavailable(f"its process said nothing for {load_s:g} s", details={"reason": "timeout"})
            await _tell_failed(broker, model, name, hung)
            worker.kill()
            since = time.monotonic()
        await asyncio.sleep(1)


async def tell_start(broker: Broker, model: str, name: str) -> None:
    """Of a worker that failed or died, and is about to be started again: who waits for it waits with reason."""
    with suppress(RedisError, OSError):
        await broker.models.announce(model, name, ModelState.LOADING)


async def tell_end(broker: Broker, model: str, name: str, status: int) -> None:
    """Of a worker that died while it loaded."""
    why = InternalError(f"its process ended with status {status} while it loaded {model}")
    await _tell_failed(broker, model, name, why)


async def _tell_failed(broker: Broker, model: str, name: str, why: InterposeError) -> None:
    with suppress(RedisError, OSError):
        await broker.models.announce(model, name, ModelState.FAILED, why, since=ModelState.LOADING)


def say(text: str) -> None:
    """One line for the operator."""
    print(text, file=sys.stderr, flush=True)


def _environment(settings: Settings) -> dict[str, str]:
    """Of the processes started here."""
    # Threads of torch that spin while they wait for one another stall on a busy machine: beside two busy
    # processes loading took ten times as long, and a forward four times.
    return {"OMP_WAIT_POLICY": "passive"} | settings.environment()


async def _answers(bound: socket.socket) -> bool:
    """Whether the gateway answers. The socket listens before the gateway runs, so connecting tells nothing."""
    try:
        async with asyncio.timeout(2):
            reader, writer = await asyncio.open_connection(*address_of(bound))
            try:
                writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                return b" 200 " in await reader.readline()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False
