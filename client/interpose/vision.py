"""Models that see: `VisionLanguageModel("org/name")`, prompts of texts with images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .errors import BadArgument, ConfigError, first_line
from .models import LanguageModel
from .tracing.prompts import texts

IMAGES = "images"


class VisionLanguageModel(LanguageModel):
    """A language model that sees: prompts are texts with `images=`, or the prepared tensors, as everywhere.

    Args:
        source: the name a server serves it under, a hub id, a local folder, or a loaded module.
        processor: what makes inputs of texts and images, called as those of the transformers library; by default
            the one that belongs to a folder or hub id.
        options: as of `LanguageModel`.
    """

    def __init__(self, source: Any, *, processor: Any = None, **options: Any) -> None:
        super().__init__(source, **options)
        self._access.processor = processor

    @property
    def processor(self) -> Any:
        """What makes inputs of texts and images. Raises ConfigError where there is none."""
        access = self._access
        if access.processor is None:
            access.processor = _load(access.source)
        return access.processor

    @property
    def _further(self) -> frozenset[str]:
        return frozenset({IMAGES})

    def _prepared(self, prompt: Any, inputs: Mapping[str, Any]) -> tuple[Any, Mapping[str, Any]]:
        """A prompt's text and images as the model's inputs; anything else as it is."""
        if inputs.get(IMAGES) is None:
            return prompt, {name: value for name, value in inputs.items() if name != IMAGES}
        written = texts(prompt)
        if not written:
            raise BadArgument("images go with a text, or a list of texts, that says where they belong")
        images = inputs[IMAGES]
        if not isinstance(images, Sequence) and getattr(images, "ndim", 3) != 4:  # one image, not an array of them
            images = [images]
        made = self.processor(
            text=list(written), images=list(images), return_tensors="pt", padding=len(written) > 1
        )
        rest = {name: value for name, value in inputs.items() if name != IMAGES}
        return {**_known(dict(made), self._manifest.inputs), **rest}, {}


def _known(made: dict[str, Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Without what processors make for all models of their kind: the kinds of tokens, where a model takes none."""
    return {name: value for name, value in made.items() if name in inputs or not name.endswith("token_type_ids")}


def _load(source: Any) -> Any:
    if not isinstance(source, str):
        raise ConfigError("a loaded module has no processor of its own: VisionLanguageModel(module, processor=...)")
    try:
        from transformers import AutoProcessor
    except ImportError as error:
        raise ConfigError(
            'images are prepared here, by the transformers library: pip install "interpose[local]"; or give the '
            "prepared tensors: trace(input_ids=..., pixel_values=...)"
        ) from error
    try:
        return AutoProcessor.from_pretrained(source)  # type: ignore[no-untyped-call]
    except ImportError as error:
        raise ConfigError(f"the processor of {source} can't be made: {first_line(error)}") from error
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"no processor is found for {source}: give one, VisionLanguageModel(name, processor=...), or the "
            "prepared tensors: trace(input_ids=..., pixel_values=...)"
        ) from error
