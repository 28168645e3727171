"""What notebooks written for other libraries ask of a model beyond its blocks."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn

from .errors import BadArgument
from .tracing.notes import note

if TYPE_CHECKING:
    from .lens import ActivationCache, Filter, Hook

_IGNORED = frozenset({"dispatch", "low_cpu_mem_usage", "attn_implementation", "check_renaming", "allow_dispatch"})
"""Options that change no result: when weights are loaded, and by which kernel attention runs."""

_REFUSED: Mapping[str, str] = {
    "trust_remote_code": "code that comes with a model is never run; leave it out",
    "token": "set HF_TOKEN in the environment",
    "cache_dir": "set HF_HOME in the environment",
    "tokenizer_kwargs": "load the tokenizer yourself and pass tokenizer=",
    "quantization_config": "load the model yourself and pass it: LanguageModel(module, tokenizer=...)",
    "load_in_8bit": "load the model yourself and pass it: LanguageModel(module, tokenizer=...)",
    "load_in_4bit": "load the model yourself and pass it: LanguageModel(module, tokenizer=...)",
}
_MOVES = "where a local model goes is said when it is made: LanguageModel(name, device_map=..., dtype=...)"


def other_options(given: Mapping[str, Any]) -> None:
    """Pass over options that change nothing here. Raises BadArgument for others, with what to write instead."""
    for name, value in given.items():
        if name in _IGNORED or value is None or value is False:
            continue
        raise BadArgument(f"LanguageModel takes no {name}" + (f": {_REFUSED[name]}" if name in _REFUSED else ""))
    if given.get("attn_implementation"):
        note("attn_implementation is passed over: a run that looks inside attention takes its eager form by itself")


class Familiar:
    """Mixed into models: properties and methods that other libraries' users look for."""

    _access: Any

    @property
    def config(self) -> Any:
        """The transformers library's config of a local model; of one on a server, the figures its manifest has."""
        if not self._access.prefers_server:
            return self._access.local.loaded.model.config
        manifest = self._access.manifest(remote=True)
        return SimpleNamespace(**{"vocab_size": manifest.vocab, **manifest.config})

    @property
    def dtype(self) -> Any:
        """Of the weights."""
        name = self._access.manifest(self._access.prefers_server).dtype
        if importlib.util.find_spec("torch") is None:
            return name
        from .tracing.torch_face import named_dtype

        return named_dtype(name)

    @property
    def device(self) -> Any:
        """Where values are for the code that uses them, inside a block and after it: this process's memory."""
        if importlib.util.find_spec("torch") is None:
            return "cpu"
        from .tracing.torch_face import DEVICE

        return DEVICE

    def dispatch(self) -> None:
        """Load a local model now rather than at its first run."""
        if not self._access.prefers_server:
            _ = self._access.local

    def eval(self) -> Any:
        """The model itself: it never trains."""
        return self

    def _moved(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise BadArgument(_MOVES)

    to = cuda = half = float = bfloat16 = _moved

    def cpu(self) -> Any:
        """The model itself: values arrive in this process's memory wherever it runs."""
        return self

    def requires_grad_(self, wanted: bool = True) -> Any:
        """The model itself; gradients come to what asks for them in a block, never to parameters."""
        if wanted:
            raise BadArgument("parameters take no gradients; those of values are read in with loss.backward():")
        return self

    # -- TransformerLens's two ways to look inside -----------------------------------------------------------------

    def run_with_cache(
        self, prompt: Any, names_filter: Filter = None, *, return_type: str | None = "logits", **options: Any
    ) -> tuple[Any, ActivationCache]:
        """The model's output and its values by TransformerLens's names: `logits, cache = model.run_with_cache(p)`.

        Args:
            names_filter: a name, several, or a function of one; None for all that the model has.
            return_type: "logits", "loss", "both", or None.
            options: of the trace, such as `remote=True`; `remove_batch_dim`.
        """
        from .lens import run_with_cache

        return run_with_cache(self, prompt, names_filter, return_type=return_type, **options)

    def run_with_hooks(
        self,
        prompt: Any,
        *,
        fwd_hooks: Sequence[tuple[str | Callable[[str], bool], Hook]] = (),
        return_type: str | None = "logits",
        **options: Any,
    ) -> Any:
        """The model's output with hooks `fn(value, hook)` at TransformerLens's names.

        A hook is called once, while recording: it may change `value` in place or return another one. In it `if`
        and `float()` on what it was given can't be had, as in a block.

        Args:
            fwd_hooks: pairs of a name, or a function that picks names, and the hook.
            return_type: "logits", "loss", "both", or None.
            options: of the trace, such as `remote=True`.
        """
        from .lens import run_with_hooks

        return run_with_hooks(self, prompt, fwd_hooks, return_type=return_type, **options)
