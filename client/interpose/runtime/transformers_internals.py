"""What is needed of the transformers library beyond its public names: all of it here, and none of it elsewhere.

Parts of models are loaded by the steps of its `from_pretrained`, which reads whole ones.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from .internals import Internals

_MODELS = "transformers.modeling_utils"
_WEIGHTS = "transformers.core_model_loading"
_CONTEXTS = "transformers.utils.generic"
_CAPTURE = "transformers.utils.output_capturing"
_AUTO = "transformers.models.auto.auto_factory"
_GENERATION = "transformers.generation"

LIBRARY = Internals(
    "transformers",
    "5.23",
    {
        _MODELS: (
            *("LoadStateDictConfig", "_get_dtype", "get_hf_quantizer", "get_model_conversion_mapping"),
            *("patch_output_recorders", "PreTrainedModel.get_init_context", "PreTrainedModel._get_dtype_plan"),
            *("PreTrainedModel._load_pretrained_model", "PreTrainedModel._finalize_model_loading"),
        ),
        _WEIGHTS: ("WeightConverter", "WeightRenaming", "rename_source_key"),
        _CONTEXTS: ("ContextManagers",),
        _CAPTURE: ("_active_collector",),
        _AUTO: ("_BaseAutoModelClass._model_mapping",),
        _GENERATION: ("GenerationMixin.adjust_generation_fn",),
    },
)

# An argument that isn't taken, or a field that isn't there.
_OTHER_FORM = (AttributeError, TypeError)


def models_of(auto: Any, config: PretrainedConfig) -> Any:
    """The class that an Auto class has for a config, a tuple of several, or None."""
    return auto._model_mapping.get(type(config), None)


def collected() -> Mapping[str, Any] | None:
    """What the library collects of modules in the forward that runs, by name; None where it collects nothing."""
    found: Mapping[str, Any] | None = LIBRARY.part(_CAPTURE, "_active_collector").get()
    return found


def quantizer_of(config: PretrainedConfig, chosen: Any, device: torch.device) -> Any:
    """What loads weights that are quantised, None for others; an error where it can't on this device."""
    found, _, _ = LIBRARY.part(_MODELS, "get_hf_quantizer")(config, chosen, {"": device}, True, {})
    return found


def settle_dtype(
    config: PretrainedConfig, dtype: Any, files: list[str] | None, metadata: dict[str, Any] | None, quantizer: Any
) -> Any:
    """What "auto" comes to for some weights. The config, and those of its parts, are told."""
    _, found = LIBRARY.part(_MODELS, "_get_dtype")(dtype, files, config, metadata, None, True, quantizer)
    return found


def built(
    cls: Any, config: PretrainedConfig, quantizer: Any = None, device: torch.device | None = None
) -> PreTrainedModel:
    """A config's model on meta, as `from_pretrained` makes it before it reads anything."""
    with LIBRARY.part(_CONTEXTS, "ContextManagers")(
        cls.get_init_context(config.dtype, quantizer is not None, False, None)
    ):
        model: PreTrainedModel = cls(copy.deepcopy(config))
        LIBRARY.part(_MODELS, "patch_output_recorders")(model)
        if quantizer is not None:
            quantizer.preprocess_model(
                model=model, dtype=config.dtype, device_map={"": device}, checkpoint_files=None
            )
    return model


class Filling:
    """How a model on meta gets its weights: the library's own renamings and conversions of a checkpoint's tensors.

    Args:
        devices: of each module, or parameter, by the longest name that is a beginning of its own.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        place: str,
        devices: Mapping[str, torch.device],
        dtype: torch.dtype,
        quantizer: Any,
    ) -> None:
        self._model: Any = model
        with LIBRARY.shaped("what loading takes", *_OTHER_FORM):
            self._mapping = LIBRARY.part(_MODELS, "get_model_conversion_mapping")(model, None, quantizer)
            self._options = LIBRARY.part(_MODELS, "LoadStateDictConfig")(
                pretrained_model_name_or_path=place,
                device_map=devices,
                dtype=dtype,
                dtype_plan=self._model._get_dtype_plan(dtype),
                hf_quantizer=quantizer,
                weight_mapping=self._mapping,
            )

    def targets(self) -> Callable[[str], Sequence[str]]:
        """The names of parameters and buffers that are made of a checkpoint's tensor, by its name."""
        state, prefix = self._model.state_dict(), self._model.base_model_prefix
        renamings = self._entries("WeightRenaming")
        converters = self._entries("WeightConverter")
        by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        rename = LIBRARY.part(_WEIGHTS, "rename_source_key")

        def of(name: str) -> Sequence[str]:
            renamed, pattern = rename(name, renamings, converters, prefix, state)
            if renamed not in state and name in state:
                renamed, pattern = rename(name, [], [], prefix, state)
            if pattern is None:
                return [renamed]
            made = by_pattern[pattern].target_patterns
            return [renamed.replace(made[0], target) for target in made]

        return of

    def _entries(self, kind: str) -> list[Any]:
        cls = LIBRARY.part(_WEIGHTS, kind)
        return [entry for entry in self._mapping if isinstance(entry, cls)]

    def fill(self, tensors: Mapping[str, Any]) -> Any:
        """Read a checkpoint's tensors into the model. Returns the library's report, for `finish`."""
        info, _ = self._model._load_pretrained_model(self._model, tensors, None, self._options)
        return info

    def finish(self, info: Any, wanted: Iterable[str]) -> list[str]:
        """Tie what is tied, compute what files don't hold. Returns what is wanted and missing."""
        info.missing_keys &= frozenset(wanted)
        self._model._finalize_model_loading(self._model, self._options, info)
        return sorted(info.missing_keys)


def finish_quantized(model: Any, quantizer: Any) -> None:
    """What the library does to a quantised model once it has its weights."""
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)


def add_generation_config(model: nn.Module, place: str, hub: Mapping[str, Any]) -> None:
    """The settings of generations that come with a model, of one that generates."""
    generating: Any = model
    if generating.can_generate():
        unset = dict.fromkeys(("cache_dir", "force_download", "proxies", "token"))
        generating.adjust_generation_fn(None, None, None, place, subfolder="", **{"revision": None, **hub, **unset})
