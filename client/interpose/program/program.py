"""The program of a block: its graph with all it needs to be understood, shared and run again."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config import CONFIG
from ..errors import BadArgument
from ..graph.adapters import check_adapter, revision_of
from ..graph.limits import Limits
from ..graph.manifest import Manifest
from ..graph.model import Graph, Invoke
from ..tracing.execution import Options
from ..tracing.notes import note
from ..tracing.prompts import Prompt, to_prompt
from ..tracing.recorder import Recorder
from ..wire.tensors import NUMPY, Backend, Encoded, decode_tensor, encode_tensor, is_tensor
from .file import Origin, Parts, content_hash, plain_form, read, write
from .fitting import check_fit, moved
from .listing import listing
from .names import save_names

if TYPE_CHECKING:
    from ..models import LanguageModel


@dataclass(frozen=True, repr=False)
class Program(Parts):
    """What a block recorded: a graph, its tensors, and where it comes from. It never changes.

    `print(program)` shows it; `parameters` names what `run` can set, `names` what it gives.
    """

    @classmethod
    def of(cls, recorder: Recorder) -> Program:
        """All a recorder has recorded so far. Source files keep their names, and lose their folders."""
        graph, tensors, ids = recorder.so_far()
        given = {ids[node]: name for node, name in recorder.names.items()}
        names = save_names(graph, given)
        keys = {key: f"{index:064x}" for index, key in enumerate(sorted(graph.attachments))}
        parameters = {name: keys[key] for name, key in recorder.parameters.items() if key in keys}
        manifest = recorder.manifest
        origin = Origin(
            model=manifest.model,
            revision=revision_of(graph.runs, manifest),
            dtype=manifest.dtype,
            tokenizer=manifest.tokenizer,
            blocks=tuple(manifest.blocks),
            library=version("interpose"),
        )
        encoded = {keys[key]: _copied(encode_tensor(tensor)) for key, tensor in tensors.items()}
        return cls(origin, _portable(graph, keys), encoded, names, parameters)

    @classmethod
    def load(cls, path: str | Path, limits: Limits | None = None) -> Program:
        """Read a program that was saved. Nothing of it is imported, unpickled or run.

        Raises:
            InvalidPayload, InvalidGraph: it isn't a program, or was changed since it was saved.
            VersionMismatch: it is of a later format.
            LimitExceeded: it is larger than `limits`, by default those of a server as it is installed.
        """
        parts = read(Path(path), limits or Limits())
        return cls(parts.origin, parts.graph, parts.tensors, parts.names, parts.parameters)

    def save(self, path: str | Path) -> Path:
        """Write `x.json`, and `x.safetensors` beside it if the program has tensors. Returns the path."""
        write(self, Path(path))
        return Path(path)

    @cached_property
    def hash(self) -> str:
        """SHA-256 of all it says, its tensors included: two programs with one hash do the same."""
        return content_hash(plain_form(self))

    @property
    def prompts(self) -> tuple[Invoke, ...]:
        """The prompts it was recorded with, in order."""
        return tuple(invoke for run in self.graph.runs for invoke in run.invokes)

    def __str__(self) -> str:
        about = f"program {self.hash[:12]} of {self.origin.model} ({self.origin.dtype})"
        # A file may come from anybody: nothing in it is to reach a terminal as a command.
        return "\n".join(map(_printable, [about, *listing(self.graph, self.names, self.parameters)]))

    def __repr__(self) -> str:
        return f"<Program {self.hash[:12]} of {self.origin.model}, {len(self.graph.nodes)} nodes>"

    # -- running -----------------------------------------------------------------------------------------------

    def run(
        self,
        model: LanguageModel,
        prompt: Any = None,
        *,
        prompts: Sequence[Any] | None = None,
        layers: Mapping[int, int] | None = None,
        adapter: str | None = None,
        remote: bool = False,
        timeout: float | None = None,
        **parameters: Any,
    ) -> dict[str, Any]:
        """Run it, on the model it was recorded on or another that it fits; returns its saved values by name.

        Args:
            prompt: instead of the one it was recorded with; `prompts` instead of all, where it has several.
            layers: block -> the block to read and write instead: `{8: 5}`.
            adapter: instead of those its runs were recorded with.
            remote, timeout: as of a trace.
            parameters: other values for its parameters.

        Raises:
            UnknownAdapter: the model doesn't have one that a run chose.
            UnknownModule: the model lacks places that it reads or writes; all of them are named.
            GraphError: it doesn't fit for another reason, such as a shape.
            BadArgument: a parameter or layer it doesn't have.
        """
        if not model._runs_programs:
            raise BadArgument(
                "a program runs on a LanguageModel: a module's inputs may be anything, so none holds them"
            )
        if model._edits:
            raise BadArgument("a program runs on a model without edits: those it was recorded with are part of it")
        access = model._access
        manifest: Manifest = access.manifest(remote)
        graph, given = self._prompted(model, manifest, prompt, prompts, remote)
        if adapter is not None:
            graph = replace(graph, runs=tuple(replace(run, adapter=adapter) for run in graph.runs))
        for run in graph.runs:
            check_adapter(run.adapter, manifest)
        graph = moved(graph, self.origin.blocks, manifest.blocks, layers or {})
        tensors = {**self.tensors, **self._set(parameters), **given}
        dropped = set().union(*(invoke.tensors.values() for invoke in self.prompts)) - _used(graph)
        tensors = {key: tensor for key, tensor in tensors.items() if key not in dropped}
        graph = replace(graph, attachments={key: tensor.spec for key, tensor in tensors.items()})
        if revision_of(self.graph.runs, manifest) != self.origin.revision:
            note(f"the program was recorded on another revision of a model, {self.origin.model}")
        check_fit(graph, manifest)
        backend = _backend(remote)
        real = {key: decode_tensor(tensor.spec, bytes(tensor.data), backend) for key, tensor in tensors.items()}
        values = access.execute(graph, real, Options(remote=remote, timeout=timeout))
        return {name: values[node] for node, name in self.names.items() if node in values}

    def _prompted(
        self, model: LanguageModel, manifest: Manifest, prompt: Any, prompts: Sequence[Any] | None, remote: bool
    ) -> tuple[Graph, dict[str, Encoded]]:
        """The graph with the prompts it is to run on, and the tensors that came with them."""
        old = self.prompts
        if prompt is not None:
            if prompts is not None or len(old) != 1:
                raise BadArgument(f"the program has {len(old)} prompts: give them all, prompts=[...]")
            prompts = [prompt]
        elif prompts is None:
            # Ids mean nothing to another tokenizer; the text does.
            other = manifest.tokenizer != self.origin.tokenizer
            prompts = [list(invoke.text) if other and invoke.text else invoke for invoke in old]
        if len(prompts) != len(old):
            raise BadArgument(f"the program has {len(old)} prompts, not {len(prompts)}")
        tensors: dict[str, Encoded] = {}
        new = iter([self._invoke(item, model, manifest, tensors, remote) for item in prompts])
        runs = (replace(run, invokes=tuple(next(new) for _ in run.invokes)) for run in self.graph.runs)
        return replace(self.graph, runs=tuple(runs)), tensors

    def _invoke(
        self, prompt: Any, model: LanguageModel, manifest: Manifest, tensors: dict[str, Encoded], remote: bool
    ) -> Invoke:
        """A prompt as an invoke; its tensors come to `tensors`. An invoke of the program stays as it is."""
        if isinstance(prompt, Invoke):
            return prompt
        made: Prompt = to_prompt(prompt, lambda text: model._tokenize(remote, text), manifest)
        names = {}
        for name, tensor in made.tensors.items():
            names[name] = f"{len(self.tensors) + len(tensors):064x}"
            tensors[names[name]] = _copied(encode_tensor(tensor))
        return replace(made.invoke, tensors=names)

    def _set(self, parameters: Mapping[str, Any]) -> dict[str, Encoded]:
        """The attachments of parameters that are given other values."""
        found = {}
        for name, value in parameters.items():
            if name not in self.parameters:
                has = ", ".join(self.parameters) or "none"
                raise BadArgument(f"the program has no parameter {name!r}; its parameters: {has}")
            key = self.parameters[name]
            found[key] = _as_parameter(name, value, self.tensors[key])
        return found


def _as_parameter(name: str, value: Any, default: Encoded) -> Encoded:
    """A number in the default's dtype, or a tensor as it is."""
    if is_tensor(value):
        return _copied(encode_tensor(value))
    if not isinstance(value, (bool, int, float)):
        raise BadArgument(f"{name} is a number or a tensor, not a {type(value).__name__}")
    dtype = default.spec.dtype
    whole = dtype.startswith(("int", "uint"))
    if (isinstance(value, bool) != (dtype == "bool")) or (whole and not isinstance(value, int)):
        raise BadArgument(f"{name} is a {dtype}, which {value!r} isn't")
    try:
        return _copied(encode_tensor(np.array(value, NUMPY[dtype])))
    except OverflowError as error:
        raise BadArgument(f"{name} is a {dtype}, which {value!r} doesn't fit") from error


def _copied(tensor: Encoded) -> Encoded:
    return Encoded(tensor.spec, memoryview(bytes(tensor.data)))


def _backend(remote: bool) -> Backend:
    torch = importlib.util.find_spec("torch") is not None
    return "torch" if torch and not (remote and CONFIG.BACKEND == "numpy") else "numpy"


def _portable(graph: Graph, keys: Mapping[str, str]) -> Graph:
    """The graph with its attachments' own names, and with file names for paths."""
    renamed = graph.renamed(keys)
    nodes = tuple(
        node
        if node.source is None
        else replace(node, source=replace(node.source, file=_file_name(node.source.file)))
        for node in renamed.nodes
    )
    return replace(renamed, nodes=nodes)


def _used(graph: Graph) -> set[str]:
    """Keys of the attachments that a graph uses."""
    nodes = {node.args[0] for node in graph.nodes if node.op == "attachment"}
    return nodes.union(*(invoke.tensors.values() for run in graph.runs for invoke in run.invokes))


def _printable(line: str) -> str:
    return line if line.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def _file_name(path: str) -> str:
    return path.replace("\\", "/").rpartition("/")[2] or path
