"""A model's figures, from its config alone: no weights are read, none made.

The model stands on torch's meta device. Its parameters are counted there; one short forward and one longer, without
data, tell what its blocks make and keep: grouped heads, compressed caches, windows and states as the library really
has them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from interpose.errors import ConfigError
from interpose.runtime.adapter_files import CONFIG, folder_of
from interpose.runtime.blocklists import BlockList, main_list
from interpose.runtime.lora import in_place, nbytes
from interpose.runtime.partial_loading import outline, saved_dtype
from interpose.runtime.sources import Source, torch_dtype
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from .dryrun import Dry, Kept, dry_run
from .schemes import Scheme
from .sizes import Part, Sizes

log = logging.getLogger(__name__)


def sizes(
    source: str | Path,
    *,
    name: str | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    quantization: str | None = None,
    adapters: Mapping[str, str] | None = None,
) -> Sizes:
    """Of a hub id, a folder (a config.json is enough) or a config's file.

    Args:
        name: what it is called; default: the hub id or the folder's name.
        dtype: of the weights; default and "auto": as saved.
        quantization: a scheme of the transformers library; default: as saved.
        adapters: name -> folder or hub id of LoRA weights beside its own; their configs alone are read.

    Raises:
        ConfigError: no such folder or dtype, a model the library doesn't know, or an adapter that isn't of it.
        ModelUnavailable: the hub doesn't give it.
    """
    at, called = _source(source, revision)
    config = at.config()
    wanted = torch_dtype(dtype)
    if wanted == "auto":
        wanted = _saved_dtype(at, config)
    folders = {
        adapter: folder_of(adapter, where, local_files_only=at.hub["local_files_only"], needed=(CONFIG,))
        for adapter, where in (adapters or {}).items()
    }
    return of_config(config, name or called, wanted, quantization, folders)


def of_config(
    config: PretrainedConfig,
    name: str,
    dtype: torch.dtype,
    quantization: str | None = None,
    adapters: Mapping[str, Path] | None = None,
) -> Sizes:
    """The figures of a config's model. `adapters`: name -> folder of LoRA weights."""
    model = outline(config, dtype)
    its = main_list(model)
    scheme = Scheme.of(config, quantization)
    outside, blocks = _weights(model, its, scheme)
    layers = {adapter: nbytes(model, adapter, folder) for adapter, folder in (adapters or {}).items()}
    beside, own = _divided(its, (one for sizes in layers.values() for one in sizes.items()))
    dry = _dry(model, its, config, dtype)
    found = _adapted(dry or estimated(model, its), model, its, layers, adapters or {})
    return Sizes(
        model=name,
        architecture=type(model).__name__,
        dtype=str(dtype).removeprefix("torch."),
        quantization=scheme.name if scheme else "",
        parameters=sum(param.numel() for _, param in _own(model)),
        path=its.path if its else "",
        blocks=tuple(_parts([sum(both) for both in zip(blocks, own, strict=True)], found)),
        outside=Part(outside + beside, work_token=found.outside),
        positions=_positions(config),
        adapters=beside + sum(own),
        measured=dry is not None,
    )


def _source(source: str | Path, revision: str | None) -> tuple[Source, str]:
    path = Path(source).expanduser()
    if path.is_file():
        hub = {"local_files_only": True, "trust_remote_code": False}
        return Source(str(path), path.parent.resolve(), hub), path.parent.resolve().name
    at = Source.of(source, revision)
    return at, at.folder.name if at.folder else at.place


def _saved_dtype(at: Source, config: PretrainedConfig) -> torch.dtype:
    """As the library finds it: what the config says, or the first of a folder's weights."""
    told = getattr(torch, config.dtype, None) if isinstance(config.dtype, str) else config.dtype
    if isinstance(told, torch.dtype):
        return told
    try:
        return saved_dtype(at, config) if at.folder is not None else torch.float32
    except ConfigError:
        return torch.float32  # nothing there yet but a config


def _positions(config: PretrainedConfig) -> int | None:
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    return most if isinstance(most, int) and most > 0 else None


def _own(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Parameters, what is tied once."""
    tied = model.all_tied_weights_keys
    return ((name, param) for name, param in model.named_parameters() if name not in tied)


def _weights(model: PreTrainedModel, its: BlockList | None, scheme: Scheme | None) -> tuple[int, list[int]]:
    """Bytes outside the blocks, and of each."""
    block = _block_of(its)
    return _divided(
        its,
        (
            (name, scheme.nbytes(model, name, tensor) if scheme and block(name) is not None else tensor.nbytes)
            for name, tensor in (*_own(model), *model.named_buffers())
        ),
    )


def _divided(its: BlockList | None, sizes: Iterable[tuple[str, int]]) -> tuple[int, list[int]]:
    """Bytes outside the blocks, and in each. Args: sizes: of what has a name in the model."""
    block = _block_of(its)
    outside, blocks = 0, [0] * len(its.blocks if its else ())
    for name, size in sizes:
        at = block(name)
        if at is None:
            outside += size
        else:
            blocks[at] += size
    return outside, blocks


def _block_of(its: BlockList | None) -> Callable[[str], int | None]:
    """In which block something lies, by its name; None for outside of them."""
    index = {path: number for number, path in enumerate(its.blocks if its else ())}
    depth = len(its.path.split(".")) + 1 if its and its.path else 1
    return lambda name: index.get(".".join(name.split(".")[:depth]))


def _dry(model: PreTrainedModel, its: BlockList | None, config: PretrainedConfig, dtype: torch.dtype) -> Dry | None:
    """What a forward without data tells; None for a model that can't do without."""
    for trial in dict.fromkeys((dtype, torch.bfloat16)):
        # Some kernels of experts are there for bfloat16 alone, on meta.
        twin = model if trial == dtype else outline(config, trial)
        nn.Module.eval(twin)
        try:
            found = dry_run(twin, _modules(twin, its))
        except Exception as error:  # noqa: BLE001 - whatever a model's own code raises where nothing is to be seen
            log.info("%s doesn't run without data in %s (%s)", type(model).__name__, trial, type(error).__name__)
            continue
        return found.scaled(dtype.itemsize, trial.itemsize)
    return None


def _adapted(
    dry: Dry,
    model: PreTrainedModel,
    its: BlockList | None,
    layers: Mapping[str, Mapping[str, int]],
    adapters: Mapping[str, Path],
) -> Dry:
    """What forwards with adapters make, too: of those with layers at the same modules, the one of the largest."""
    largest: dict[frozenset[str], str] = {}
    for name in sorted(layers, key=lambda name: sum(layers[name].values())):
        largest[frozenset(layers[name])] = name
    for name in largest.values():
        with in_place(model, name, adapters[name]):
            try:
                dry = dry.with_adapter(dry_run(model, _modules(model, its)))
            except Exception as error:  # noqa: BLE001 - as without one
                told = type(model).__name__, name, type(error).__name__
                log.info("%s doesn't run without data with adapter %r (%s)", *told)
    return dry


def _modules(model: nn.Module, its: BlockList | None) -> list[nn.Module]:
    return [model.get_submodule(path) for path in its.blocks] if its else []


def estimated(model: PreTrainedModel, its: BlockList | None) -> Dry:
    """The same, guessed from widths: of a block four of the widest product, in and out; whole keys and values."""
    size = next(model.parameters()).dtype.itemsize
    width, heads = _figure(model, "hidden_size"), _figure(model, "num_attention_heads")
    hidden = width * size
    grouped = _figure(model, "num_key_value_heads") or heads
    head = _figure(model, "head_dim") or (width // heads if heads else 0)
    blocks = _modules(model, its)
    keeps = model.can_generate()
    return Dry(
        work=tuple(4 * _widest(block) * size for block in blocks),
        output=tuple(hidden for _ in blocks),
        outside=2 * _figure(model, "vocab_size") * size if keeps else 0,
        cache=tuple(Kept(2 * grouped * head * size) for _ in blocks) if keeps else (),
    )


def _figure(model: PreTrainedModel, name: str) -> int:
    """Of the config; 0 where it has none, or one for each stage."""
    found = getattr(model.config.get_text_config(), name, None)
    return found if isinstance(found, int) else 0


def _widest(block: nn.Module) -> int:
    """Numbers that its widest product makes of a token; of experts, which lie behind one another, the sum of all
    dimensions but the first."""
    return max((sum(param.shape[-2:]) for param in block.parameters() if param.ndim > 1), default=0)


def _parts(weights: Sequence[int], dry: Dry) -> Iterator[Part]:
    kept = _spread(dry.cache, len(weights))
    for index, its in enumerate(weights):
        cache = kept[index]
        yield Part(its, dry.work[index], cache.token, cache.row, cache.window, dry.output[index])


def _spread(cache: Sequence[Kept], blocks: int) -> Sequence[Kept]:
    """A cache's layers for so many blocks: one each, or where the model has it otherwise, alike for all."""
    if len(cache) == blocks or not blocks:
        return cache
    token, row = (sum(getattr(layer, name) for layer in cache) for name in ("token", "row"))
    return [Kept(-(-token // blocks), -(-row // blocks))] * blocks
