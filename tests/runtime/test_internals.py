"""What is used of a library beyond its public names: it is there, and if it isn't, that is said."""

from __future__ import annotations

import pytest
from interpose.errors import ConfigError
from interpose.runtime import partial_loading
from interpose.runtime.internals import Internals
from interpose.runtime.partial_loading import inside, load_part
from interpose.runtime.transformers_internals import LIBRARY
from models import tiny


def test_this_transformers_has_all_of_it() -> None:
    LIBRARY.check()


@pytest.mark.parametrize(
    ("module", "name"), [("json", "dump_all"), ("json", "JSONEncoder.item"), ("json.gone", "dumps")]
)
def test_what_a_library_lacks_is_told_by_name(module: str, name: str) -> None:
    lacking = Internals("transformers", "1.0", {"json": ("dumps", "JSONEncoder.encode"), module: (name,)})
    with pytest.raises(
        ConfigError, match=rf"transformers \d.* has no {module}\.{name}; .* tried with transformers 1.0"
    ):
        lacking.check()


def test_another_form_is_told() -> None:
    known = Internals("transformers", "1.0", {})
    with (
        pytest.raises(ConfigError, match=r"has its config in another form \(KeyError: 'size'\)"),
        known.shaped("its config", KeyError),
    ):
        {}["size"]
    with pytest.raises(ZeroDivisionError), known.shaped("its config", KeyError):
        1 / 0  # noqa: B018


def test_no_part_is_loaded_with_a_library_that_lacks_something(monkeypatch: pytest.MonkeyPatch) -> None:
    other = Internals("transformers", "1.0", {"transformers": ("load_by_parts",)})
    monkeypatch.setattr(partial_loading, "LIBRARY", other)
    with pytest.raises(ConfigError, match=r"has no transformers\.load_by_parts"):
        load_part(tiny("gpt2"), inside(["transformer.h.0"]))
