import numpy as np
import pytest
import torch
from interpose.errors import BadArgument, ConfigError, InvalidPayload
from interpose.runtime.describe import tokenizer as describe
from interpose.tokens import Tokenizer
from transformers import AutoTokenizer

TEXTS = ["The capital of France is", "", " leading", "naïve 日本語 🙂\n\ttabs", "<|im_start|>user", "a" * 300]


@pytest.fixture(scope="module", params=["smollm2", "minilm"])
def pair(request):
    theirs = AutoTokenizer.from_pretrained(request.getfixturevalue(request.param))
    return Tokenizer(*describe(theirs)), theirs


def test_the_same_ids(pair):
    ours, theirs = pair
    for special in (True, False):
        for text in TEXTS:
            assert ours.encode(text, add_special_tokens=special) == theirs.encode(text, add_special_tokens=special)
    assert ours(TEXTS).input_ids == theirs(TEXTS).input_ids
    assert ours(TEXTS[0])["attention_mask"] == theirs(TEXTS[0])["attention_mask"]
    assert [ours.tokenize(text) for text in TEXTS] == [theirs.tokenize(text) for text in TEXTS]


def test_the_same_text(pair):
    ours, theirs = pair
    ids = theirs.encode(TEXTS[0])
    for skip in (True, False):
        assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    for form in (torch.tensor(ids), np.array(ids), [torch.tensor(token) for token in ids]):
        assert ours.decode(form) == theirs.decode(ids)
    assert ours.decode(torch.tensor(ids[1])) == ours.decode(ids[1]) == theirs.decode(ids[1])
    assert ours.batch_decode(torch.tensor([ids, ids])) == theirs.batch_decode([ids, ids])
    assert ours.convert_ids_to_tokens(ids) == theirs.convert_ids_to_tokens(ids)
    assert ours.convert_tokens_to_ids(theirs.convert_ids_to_tokens(ids)) == ids


def test_the_same_facts(pair):
    ours, theirs = pair
    for name in (
        "bos_token",
        "eos_token",
        "pad_token",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "vocab_size",
    ):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert len(ours) == len(theirs)


def test_tensors_are_padded_on_the_left(pair):
    ours, theirs = pair
    theirs.padding_side = "left"
    for kind in ("pt", "np"):
        found, expected = (tokens(TEXTS[:2], padding=True, return_tensors=kind) for tokens in (ours, theirs))
        for name in ("input_ids", "attention_mask"):
            assert np.array_equal(found[name], expected[name])
    with pytest.raises(BadArgument, match="padding"):
        ours(TEXTS[:2], return_tensors="np")


def test_the_same_conversation(smollm2):
    theirs = AutoTokenizer.from_pretrained(smollm2)
    ours = Tokenizer(*describe(theirs))
    talk = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi!"}]
    for prompt in (True, False):
        text = theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=prompt)
        assert ours.apply_chat_template(talk, tokenize=False, add_generation_prompt=prompt) == text
        ids = theirs.apply_chat_template(talk, add_generation_prompt=prompt)["input_ids"]
        assert ours.apply_chat_template(talk, add_generation_prompt=prompt) == ids


def test_templates_stay_in_their_sandbox(smollm2):
    data = (smollm2 / "tokenizer.json").read_bytes()
    for template in (
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('no') }}",
        "{% for i in range(999999999) %}{% endfor %}",
        "{{ ",
    ):
        with pytest.raises(BadArgument, match="template"):
            Tokenizer(data, {"chat_template": template}).apply_chat_template([])
    with pytest.raises(ConfigError, match="no chat template"):
        Tokenizer(data).apply_chat_template([])


def test_what_is_no_tokenizer_is_refused():
    for data in (b"", b"{}", b"\xff", b'{"model": {"type": "Nonsense"}}'):
        with pytest.raises(InvalidPayload):
            Tokenizer(data)


def test_what_is_no_text_is_refused(pair):
    ours, _ = pair
    for wrong in (3, [1, 2], None):
        with pytest.raises((BadArgument, TypeError)):
            ours(wrong)
    for wrong in ([-1], ["a"], [[1]]):
        with pytest.raises(BadArgument):
            ours.decode(wrong)
