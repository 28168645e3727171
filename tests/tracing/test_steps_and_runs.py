"""What a body of steps saves, which steps can be chosen where, and values that decide over another run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interpose import LanguageModel
from interpose.errors import BadArgument, DeferredError
from models import tiny


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel(str(tiny("gpt2")))


def test_a_body_of_one_step_saves_a_list_all_the_same(model: Any) -> None:
    with model.generate([1, 2, 3], max_new_tokens=1) as tracer:
        with tracer.all():
            body = model.logits.save()
        alone = model.logits.save()
    assert len(body) == 1 and torch.equal(body[0], alone)


def test_a_save_under_a_condition_keeps_the_place_of_its_step(model: Any) -> None:
    with model.generate([1, 2, 3], max_new_tokens=6, eos_token_id=-1) as tracer:
        kept: list[Any] = []
        with tracer.all():
            even = model.logits[0, -1].argmax() % 2 == 0
            tracer.cond(even, lambda: kept.append(model.logits.save()))
        tokens = tracer.result.save()
    evens = [int(token) % 2 == 0 for token in tokens[0, 3:]]
    assert [value is not None for value in kept[0]] == evens
    assert len(set(evens)) == 2


def test_steps_are_not_chosen_inside_a_body_of_steps(model: Any) -> None:
    for choose in (lambda tracer: tracer.iter[2].__enter__(), lambda tracer: list(tracer.iter[:2])):
        with (
            pytest.raises(BadArgument, match="body of steps"),
            model.generate([1, 2, 3], max_new_tokens=3) as tracer,
            tracer.all(),
        ):
            choose(tracer)


def test_a_body_of_all_steps_inside_a_loop_over_steps_is_for_all(model: Any) -> None:
    with model.generate([1, 2, 3], max_new_tokens=3, eos_token_id=-1) as tracer:
        for _ in tracer.iter[[2]]:
            with tracer.all():
                body = model.logits.save()
            last = model.logits.save()
    assert len(body) == 3 and torch.equal(body[2], last)


def test_a_value_of_one_run_decides_over_another(model: Any) -> None:
    with model.session() as session:
        with model.trace([1, 2, 3]):
            late = model.logits.sum() > -torch.inf
        with model.trace([4, 5, 6]) as tracer:

            def emptied() -> Any:
                model.layers[0].output[0][:] = 0
                return model.layers[0].output[0].abs().sum()

            found = session.list()
            found.append(tracer.cond(late, emptied, lambda: 1.0))
    assert found[0] == 0


def test_losses_run_backward_in_any_order(model: Any) -> None:
    with model.trace([1, 2, 3]):
        first, last = model.layers[0].output[0], model.layers[2].output[0]
        late, early = last.sum(), (first * first).sum()
        with late.backward():
            through = first.grad.save()
        with early.backward():
            near = first.grad.save()
        hidden = first.save()
    assert torch.equal(near, 2 * hidden)
    assert through.abs().max() > 0


def test_a_tensor_made_in_inference_mode_goes_into_a_graph_as_it_was(model: Any) -> None:
    with torch.inference_mode():
        given = torch.ones(3)
    with model.trace([1, 2, 3]):
        clean = model.layers[0].output[0][0, :, 0].save()
        one = (model.layers[0].output[0][0, :, 0] + given).save()
        with torch.inference_mode():
            given.fill_(5)
        five = (model.layers[0].output[0][0, :, 0] + given).save()
    assert torch.equal(one, clean + 1) and torch.equal(five, clean + 5)


def test_an_edited_model_does_not_lose_its_edits_in_another_ones_session(model: Any) -> None:
    with model.edit() as edited:
        model.layers[0].output[0][:] = 0
    with pytest.raises(DeferredError, match="edits"), model.session(), edited.trace([1, 2]):
        edited.logits.save()
    with edited.session(), edited.trace([1, 2]):
        hidden = edited.layers[0].output[0].save()
    assert not hidden.any()


def test_a_body_for_all_steps_is_seen_by_reads_of_one_step_after_it(model: Any) -> None:
    with model.generate([1, 2, 3], max_new_tokens=4, eos_token_id=-1) as tracer:
        with tracer.iter[2]:
            before = model.layers[0].output[0].save()
        with tracer.all():
            model.layers[0].output[0][:] = 0
        with tracer.iter[2]:
            after = model.layers[0].output[0].save()
    assert before.any() and not after.any()


@pytest.mark.parametrize("point", [True, False])
def test_a_body_that_repeats_does_not_change_what_is_outside_it(model: Any, point: bool) -> None:
    with (
        pytest.raises(BadArgument, match="runs many times"),
        model.generate([1, 2, 3], max_new_tokens=4) as tracer,
    ):
        hidden = model.layers[0].output[0]
        outside = hidden if point else hidden * 0
        with tracer.all():
            outside += 1


def test_a_body_that_reads_nothing_of_its_steps_runs_at_each_all_the_same(model: Any) -> None:
    with model.generate([1, 2, 3], max_new_tokens=4, eos_token_id=-1) as tracer:
        total = model.layers[0].output[0].sum()
        with tracer.all():
            doubled = (total * 2).save()
    assert len(doubled) == 4


def test_a_session_loads_nothing_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server's blocks in a session of this process are refused at once, not after looking for the model here."""
    model = LanguageModel("a-server-s-model")
    monkeypatch.setattr(
        type(model._access), "local", property(lambda access: pytest.fail("it was looked for here"))
    )
    with model.session():
        pass
    with pytest.raises(BadArgument, match="remote: a session runs as one job"), model.session():
        model.trace([1, 2], remote=True)
