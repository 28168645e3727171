"""A hosted model's tokenizer, from the file the server hands out: no hub and no transformers library."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import tokenizers

from .errors import BadArgument, ConfigError, ControlFlow, InvalidPayload
from .tracing.outside import is_deferred


class Encoding(dict[str, Any]):
    """What calling a tokenizer gives: `input_ids` and `attention_mask`, as items and as attributes."""

    @property
    def input_ids(self) -> Any:
        return self["input_ids"]

    @property
    def attention_mask(self) -> Any:
        return self["attention_mask"]


class Tokenizer:
    """Text to ids and back, as the model was trained with.

    Args:
        data: the bytes of a tokenizer.json.
        config: what that file doesn't hold: "bos_token", "eos_token", "pad_token" (and each with "_id"),
            "chat_template", "model_max_length".

    Raises:
        InvalidPayload: `data` isn't a tokenizer.
    """

    def __init__(self, data: bytes, config: Mapping[str, Any] | None = None) -> None:
        self.config = dict(config or {})
        try:
            self._inner = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
        except Exception as error:
            raise InvalidPayload(f"not a tokenizer.json: {error}") from error
        self._inner.no_padding()
        self._inner.no_truncation()
        self.bos_token = self._text("bos_token")
        self.eos_token = self._text("eos_token")
        self.unk_token = self._text("unk_token")
        self.pad_token = self._text("pad_token")
        self.chat_template = self.config.get("chat_template")
        self.model_max_length = self.config.get("model_max_length")

    def __repr__(self) -> str:
        return (
            f"Tokenizer({len(self)} tokens, bos={self.bos_token!r}, eos={self.eos_token!r}, pad={self.pad_token!r})"
        )

    def __len__(self) -> int:
        """All tokens, those added after training included."""
        return int(self._inner.get_vocab_size(with_added_tokens=True))

    @property
    def vocab_size(self) -> int:
        """Tokens of the trained vocabulary alone."""
        return int(self._inner.get_vocab_size(with_added_tokens=False))

    @property
    def bos_token_id(self) -> int | None:
        return self._id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._id("eos_token")

    @property
    def unk_token_id(self) -> int | None:
        return self._id("unk_token")

    @property
    def pad_token_id(self) -> int | None:
        return self._id("pad_token")

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        add_special_tokens: bool = True,
        padding: bool = False,
        return_tensors: Literal["pt", "np"] | None = None,
    ) -> Encoding:
        """Ids and mask of a text, or of a list of them.

        Args:
            padding: pad on the left to the longest.
            return_tensors: "pt" or "np" for a tensor or array (of one row, for a single text) in place of lists.

        Raises:
            BadArgument: neither text nor texts, or rows of several lengths asked for as one tensor.
        """
        single = isinstance(text, str)
        texts = [text] if isinstance(text, str) else list(text)
        if not all(isinstance(item, str) for item in texts):
            raise BadArgument("a tokenizer takes a text or a list of texts")
        rows = [found.ids for found in self._inner.encode_batch(texts, add_special_tokens=add_special_tokens)]
        masks = [[1] * len(row) for row in rows]
        if padding:
            rows, masks = self._pad(rows), self._pad(masks, 0)
        if return_tensors is not None:
            return Encoding(input_ids=stack(rows, return_tensors), attention_mask=stack(masks, return_tensors))
        return Encoding(input_ids=rows[0] if single else rows, attention_mask=masks[0] if single else masks)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        if not isinstance(text, str):
            raise BadArgument(f"a tokenizer encodes text, not a {type(text).__name__}")
        return list(self._inner.encode(text, add_special_tokens=add_special_tokens).ids)

    def tokenize(self, text: str) -> list[str]:
        """The text's pieces as the vocabulary writes them."""
        return list(self._inner.encode(text, add_special_tokens=False).tokens)

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        """The text of an id, a list of ids, or a tensor or array of either."""
        return str(self._inner.decode(_ids(ids), skip_special_tokens=skip_special_tokens))

    def batch_decode(self, rows: Iterable[Any], skip_special_tokens: bool = False) -> list[str]:
        """The text of each row; of each id, if the rows are single ids."""
        return [self.decode(row, skip_special_tokens) for row in rows]

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        """The vocabulary's writing of an id, or of each of several. None for an id it lacks."""
        plain = ids.tolist() if hasattr(ids, "tolist") else ids
        if isinstance(plain, int):
            return self._inner.id_to_token(plain)
        return [self._inner.id_to_token(item) for item in _ids(plain)]

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """The other way around; a token it lacks is the unknown token's id, None where there is none."""
        if isinstance(tokens, str):
            found = self._inner.token_to_id(tokens)
            return self.unk_token_id if found is None else found
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def get_vocab(self) -> dict[str, int]:
        return dict(self._inner.get_vocab(with_added_tokens=True))

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tokenize: bool = True,
        add_generation_prompt: bool = False,
        **extra: Any,
    ) -> Any:
        """A conversation in the form the model was tuned on: ids, or with `tokenize=False` text.

        Args:
            messages: as in [{"role": "user", "content": "Hello"}].
            add_generation_prompt: end where the model's answer begins.
            extra: further values the template reads.

        Raises:
            ConfigError: the model has no template, or jinja2 isn't installed.
            BadArgument: the template refuses the messages.
        """
        text = _render(self._template(), messages, add_generation_prompt, self._specials() | extra)
        return self.encode(text, add_special_tokens=False) if tokenize else text

    def _template(self) -> str:
        found = self.chat_template
        if isinstance(found, Mapping):
            found = found.get("default")
        if not isinstance(found, str):
            raise ConfigError(
                "this model has no chat template: it wasn't tuned on conversations; write the text out"
            )
        return found

    def _specials(self) -> dict[str, Any]:
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        return {name: self._text(name) for name in names if self._text(name) is not None}

    def _pad(self, rows: list[list[int]], filler: int | None = None) -> list[list[int]]:
        if filler is None:
            filler = self.pad_token_id if self.pad_token_id is not None else self.eos_token_id
        longest = max(map(len, rows), default=0)
        return [[filler or 0] * (longest - len(row)) + row for row in rows]

    def _text(self, name: str) -> str | None:
        value = self.config.get(name)
        # Some files write a token as a map with its flags.
        if isinstance(value, Mapping):
            value = value.get("content")
        return value if isinstance(value, str) else None

    def _id(self, name: str) -> int | None:
        given = self.config.get(f"{name}_id")
        if isinstance(given, int):
            return given
        token = self._text(name)
        return None if token is None else self._inner.token_to_id(token)


def _ids(value: Any) -> list[int]:
    plain = value.tolist() if hasattr(value, "tolist") else value
    plain = [plain] if isinstance(plain, int) else list(plain)
    if any(map(is_deferred, plain)):
        raise ControlFlow("these ids exist only when the block has run: save them, and decode them after it")
    plain = [item.item() if hasattr(item, "item") else item for item in plain]
    if not all(isinstance(item, int) and item >= 0 for item in plain):
        raise BadArgument("token ids are whole numbers: one, or one row of them; batch_decode takes several rows")
    return plain


def stack(rows: list[list[int]], kind: str) -> Any:
    """Rows of ids as a tensor ("pt") or an array ("np"). Raises BadArgument for rows of several lengths."""
    if len({len(row) for row in rows}) > 1:
        raise BadArgument("texts of several lengths make no tensor; pass padding=True")
    array = np.array(rows, dtype=np.int64)
    if kind == "np":
        return array
    import torch

    return torch.from_numpy(array)


def _render(template: str, messages: Sequence[Mapping[str, Any]], prompt: bool, values: Mapping[str, Any]) -> str:
    """Templates are programs from elsewhere: they run in the sandbox."""
    try:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise ConfigError("chat templates need jinja2: pip install jinja2") from error

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(template).render(
            messages=list(messages), add_generation_prompt=prompt, tools=None, documents=None, **values
        )
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        raise BadArgument(f"the model's chat template refuses this: {error}") from error
