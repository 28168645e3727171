"""Wrong programs, and exactly what each is told: class, wire code, line, and the advice it gets."""

from __future__ import annotations

import linecache
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from interpose import LanguageModel, errors
from interpose.tracing.tracer import ACTIVE, SESSION
from models import tiny
from serving import serve

ROW = [5, 9, 33, 7]
Program = Callable[[Any], Any]
TABLE: list[tuple[Program, type[errors.InterposeError], str]] = []


@pytest.fixture(scope="module")
def model() -> Any:
    return LanguageModel(str(tiny("gpt2")))


def told(kind: type[errors.InterposeError], phrase: str) -> Callable[[Program], Program]:
    """Enter a program into the table: the line marked `# here` raises `kind`, whose message holds `phrase`."""

    def enter(program: Program) -> Program:
        TABLE.append((program, kind, phrase))
        return program

    return enter


def line_of(error: errors.InterposeError, program: str = __file__) -> str:
    """The user's line an error names; for one raised while recording, where Python raised it in that file."""
    if error.source is not None:
        return linecache.getline(error.source.file, error.source.line)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == program]
    return linecache.getline(program, frames[-1].lineno or 0)


# -- names -------------------------------------------------------------------------------------------------------


@told(errors.UnknownModule, "did you mean transformer.h.0.attn")
def a_module_misspelt(model: Any) -> None:
    with model.trace(ROW):
        model.transformer.h[0].atn.output.save()  # here


@told(errors.UnknownModule, "did you mean transformer.h.0.resid_mid")
def a_standard_name_misspelt(model: Any) -> None:
    with model.trace(ROW):
        model.transformer.h[0].resid_middle.save()  # here


@told(errors.UnknownAdapter, "it has none at all")
def an_adapter_of_a_model_without_any(model: Any) -> None:
    with model.trace(ROW, adapter="french"):  # here
        model.output.save()


@told(errors.BadArgument, "did you mean timeout?")
def an_option_of_traces_misspelt(model: Any) -> None:
    with model.trace(ROW, timout=5):  # here
        model.output.save()


@told(errors.ControlFlow, "save them, and decode them after it")
def ids_decoded_before_they_are_there(model: Any) -> None:
    with model.trace(ROW):
        model.tokenizer.decode([model.output[0, -1].argmax()])  # here


@told(errors.ControlFlow, "x.round()")
def a_value_rounded_by_python(model: Any) -> None:
    with model.trace(ROW):
        round(model.output.max())  # here


@told(errors.UnknownPoint, "take one first: output[0]")
def a_tuple_taken_for_its_tensor(model: Any) -> None:
    with model.trace(ROW):
        model.transformer.h[0].attn.output[:, -1] = 0  # here


@told(errors.UnknownModule, "3 modules")
def a_layer_too_many(model: Any) -> None:
    with model.trace(ROW):
        model.transformer.h[12].output[0].save()  # here


@told(errors.UnknownModule, "transformer")
def another_familys_name(model: Any) -> None:
    with model.trace(ROW):
        model.model.layers[0].output[0].save()  # here


@told(errors.UnknownPoint, "output, input, inputs")
def assigning_what_is_no_point(model: Any) -> None:
    with model.trace(ROW):
        model.transformer.h[0].mlp.value = torch.zeros(1)  # here


@told(errors.UnknownPoint, "no hook point matches")
def a_cache_that_matches_nothing(model: Any) -> None:
    with model.trace(ROW) as tracer:
        tracer.cache("blocks.*.nothing")  # here


@told(errors.UnknownPoint, "called 1 times")
def a_second_call(model: Any) -> None:
    with model.trace(ROW):
        _ = model.transformer.h[0].calls[1].output  # here


@told(errors.UnknownPoint, "past_key_values")
def a_field_that_holds_no_tensor(model: Any) -> None:
    with model.trace(ROW):
        _ = model.output.past_key_values  # here


@told(errors.UnknownOp, "nonsense")
def an_operation_that_does_not_exist(model: Any) -> None:
    with model.trace(ROW):
        model.output.nonsense()  # here


@told(errors.UnknownOp, "did you mean linalg_")
def a_torch_function_outside_the_table(model: Any) -> None:
    with model.trace(ROW):
        torch.linalg.lu_factor(model.output[0, :4, :4])  # here


# -- shapes and indices ------------------------------------------------------------------------------------------


@told(errors.ShapeMismatch, "[2, 4, 64]")
def replaced_by_another_shape(model: Any) -> None:
    with model.trace(ROW):
        model.transformer.h[0].output = torch.zeros(2, 4, 64)  # here


@told(errors.ShapeMismatch, "64")
def shapes_that_do_not_multiply(model: Any) -> None:
    with model.trace(ROW):
        hidden = model.transformer.h[0].output[0]
        _ = hidden @ hidden  # here


@told(errors.ShapeMismatch, "")
def a_write_that_does_not_fit(model: Any) -> None:
    with model.trace(ROW):
        model.transformer.h[0].output[0][:, -1] = torch.zeros(7)  # here


@told(errors.ShapeMismatch, "last dimension of 4")
def a_module_called_on_another_width(model: Any) -> None:
    with model.trace(ROW):
        model.lm_head(model.transformer.h[0].output[0][..., :4])  # here


@told(errors.IndexOutOfRange, "4")
def a_position_too_many(model: Any) -> None:
    with model.trace(ROW):
        _ = model.transformer.h[0].output[0][:, 4]  # here


@told(errors.IndexOutOfRange, "embedding")
def a_row_that_is_not_there(model: Any) -> None:
    with model.trace(ROW):
        ids = model.output.argmax(-1) + 400
        torch.nn.functional.embedding(ids, model.transformer.wte.weight).save()  # here


@told(errors.IndexOutOfRange, "vocabulary of 400")
def a_token_that_does_not_exist(model: Any) -> None:
    with model.trace([5, 400]):  # here
        model.output.save()


@told(errors.LimitExceeded, "128 positions")
def a_prompt_that_is_too_long(model: Any) -> None:
    with model.trace([5] * 129):  # here
        model.output.save()


@told(errors.LimitExceeded, "new tokens")
def a_generation_that_is_too_long(model: Any) -> None:
    with model.generate(ROW, max_new_tokens=125) as tracer:  # here
        tracer.result.save()


@told(errors.ShapeUnknown, "values")
def a_shape_that_depends_on_values(model: Any) -> None:
    with model.trace(ROW):
        _ = model.output[model.output > 0].shape  # here


# -- blocks' outputs ---------------------------------------------------------------------------------------------


@told(errors.BadArgument, "output[0][1]")
def the_second_part_of_a_block(model: Any) -> None:
    with model.trace(ROW):
        _ = model.transformer.h[0].output[1]  # here


@told(errors.BadArgument, "output[0]")
def unpacking_a_block(model: Any) -> None:
    with model.trace(ROW):
        _hidden, *_rest = model.transformer.h[0].output  # here


# -- what Python can't have --------------------------------------------------------------------------------------


@told(errors.ControlFlow, "t.cond")
def branching(model: Any) -> None:
    with model.trace(ROW):
        if model.output.max() > 0:  # here
            pass


@told(errors.ControlFlow, "t.while_loop")
def looping(model: Any) -> None:
    with model.trace(ROW):
        value = model.transformer.h[0].output[0].norm()
        while value > 1:  # here
            value = value / 2


@told(errors.ControlFlow, "after the block")
def taking_a_number(model: Any) -> None:
    with model.trace(ROW):
        float(model.output[0, -1, 0])  # here


@told(errors.ControlFlow, "after the block")
def a_python_list(model: Any) -> None:
    with model.trace(ROW):
        model.output.argmax(-1).tolist()  # here


@told(errors.ControlFlow, "== item")
def searching(model: Any) -> None:
    with model.trace(ROW):
        _ = 3 in model.output  # here


@told(errors.BadArgument, "is a parameter, which a block doesn't change")
def a_weight_written(model: Any) -> None:
    with model.trace(ROW):
        model.transformer.h[0].mlp.c_proj.weight[:] = 0  # here
        model.output.save()


@told(errors.ControlFlow, "NumPy")
def numpy(model: Any) -> None:
    with model.trace(ROW):
        import numpy as np

        np.asarray(model.output)  # here


# -- when --------------------------------------------------------------------------------------------------------


@told(errors.WrongOrder, "later in the forward")
def an_early_layer_from_a_late_one(model: Any) -> None:
    with model.trace(ROW):
        model.transformer.h[0].output[0][:] = model.transformer.h[2].output[0]  # here


@told(errors.WrongOrder, "later in the forward")
def an_early_layer_from_a_late_one_at_every_step(model: Any) -> None:
    with model.generate(ROW, max_new_tokens=3) as tracer, tracer.iter[1:]:
        model.transformer.h[0].output[0][:] = model.transformer.h[2].output[0]  # here


@told(errors.WrongOrder, "later in the forward")
def an_early_step_from_a_late_one(model: Any) -> None:
    with model.generate(ROW, max_new_tokens=5) as tracer:
        for _ in tracer.iter[[3]]:
            late = model.transformer.h[0].output[0][:, -1]
        for _ in tracer.iter[[1]]:
            model.transformer.h[2].output[0][:, -1] = late  # here


@told(errors.WrongOrder, "later in the forward")
def the_residual_from_what_is_read_of_it(model: Any) -> None:
    with model.trace(ROW):
        given = model.transformer.h[1].ln_2.input
        model.transformer.h[1].resid_mid[:] = given * 2  # here


@told(errors.WrongOrder, "condition is known only after")
def a_condition_known_too_late(model: Any) -> None:
    with model.trace(ROW) as tracer:

        def change() -> None:
            model.transformer.h[0].output[0][:] = 0  # here

        tracer.cond(model.output.max() > 0, change)


@told(errors.WrongOrder, "stopped")
def after_stop(model: Any) -> None:
    with model.trace(ROW) as tracer:
        tracer.stop()
        model.output.save()  # here


@told(errors.WrongOrder, "skips")
def inside_a_skipped_module(model: Any) -> None:
    with model.trace(ROW):
        model.transformer.h[1].skip(model.transformer.h[0].output[0])
        model.transformer.h[1].attn.output[0].save()  # here


# -- bodies ------------------------------------------------------------------------------------------------------


@told(errors.BadArgument, "let it return it")
def a_value_that_leaves_a_branch(model: Any) -> None:
    with model.trace(ROW) as tracer:
        kept: list[Any] = []
        hidden = model.transformer.h[0].output[0]
        tracer.cond(hidden.sum() > 0, lambda: kept.append(hidden * 2))
        kept[0].save()  # here


@told(errors.BadArgument, "let it return it")
def a_value_that_leaves_a_loop(model: Any) -> None:
    with model.trace(ROW) as tracer:
        kept: list[Any] = []

        def body(turn: Any, x: Any) -> Any:
            kept.append(x * 2)
            return x

        tracer.loop(3, body, model.output)
        kept[0].save()  # here


@told(errors.BadArgument, "before it")
def reading_a_point_in_a_loop(model: Any) -> None:
    with model.trace(ROW) as tracer:

        def body(turn: Any, x: Any) -> Any:
            return x + model.transformer.h[0].output[0]  # here

        tracer.loop(3, body, model.transformer.wpe.output)


@told(errors.BadArgument, "before it")
def saving_in_a_loop(model: Any) -> None:
    with model.trace(ROW) as tracer:

        def body(turn: Any, x: Any) -> Any:
            return x.save()  # here

        tracer.loop(3, body, model.output)


@told(errors.BadArgument, "t.while_loop")
def a_loop_of_unknown_length(model: Any) -> None:
    with model.trace(ROW) as tracer:
        tracer.loop(model.output.argmax(), lambda turn, x: x, model.output)  # here


@told(errors.BadArgument, "100,000 turns")
def a_loop_that_is_too_long(model: Any) -> None:
    with model.trace(ROW) as tracer:
        tracer.loop(10**6, lambda turn, x: x, model.output)  # here


@told(errors.ShapeMismatch, "must be alike")
def a_loop_that_changes_shape(model: Any) -> None:
    with model.trace(ROW) as tracer:
        tracer.loop(3, lambda turn, x: x[:, :2], model.output)  # here


@told(errors.BadArgument, "carries 1 values")
def a_loop_that_loses_a_value(model: Any) -> None:
    with model.trace(ROW) as tracer:
        tracer.loop(3, lambda turn, x: None, model.output)  # here


@told(errors.BadArgument, "number of values: 1 and 0")
def two_ways_that_differ(model: Any) -> None:
    with model.trace(ROW) as tracer:
        tracer.cond(model.output.max() > 0, lambda: model.output * 2)  # here


@told(errors.BadArgument, ".any() or .all()")
def a_condition_of_many_values(model: Any) -> None:
    with model.trace(ROW) as tracer:
        tracer.cond(model.output > 0, lambda: None)  # here


# -- generation --------------------------------------------------------------------------------------------------


@told(errors.BadArgument, "did you mean max_new_tokens")
def an_option_misspelt(model: Any) -> None:
    with model.generate(ROW, max_new_token=3):  # here
        pass


@told(errors.BadArgument, "a number above 0")
def a_temperature_of_zero(model: Any) -> None:
    with model.generate(ROW, temperature=0):  # here
        pass


@told(errors.BadArgument, "steps exist in generate")
def steps_in_a_trace(model: Any) -> None:
    with model.trace(ROW) as tracer:
        _ = tracer.iter[:2]  # here


@told(errors.BadArgument, "outside the 3 new tokens")
def a_step_that_will_not_come(model: Any) -> None:
    with model.generate(ROW, max_new_tokens=3) as tracer, tracer.iter[5]:  # here
        pass


@told(errors.BadArgument, "for step in t.iter")
def a_body_for_scattered_steps(model: Any) -> None:
    with model.generate(ROW, max_new_tokens=5) as tracer, tracer.iter[[0, 3]]:  # here
        pass


@told(errors.BadArgument, "only a generation")
def tokens_of_a_trace(model: Any) -> None:
    with model.trace(ROW):
        model.generator.output.save()  # here


# -- gradients ---------------------------------------------------------------------------------------------------


@told(errors.BadArgument, "one floating-point number")
def backward_from_many(model: Any) -> None:
    with model.trace(ROW):
        model.output.backward()  # here


@told(errors.BadArgument, "with loss.backward()")
def a_gradient_without_a_loss(model: Any) -> None:
    with model.trace(ROW):
        model.transformer.h[0].output[0].grad.save()  # here


@told(errors.BadArgument, "loss comes before")
def a_gradient_behind_the_loss(model: Any) -> None:
    with model.trace(ROW):
        late = model.transformer.h[2].output[0]
        with model.transformer.h[0].output[0].sum().backward():
            late.grad.save()  # here


@told(errors.NotReached, "no gradient flows")
def a_gradient_of_another_prompt(model: Any) -> None:
    with model.trace() as tracer:
        with tracer.invoke(ROW):
            hidden = model.transformer.h[0].output[0]
        with tracer.invoke(ROW), model.output.sum().backward():
            hidden.grad.save()  # here


@told(errors.BadArgument, "a generation has none")
def a_gradient_in_a_generation(model: Any) -> None:
    with model.generate(ROW, max_new_tokens=2):
        model.output.sum().backward()  # here


# -- blocks ------------------------------------------------------------------------------------------------------


@told(errors.NotSaved, ".save()")
def an_unsaved_value(model: Any) -> None:
    with model.trace(ROW):
        hidden = model.transformer.h[0].output[0]
        model.output.save()
    _ = hidden + 1  # here


@told(errors.DeferredError, "model.trace")
def outside_a_block(model: Any) -> None:
    _ = model.transformer.h[0].output  # here


@told(errors.DeferredError, "t.invoke")
def a_block_in_a_block(model: Any) -> None:
    with model.trace(ROW), model.trace(ROW):  # here
        pass


@told(errors.BadArgument, "without one")
def an_invoke_beside_a_prompt(model: Any) -> None:
    with model.trace(ROW) as tracer:
        tracer.invoke(ROW)  # here


@told(errors.BadArgument, "don't nest")
def an_invoke_in_an_invoke(model: Any) -> None:
    with model.trace() as tracer, tracer.invoke(ROW), tracer.invoke(ROW):  # here
        pass


@told(errors.BadArgument, "")
def an_empty_prompt(model: Any) -> None:
    with model.trace([]):  # here
        model.output.save()


@told(errors.BadArgument, "takes no input 'labels'; it takes input_ids")
def an_input_the_model_does_not_take(model: Any) -> None:
    with model.trace({"input_ids": [ROW], "labels": torch.tensor([ROW])}):  # here
        model.output.save()


@told(errors.BadArgument, "takes no input 'pixel_values'")
def an_image_for_a_model_of_texts(model: Any) -> None:
    with model.trace(ROW, pixel_values=torch.zeros(1, 3, 8, 8)):  # here
        model.output.save()


@told(errors.BadArgument, "generate has no option 'past_key_values'")
def a_cache_of_ones_own(model: Any) -> None:
    with model.generate(ROW, past_key_values=torch.zeros(1)):  # here
        model.output.save()


@told(errors.BadArgument, "attention_mask has another shape")
def a_mask_of_another_shape(model: Any) -> None:
    with model.trace(input_ids=torch.tensor([ROW]), attention_mask=torch.ones(1, 3, dtype=torch.int64)):  # here
        model.output.save()


@told(errors.BadArgument, "hides tokens within a row")
def a_mask_with_a_hole(model: Any) -> None:
    with model.trace(input_ids=[5, 9, 33], attention_mask=[1, 0, 1]):  # here
        model.output.save()


@told(errors.BadArgument, "attention_mask holds whole numbers")
def a_mask_of_floats(model: Any) -> None:
    with model.trace(input_ids=torch.tensor([[5, 9, 33]]), attention_mask=torch.ones(1, 3)):  # here
        model.output.save()


@told(errors.BadArgument, "comes within the prompt")
def a_mask_beside_ids(model: Any) -> None:
    with model.trace(ROW, attention_mask=torch.ones(1, 3)):  # here
        model.output.save()


@told(errors.BadArgument, "no input_ids")
def a_mask_without_ids(model: Any) -> None:
    with model.trace({"attention_mask": torch.ones(1, 3)}):  # here
        model.output.save()


@told(errors.UnknownPoint, "calls mul 4 times; name the call: functions.mul[0].output")
def a_call_that_isnt_named(model: Any) -> None:
    with model.trace(ROW):
        model.transformer.h[0].mlp.act.functions.mul.output.save()  # here


@told(errors.UnknownPoint, "name the call: functions.mul[0].output")
def a_call_that_isnt_named_written(model: Any) -> None:
    with model.trace(ROW):
        model.transformer.h[0].mlp.act.functions.mul.output = torch.zeros(3)  # here


@told(errors.UnknownPoint, "functions.mul[0].output = ...")
def all_calls_replaced(model: Any) -> None:
    with model.trace(ROW):
        model.transformer.h[0].mlp.act.functions.mul = torch.zeros(3)  # here


@told(errors.UnknownPoint, "functions.mul[0].output = ...")
def a_call_replaced(model: Any) -> None:
    with model.trace(ROW):
        model.transformer.h[0].mlp.act.functions.mul[0] = torch.zeros(3)  # here


@told(errors.BadArgument, "dict can't go into a graph")
def an_object_as_an_argument(model: Any) -> None:
    with model.trace(ROW):
        _ = model.output + {}  # here


@told(errors.BadArgument, "[:] =")
def a_point_replaced_by_a_number(model: Any) -> None:
    with model.trace(ROW):
        model.transformer.h[0].output = 0  # here


@told(errors.BadArgument, "real tensor")
def writing_into_a_real_tensor(model: Any) -> None:
    kept = torch.zeros(64)
    with model.trace(ROW):
        kept[:] = model.transformer.h[0].output[0][0, -1]  # here


@told(errors.ConfigError, "remote=True")
def a_local_job_to_wait_for(model: Any) -> None:
    with model.trace(ROW, blocking=False):  # here
        model.output.save()


# -- sessions, edits, programs -----------------------------------------------------------------------------------


@told(errors.ControlFlow, "after the block")
def a_whole_number(model: Any) -> None:
    with model.trace(ROW):
        int(model.output.argmax())  # here


@told(errors.WrongOrder, "later in the forward")
def an_early_layer_of_one_prompt_from_a_late_one_of_another(model: Any) -> None:
    with model.trace() as tracer:
        with tracer.invoke(ROW):
            late = model.transformer.h[2].output[0]
        with tracer.invoke(ROW):
            model.transformer.h[0].output[0][:] = late  # here


@told(errors.WrongOrder, "later in the forward")
def an_earlier_run_from_a_later_one(model: Any) -> None:
    with model.session():
        with model.trace(ROW):
            early = model.transformer.h[0].output[0]
        with model.trace(ROW):
            early[:] = model.transformer.h[0].output[0]  # here


@told(errors.DeferredError, "session")
def a_session_in_a_session(model: Any) -> None:
    with model.session(), model.session():  # here
        pass


@told(errors.BadArgument, "timeout: a session runs as one job")
def a_blocks_own_time_in_a_session(model: Any) -> None:
    with model.session(), model.trace(ROW, timeout=5):  # here
        pass


@told(errors.BadArgument, "remote: a session runs as one job")
def a_remote_block_in_a_local_session(model: Any) -> None:
    with model.session(), model.trace(ROW, remote=True):  # here
        pass


@told(errors.OpFailed, "made a copy here")
def a_copy_for_all_one_knows(model: Any) -> None:
    with model.trace(ROW):
        hidden = model.transformer.h[0].output[0]
        turned = hidden.transpose(1, 2).contiguous()
        hidden[:, -1] = 0
        turned.save()  # here


@told(errors.BadArgument, "may have made a copy")
def another_copy_for_all_one_knows(model: Any) -> None:
    with model.trace(ROW):
        hidden = model.transformer.h[0].output[0]
        flat = hidden.transpose(1, 2).reshape_as(model.transformer.h[1].output[0])
        hidden[:, -1] = 0
        flat.save()  # here


@told(errors.BadArgument, "after the last prompt")
def a_prompt_after_the_whole_batch(model: Any) -> None:
    with model.trace() as tracer:
        with tracer.invoke(ROW):
            pass
        with tracer.invoke():
            model.output.save()
        with tracer.invoke(ROW):  # here
            pass


@told(errors.DeferredError, "own model")
def another_model_in_a_session(model: Any) -> None:
    other = LanguageModel(str(tiny("llama")))
    with model.session(), other.trace(ROW):  # here
        pass


@told(errors.BadArgument, "edit")
def saving_in_an_edit(model: Any) -> None:
    with model.edit() as edited:
        edited.transformer.h[0].output[0].save()  # here


@told(errors.BadArgument, "the program doesn't touch layer 2; it touches 0")
def a_program_moved_from_where_it_is_not(model: Any) -> None:
    with model.trace(ROW) as tracer:
        model.transformer.h[0].output[0].save()
    tracer.graph.run(model, layers={2: 1})  # here


@told(errors.BadArgument, "no parameter 'scale'")
def a_program_given_what_it_does_not_take(model: Any) -> None:
    with model.trace(ROW) as tracer:
        model.output.save()
    tracer.graph.run(model, scale=2.0)  # here


@told(errors.UnknownModule, "doesn't fit tiny-llama")
def a_program_for_another_family(model: Any) -> None:
    with model.trace(ROW) as tracer:
        model.transformer.h[0].attn.output[0].save()
    tracer.graph.run(LanguageModel(str(tiny("llama"))), ROW)  # here


class Remote(LanguageModel):
    """A model whose blocks go to a server unless they say otherwise."""

    def trace(self, *args: Any, **options: Any) -> Any:
        return super().trace(*args, **{"remote": SESSION.get() is None, **options})

    def generate(self, *args: Any, **options: Any) -> Any:
        inside = SESSION.get() is not None or ACTIVE.get() is not None
        return super().generate(*args, **options if inside else {"remote": True, **options})

    def session(self, **options: Any) -> Any:
        return super().session(**{"remote": True, **options})


HERE_ONLY = {
    *("a_local_job_to_wait_for", "a_blocks_own_time_in_a_session", "a_remote_block_in_a_local_session"),
    *("a_program_moved_from_where_it_is_not", "a_program_given_what_it_does_not_take"),
    *("an_adapter_of_a_model_without_any", "an_option_of_traces_misspelt"),
}
"""Programs that say themselves where they run, or at their first line what the model lacks."""


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with serve(f"tiny-gpt2={tiny('gpt2')}", data_dir=tmp_path_factory.mktemp("table")) as server:
        yield Remote("tiny-gpt2", host=server.host, api_key=server.key)


@pytest.mark.parametrize(
    ("program", "kind", "phrase"),
    [row for row in TABLE if row[0].__name__ not in HERE_ONLY],
    ids=[program.__name__ for program, *_ in TABLE if program.__name__ not in HERE_ONLY],
)
def test_a_server_says_the_same(
    remote: Any, program: Program, kind: type[errors.InterposeError], phrase: str
) -> None:
    with pytest.raises(errors.InterposeError) as caught:
        program(remote)
    error = caught.value
    assert (type(error), error.code) == (kind, kind.code)
    assert phrase in error.message
    assert "# here" in line_of(error)


def test_the_server_goes_on_after_all_of_them(remote: Any) -> None:
    with remote.trace(ROW):
        logits = remote.output.save()
    assert logits.shape == (1, 4, 400)


@pytest.mark.parametrize(("program", "kind", "phrase"), TABLE, ids=[program.__name__ for program, *_ in TABLE])
def test_table(model: Any, program: Program, kind: type[errors.InterposeError], phrase: str) -> None:
    with pytest.raises(errors.InterposeError) as caught:
        program(model)
    error = caught.value
    assert (type(error), error.code) == (kind, kind.code)
    assert phrase in error.message
    assert "# here" in line_of(error)
    with model.trace(ROW):  # what went wrong leaves the model as it was
        logits = model.output.save()
    assert logits.shape == (1, 4, 400)
