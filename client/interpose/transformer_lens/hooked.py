"""TransformerLens's model class.

The weights are the model's own: nothing is folded, centred or renamed, as in `from_pretrained_no_processing`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from ..errors import BadArgument
from ..lens import ActivationCache, Hook
from ..models import LanguageModel
from ..tracing.notes import note
from ..tracing.prompts import token_rows
from ..tracing.tracer import ACTIVE

_PROCESSING = (
    "fold_ln",
    "center_writing_weights",
    "center_unembed",
    "fold_value_biases",
    "refactor_factored_attn_matrices",
)
_REPOS = {"gpt2-small": "gpt2"}


class HookedTransformer(LanguageModel):
    """A model under TransformerLens's names. Texts get a beginning-of-text token before them, as there."""

    default_prepend_bos = True

    @classmethod
    def from_pretrained(cls, model_name: Any, **options: Any) -> HookedTransformer:
        """The model, unprocessed. Options of `LanguageModel`; of those that process weights only False is taken."""
        asked = {name: options.pop(name) for name in _PROCESSING if name in options}
        if any(asked.values()):
            raise BadArgument(
                f"weights aren't processed here: write {', '.join(f'{name}=False' for name in asked)}"
            )
        if not asked:
            note("weights are the model's own, as of from_pretrained_no_processing; folded ones differ inside")
        return cls(_REPOS.get(model_name, model_name), **options)

    @classmethod
    def from_pretrained_no_processing(cls, model_name: Any, **options: Any) -> HookedTransformer:
        return cls.from_pretrained(model_name, **dict.fromkeys(_PROCESSING, False), **options)

    @property
    def cfg(self) -> Any:
        """Figures of the model by TransformerLens's names."""
        manifest = self.manifest
        figures = manifest.config
        heads, width = figures.get("heads"), figures.get("hidden")
        return SimpleNamespace(
            model_name=manifest.model,
            n_layers=len(manifest.blocks),
            n_heads=heads,
            d_model=width,
            d_vocab=manifest.vocab,
            n_ctx=manifest.positions,
            default_prepend_bos=self.default_prepend_bos,
        )

    # -- tokens ------------------------------------------------------------------------------------------------

    def to_tokens(self, text: str | Sequence[str], prepend_bos: bool | None = None) -> Any:
        """Ids [texts, seq] of one text, or of several of equal length; torch's tensor where torch is."""
        from ..tokens import stack

        rows = [self._ids(item, prepend_bos) for item in ([text] if isinstance(text, str) else text)]
        if len({len(row) for row in rows}) != 1:
            raise BadArgument(
                "these texts have several lengths, and make no tensor; give the list to the run itself"
            )
        return stack(rows, "pt" if importlib.util.find_spec("torch") else "np")

    def to_string(self, tokens: Any) -> Any:
        """The text of one id or of ids [seq], or the texts of [rows, seq]."""
        if isinstance(tokens, int) or getattr(tokens, "ndim", None) == 0:
            return str(self.tokenizer.decode(tokens))
        rows = token_rows(tokens)
        texts = [self.tokenizer.decode(list(row)) for row in rows]
        return texts[0] if getattr(tokens, "ndim", 1) < 2 else texts

    def to_str_tokens(self, text: Any, prepend_bos: bool | None = None) -> list[str]:
        """The text of each token of a text, or of ids."""
        ids = self._ids(text, prepend_bos) if isinstance(text, str) else token_rows(text)[0]
        return [self.tokenizer.decode([token]) for token in ids]

    def to_single_token(self, text: str) -> int:
        """The id of a text that is one token. Raises BadArgument if it is more."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        if len(ids) != 1:
            raise BadArgument(f"{text!r} is {len(ids)} tokens")
        return int(ids[0])

    def to_single_str_token(self, token: int) -> str:
        return str(self.tokenizer.decode([token]))

    def _ids(self, text: str, prepend_bos: bool | None) -> list[int]:
        ids = list(self.tokenizer.encode(text, add_special_tokens=False))
        bos = self.tokenizer.bos_token_id
        wanted = self.default_prepend_bos if prepend_bos is None else prepend_bos
        return [bos, *ids] if wanted and bos is not None else ids

    def _prompt(self, given: Any, prepend_bos: bool | None) -> Any:
        if isinstance(given, str):
            return [self._ids(given, prepend_bos)]
        if isinstance(given, (list, tuple)) and given and isinstance(given[0], str):
            return [self._ids(text, prepend_bos) for text in given]
        return given

    # -- running -----------------------------------------------------------------------------------------------

    def __call__(  # type: ignore[override]
        self, prompt: Any, return_type: str | None = "logits", *, prepend_bos: Any = None, **options: Any
    ) -> Any:
        """The logits (or the loss) of a prompt, with the hooks that are in place."""
        if ACTIVE.get() is not None:
            return super().__call__(prompt)
        return self.run_with_hooks(prompt, return_type=return_type, prepend_bos=prepend_bos, **options)

    forward = __call__

    def run_with_hooks(
        self,
        prompt: Any,
        return_type: str | None = "logits",
        *,
        fwd_hooks: Any = (),
        prepend_bos: Any = None,
        **options: Any,
    ) -> Any:
        every = (*self.__dict__.get("_hooks", ()), *fwd_hooks)
        prompt = self._prompt(prompt, prepend_bos)
        return super().run_with_hooks(prompt, fwd_hooks=every, return_type=return_type, **options)

    def run_with_cache(  # type: ignore[override]
        self,
        prompt: Any,
        return_type: str | None = "logits",
        *,
        names_filter: Any = None,
        prepend_bos: Any = None,
        **options: Any,
    ) -> tuple[Any, ActivationCache]:
        prompt = self._prompt(prompt, prepend_bos)
        return super().run_with_cache(prompt, names_filter, return_type=return_type, **options)

    @contextmanager
    def hooks(
        self, fwd_hooks: Sequence[tuple[str | Callable[[str], bool], Hook]] = ()
    ) -> Iterator[HookedTransformer]:
        """Hooks that stay while the block is open."""
        before = self.__dict__.get("_hooks", ())
        self.__dict__["_hooks"] = (*before, *fwd_hooks)
        try:
            yield self
        finally:
            self.__dict__["_hooks"] = before

    def add_hook(self, name: str | Callable[[str], bool], hook: Hook, dir: str = "fwd") -> None:
        """A hook of every run that follows, until `reset_hooks()`. Raises BadArgument for one of the backward."""
        if dir != "fwd":
            raise BadArgument(
                f"no {dir!r} hooks: gradients are read and written in a block, in with loss.backward():"
            )
        self.__dict__["_hooks"] = (*self.__dict__.get("_hooks", ()), (name, hook))

    def reset_hooks(self) -> None:
        self.__dict__["_hooks"] = ()

    # -- weights -----------------------------------------------------------------------------------------------

    @property
    def W_E(self) -> Any:
        """The embedding, [vocabulary, hidden]."""
        return self._weight("embed")

    @property
    def W_U(self) -> Any:
        """The unembedding, [hidden, vocabulary]."""
        return self._weight("unembed").T

    def _weight(self, role: str) -> Any:
        path = self.manifest.roles.get(role)
        if path is None:
            raise BadArgument(f"{self.manifest.model} has no {role} that its checks found")
        module: Any = self
        for name in path.split("."):
            module = module[int(name)] if name.isdigit() else getattr(module, name)
        if ACTIVE.get() is not None:
            return module.weight
        with self.trace([[0]], remote=self._access.prefers_server):
            weight = module.weight.save()
        return weight.value
