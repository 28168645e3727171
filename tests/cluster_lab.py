"""Models deployed on a Ray cluster of several nodes, and a load of jobs whose every end is accounted for."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import msgpack
import psutil
import redis
import torch
from interpose.graph.model import Graph, Invoke, Node, Point, Run
from interpose.graph.values import Ref
from interpose.wire.submission import Submission, encode_submission
from interpose_server.broker import keys
from interpose_server.shards.naming import app_name
from interpose_server.sockets import listen
from ray_cluster import RayCluster, ray_cluster
from rig import Valkey
from safetensors.torch import load
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

INTERPOSE = Path(sys.executable).with_name("interpose")
CHILD = Path(__file__).resolve().parents[1] / "server" / "interpose_server" / "child.py"
SETTINGS = {"measure_s": 0, "lease_s": 6, "max_attempts": 8}
"""A job may be hit by several kills, which isn't held against it here."""

BLOCK = "transformer.h.1"

WAITING = 30
"""So many jobs at most wait at a time, or a slow machine would never be done with them."""


@dataclass
class ClusterLab:
    """A gateway and a Valkey here, the models on `ray`."""

    ray: RayCluster
    valkey: Valkey
    folder: Path
    host: str
    key: str
    env: Mapping[str, str]
    settings: Mapping[str, Any]

    def deploy(self, *models: Mapping[str, Any]) -> None:
        """`deploy up` with so many models; returns when they run."""
        self.interpose("deploy", "up", self.config(*models))

    def config(self, *models: Mapping[str, Any]) -> Path:
        path = self.folder / "cluster.yaml"
        plain = {
            "ray": self.ray.address,
            "redis_url": self.valkey.url,
            "data_dir": str(self.folder),
            "settings": dict(self.settings),
            "models": list(models),
        }
        path.write_text(json.dumps(plain))  # which is YAML, too
        return path

    def interpose(self, *words: str | Path) -> str:
        done = subprocess.run(
            [INTERPOSE, *words], env=self.env, capture_output=True, text=True, timeout=180, stdin=subprocess.DEVNULL
        )
        assert done.returncode == 0, f"{' '.join(map(str, words))}:\n{done.stderr[-4000:]}"
        return done.stdout + done.stderr

    def client(self) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/msgpack"}
        return httpx.Client(base_url=self.host, headers=headers, timeout=60, trust_env=False)

    def copies(self, model: str) -> int:
        """That run jobs."""
        with self.client() as client:
            return self._copies(client, model)

    def lose_node(self, model: str, replaced: bool = False, timeout_s: float = 150) -> tuple[int, float]:
        """Kill a node that copies of a model are on, at a moment when they have jobs.

        Args:
            replaced: another of two cores comes at once.

        Returns:
            How many copies died with it, and after how many seconds as many others ran.
        """
        before = self.ready(model)
        replicas = self.ray.processes(f"ServeReplica:{app_name(model)}")
        lost = [replica for replica in replicas if replica.ppid() == replicas[0].ppid()]
        self.stop_at_work(lost)
        self.ray.kill_node_of(lost[0])
        began = time.monotonic()
        if replaced:
            self.ray.add(2)
        while len(self.ready(model) - before) < len(lost):
            assert time.monotonic() - began < timeout_s, "no other copies came"
            time.sleep(0.1)
        return len(lost), time.monotonic() - began

    def stop_at_work(self, replicas: Sequence[psutil.Process], timeout_s: float = 60) -> None:
        """Stop them at a moment when they have a job, which then stays leased while those of others end."""
        ends = time.monotonic() + timeout_s
        with redis.Redis.from_url(self.valkey.url) as broker:
            while True:
                for replica in replicas:
                    replica.suspend()
                time.sleep(0.05)
                leased: Any = set(broker.zrange(keys.LEASES, 0, -1))
                if leased:
                    time.sleep(1)
                    leased &= set(broker.zrange(keys.LEASES, 0, -1))
                if leased:
                    return
                for replica in replicas:
                    replica.resume()
                assert time.monotonic() < ends, "they have no jobs"
                time.sleep(random.uniform(0.01, 0.1))

    def ready(self, model: str) -> set[bytes]:
        """Workers that run jobs of a model, or did when they were last heard of."""
        with redis.Redis.from_url(self.valkey.url) as broker:
            states: Any = broker.hgetall(keys.STATES.format(model=model))
        return {worker for worker, state in states.items() if state == b"ready"}

    def until_copies(self, model: str, number: int, timeout_s: float = 90) -> float:
        """Returns how long it took, in seconds."""
        began = time.monotonic()
        with self.client() as client:
            while (found := self._copies(client, model)) != number:
                if time.monotonic() - began > timeout_s:
                    raise TimeoutError(f"{found} copies of {model} run, not {number}")
                time.sleep(0.1)
        return time.monotonic() - began

    def _copies(self, client: httpx.Client, model: str) -> int:
        found = {one["id"]: one["copies"] for one in client.get("/v1/models").json()["models"]}
        return int(found.get(model, 0))


@contextmanager
def cluster_lab(folder: Path, *cpus: float, **changes: Any) -> Iterator[ClusterLab]:
    """Args:
    cpus: cores of each node.
    changes: of the settings.
    """
    settings = SETTINGS | changes
    with ExitStack() as stack:
        valkey = Valkey(folder)
        valkey.start()
        stack.callback(valkey.kill)
        ray = stack.enter_context(ray_cluster(*cpus))
        own = {"redis_url": valkey.url, "data_dir": str(folder), **settings}
        env = os.environ | ray.env | {f"INTERPOSE_SERVER_{name.upper()}": str(value) for name, value in own.items()}
        made = subprocess.run(
            [INTERPOSE, "keys", "create", "--user", "ada", "--redis-url", valkey.url],
            env=env, capture_output=True, text=True, check=True,
        )  # fmt: skip
        bound = listen("127.0.0.1", 0)
        command = [sys.executable, str(CHILD), str(os.getpid()), sys.executable, "-m", "interpose_server.gateway"]
        gateway = subprocess.Popen([*command, "--fd", str(bound.fileno())], env=env, pass_fds=[bound.fileno()])
        stack.callback(gateway.wait)
        stack.callback(gateway.terminate)
        host = f"http://127.0.0.1:{bound.getsockname()[1]}"
        bound.close()
        yield ClusterLab(ray, valkey, folder, host, made.stdout.strip(), env, settings)


@dataclass
class Tally:
    """What became of a load.

    Attributes:
        requeued: jobs that ran more than once, as the copy died that had them.
        broken: answers a client couldn't make sense of, broken connections among them.
        slowest_s: from a job's acceptance to its end, at most.
    """

    accepted: int = 0
    completed: int = 0
    requeued: int = 0
    failed: int = 0
    wrong: int = 0
    ended_twice: int = 0
    lost: int = 0
    broken: int = 0
    slowest_s: float = 0.0
    codes: Counter[str] = field(default_factory=Counter)

    @property
    def sound(self) -> bool:
        return self.completed == self.accepted and not (self.wrong + self.ended_twice + self.lost + self.broken)


class Load:
    """Jobs of few and of many forwards, handed in one after another, so that some always run and some wait.

    Args:
        source: the model's folder, for the values that are right.
    """

    def __init__(
        self, lab: ClusterLab, model: str, source: Path, pause_s: float = 0.05, most: int = 10_000
    ) -> None:
        self.tally = Tally()
        self._lab = lab
        self._model = model
        self._right = Right(source)
        self._pause_s = pause_s
        self._most = most
        self._jobs: dict[str, list[tuple[int, ...]]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._submit)
        self._random = random.Random(7)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def submitted(self) -> int:
        return len(self._jobs)

    def until_running(self, timeout_s: float = 60) -> None:
        """Return when a copy has a job."""
        ends = time.monotonic() + timeout_s
        with redis.Redis.from_url(self._lab.valkey.url) as broker:
            while not broker.zcard(keys.LEASES):
                if time.monotonic() > ends:
                    raise TimeoutError("no job runs")
                time.sleep(0.005)

    def until_submitted(self, number: int, timeout_s: float = 90) -> None:
        """Return when there have been more jobs than this."""
        ends = time.monotonic() + timeout_s
        while self.submitted <= number:
            if time.monotonic() > ends:
                raise TimeoutError(f"{self.submitted} jobs were accepted")
            time.sleep(0.05)

    def finish(self, timeout_s: float = 120) -> Tally:
        """Hand in no more, and account for every job."""
        self.__exit__()
        ends = time.monotonic() + timeout_s
        with self._lab.client() as client, redis.Redis.from_url(self._lab.valkey.url) as broker:
            for job, prompts in self._jobs.items():
                self._account(client, broker, job, prompts, ends)
        return self.tally

    def _submit(self) -> None:
        with self._lab.client() as client, redis.Redis.from_url(self._lab.valkey.url) as broker:
            while not self._stop.wait(self._pause_s) and len(self._jobs) < self._most:
                waiting: Any = broker.get(keys.TOTAL)
                if int(waiting or 0) > WAITING:
                    continue
                forwards = 100 if len(self._jobs) % 4 == 0 else 1
                prompts = [tuple(self._random.choices(range(1, 100), k=24)) for _ in range(forwards)]
                body = encode_submission(job := _job(self._model, prompts))
                try:
                    if client.post("/v1/jobs", content=body).status_code == 202:
                        self._jobs[job.id] = prompts
                        self.tally.accepted += 1
                    else:
                        self.tally.broken += 1
                except httpx.HTTPError:
                    self.tally.broken += 1

    def _account(
        self, client: httpx.Client, broker: redis.Redis, job: str, prompts: list[tuple[int, ...]], ends: float
    ) -> None:
        tally = self.tally
        while (state := client.get(f"/v1/jobs/{job}").json()).get("status") in ("queued", "running"):
            if time.monotonic() > ends:
                break
            time.sleep(0.02)
        tally.requeued += state.get("attempt", 1) > 1
        if (ended := state.get("ended_ms")) is not None:
            tally.slowest_s = max(tally.slowest_s, (ended - state["created_ms"]) / 1000)
        match state.get("status"):
            case "completed":
                tally.completed += 1
                saved = load(client.get(f"/v1/jobs/{job}/result").content)
                tally.wrong += not self._right.all(prompts, saved)
            case "failed":
                tally.failed += 1
                tally.codes[state["error"]["code"]] += 1
            case _:
                tally.lost += 1
        tally.ended_twice += _ends(broker, job) != 1


class Right:
    """What a block gives by hand, all prompts of one job in one forward."""

    def __init__(self, source: Path) -> None:
        self._model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source).eval()

    def all(self, prompts: list[tuple[int, ...]], saved: Mapping[str, Tensor]) -> bool:
        """Whether each prompt's saved value is that, but for the order of sums."""
        if len(saved) != len(prompts):
            return False
        found = torch.cat([saved[f"{2 * index + 1}.0"] for index in range(len(prompts))])
        return torch.allclose(self._block(prompts), found, rtol=0, atol=1e-5)

    def _block(self, prompts: list[tuple[int, ...]]) -> Tensor:
        kept: list[Tensor] = []
        module = self._model.get_submodule(BLOCK)
        hook = module.register_forward_hook(
            lambda _m, _i, out: kept.append(out[0] if isinstance(out, tuple) else out)
        )
        with torch.no_grad():
            self._model(torch.tensor(prompts))
        hook.remove()
        return kept[0]


def _job(model: str, prompts: list[tuple[int, ...]]) -> Submission:
    """A forward of each prompt, of which a block's output is saved."""
    nodes: list[Node] = []
    for run in range(len(prompts)):
        nodes.append(Node(2 * run, "read", point=Point(BLOCK, "output"), invoke=0, run=run))
        nodes.append(Node(2 * run + 1, "save", args=(Ref(2 * run),), invoke=0, run=run))
    runs = tuple(Run("trace", (Invoke((prompt,)),)) for prompt in prompts)
    return Submission(uuid.uuid4().hex, model, Graph(runs, tuple(nodes)))


def _ends(broker: redis.Redis, job: str) -> int:
    """How often a job was said to be over."""
    events: Any = broker.xrange(keys.EVENTS.format(ref=keys.ref("ada", job)))
    bodies = [msgpack.unpackb(event[b"m"]) for _, event in events if event[b"k"] == b"status"]
    return sum(body["status"] in ("completed", "failed", "cancelled") for body in bodies)
