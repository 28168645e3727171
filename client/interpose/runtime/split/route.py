"""What travels between the process that runs a split model's forward and the shards that hold its blocks.

Site 0 is *home*: the model's own forward, with stubs where the blocks were. Sites 1..n are the shards, each with
a range of blocks. A forward visits the shards in order; each hands its hidden states, and values that later sites
need (the *mail*), straight to the next, the last one back home. A backward takes the same way in reverse.

Pure protocol: nothing here knows a network. A nest is tuples, lists and dicts with string keys, of tensors,
numbers, strings, bytes, bools, None, `CacheRef` and `ArgumentRef`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, runtime_checkable

from torch import Tensor

Nest: TypeAlias = Any

HOME = 0

Ask: TypeAlias = Callable[[int, str, Nest], Nest]
"""Site, name, request -> what an errand there gives."""


@dataclass(frozen=True, slots=True)
class CacheRef:
    """Stands in a call's arguments for the key-value cache of that number; each shard keeps its own part of it."""

    number: int


@dataclass(frozen=True, slots=True)
class ArgumentRef:
    """Stands in a call's arguments for a tensor that comes as mail, since its gradient goes back that way."""

    number: int


@dataclass(frozen=True, slots=True)
class BlockCall:
    """One block's own arguments, as the model's forward gave them.

    `None` first stands for the hidden states; without positional arguments they are the keyword that is the name of
    the block's first parameter.
    """

    path: str
    args: tuple[Nest, ...]
    kwargs: Mapping[str, Nest]


@dataclass(frozen=True, slots=True)
class Visit:
    """What one shard is to do in one forward.

    Attributes:
        calls: of its blocks, in order.
        work: for the shard's guest: what the jobs of this forward ask there; None for nothing.
        attention: whether attention takes its eager form.
        grad: whether what is computed is tracked, and kept until the forward is dropped.
        adapter: which adapter it runs with, None for none.
    """

    site: int
    calls: tuple[BlockCall, ...]
    work: Nest = None
    attention: bool = False
    grad: bool = False
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class Mail:
    """Values on their way to later sites: `address` is the sites' own business, `value` a nest."""

    to: int
    address: tuple[Any, ...]
    value: Nest


@dataclass(frozen=True, slots=True)
class Landing:
    """How a forward came home.

    Attributes:
        hidden: None if a shard's guest said that nobody needs what comes after.
        mail: for home, and for shards that this forward had already left behind.
        replies: site -> what its guest has to say.
    """

    hidden: Tensor | None
    mail: tuple[Mail, ...] = ()
    replies: Mapping[int, Nest] = field(default_factory=dict)


class Guest(Protocol):
    """What of the jobs' graphs runs on a shard. Called on the shard's compute thread."""

    def visit(
        self, work: Nest, mail: Sequence[Mail], run: Callable[[], Tensor]
    ) -> tuple[Tensor | None, Nest, Sequence[Mail]]:
        """Serve one forward; `run` calls the blocks. Returns hidden states (None: no later shard is needed), the
        reply, and new mail."""

    def wave(self, work: Nest, mail: Sequence[Mail], run: Callable[[], None]) -> tuple[Nest, Sequence[Mail]]:
        """Serve one backward; `run` has torch do it here. Returns the reply and new mail."""

    def errand(self, name: str, request: Nest) -> Nest:
        """Anything beside a forward: a module called on a value, a parameter, a job that begins or ends. May be
        called on another thread than the others, while they are under way."""


@runtime_checkable
class Carrier(Protocol):
    """Home's side of the same: what the visitor of a forward (`hooks.CURRENT`) gives to the shards and takes back.

    A visitor without these methods has no work on shards.
    """

    def load(self, site: int) -> tuple[Nest, Sequence[Mail]]:
        """The work for a shard, and the mail that goes with it."""

    def reach(self) -> int:
        """The number (from 1 on) of the last block to be called before home has its turn; 0 for none."""

    def landed(self, landing: Landing) -> None:
        """The shards are done. Raises to end the forward here."""

    @property
    def waves(self) -> Waves:
        """What serves the backwards of this forward."""


class Waves(Protocol):
    """Home's side of backwards. Torch's graph holds it, so it holds no job: what a failed job keeps (the frames
    of its error) may hold that graph, and no garbage collector would find such a circle.
    """

    def wave(self, site: int) -> tuple[Nest, Sequence[Mail]]:
        """The work of the backward that is about to come by a shard, and the mail that goes with it."""

    def ebbed(self, landing: Landing) -> None:
        """The backward has come by all shards."""


class Route(Protocol):
    """The way to the shards. Several forwards may be under way at once, from several threads; each shard serves
    them in the order in which they come.

    Whatever a shard raises is raised here, and nothing of that forward stays on any shard; the caches it was to use
    home has them drop. A shard that is gone raises ReplicaLost: the replica is to end.
    """

    sites: Mapping[str, int]
    """Path of a block -> its site."""

    def forward(self, number: int, hidden: Tensor, visits: Sequence[Visit], mail: Sequence[Mail]) -> Landing:
        """Go by the shards of `visits`, in order. `number` names the forward, for its backward."""

    def backward(
        self, number: int, gradients: Sequence[Tensor | None], work: Mapping[int, Nest], mail: Sequence[Mail]
    ) -> tuple[Sequence[Tensor | None], Landing]:
        """Go back with the gradients of what came home requiring them (hidden states first, then the tensors of the
        mail, in order); returns those of what had been sent out so (likewise)."""

    def errand(self, site: int, name: str, request: Nest) -> Nest:
        """Have one shard's guest do something else."""

    def answer(self, errand: Callable[[str, Nest], Nest]) -> None:
        """Let `errand` do what shards ask of home while they serve a forward or a backward. It is called on any
        thread and waits for nobody. What shards ask of one another comes by home too."""

    def drop(self, numbers: Sequence[int] = (), caches: Sequence[int] = ()) -> None:
        """Forwards no backward will come to any more, and caches nobody will use."""
