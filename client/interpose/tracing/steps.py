"""Which steps of a generation the following lines concern."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, NoReturn, TypeAlias

from ..errors import BadArgument, ControlFlow
from ..graph.generation import new_tokens
from .recorder import Recorder

Selection: TypeAlias = "int | slice | Sequence[int]"


class Iter:
    """`t.iter[:3]`, `t.iter[2]`, `t.iter[[0, 4]]`."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def __getitem__(self, selection: Selection) -> Steps:
        return Steps(self._recorder, selection)

    def later(self, step: int, count: int) -> int:
        """The step `count` after one. Raises BadArgument if there is none."""
        steps = self[:]
        steps._check_apart()
        if step + count not in steps._numbers():
            raise BadArgument(f"step {step + count} is outside the {len(steps._numbers())} new tokens asked for")
        return step + count


class Steps:
    """Some steps of the generation. Step 0 is the prompt's forward, each later one that of a new token.

    `for step in t.iter[:3]:` runs the loop's body for each step, with `step` an ordinary int. `with t.iter[1:]:`
    records its body once, for all those steps; what is saved there becomes a list with one value a step, however
    few they are. `with t.iter[2]:` is that step alone, and what is saved there that step's value.
    """

    def __init__(self, recorder: Recorder, selection: Selection) -> None:
        if recorder.runs[-1].kind != "generate":
            raise BadArgument("steps exist in generate; a trace has one forward")
        self._recorder = recorder
        self._selection = selection
        self._token: tuple[int, int | None] = (0, None)

    def _numbers(self) -> list[int]:
        most = new_tokens(self._recorder.runs[-1])
        chosen = self._selection
        if isinstance(chosen, slice):
            return list(range(most))[chosen]
        numbers = [chosen] if isinstance(chosen, int) else list(chosen)
        found = [number + most if number < 0 else number for number in numbers]
        if not all(0 <= number < most for number in found):
            raise BadArgument(f"step {numbers} is outside the {most} new tokens asked for")
        return found

    def _check_apart(self) -> None:
        if self._recorder.in_steps():
            raise BadArgument("steps can't be chosen in a body of steps, which is recorded once for all of them")

    def __iter__(self) -> Iterator[int]:
        self._check_apart()
        before = self._recorder.step
        try:
            for step in self._numbers():
                self._recorder.step = step
                yield step
                if self._recorder.stopped:
                    return
        finally:
            self._recorder.step = before

    def __enter__(self) -> Steps | int:
        recorder = self._recorder
        self._check_apart()
        self._token = recorder.step, recorder.when
        numbers = self._numbers()
        if not numbers:
            raise BadArgument("there is no such step")
        if isinstance(self._selection, int):
            recorder.step = numbers[0]
        elif numbers == list(range(numbers[0], numbers[-1] + 1)):
            to_the_end = isinstance(self._selection, slice) and self._selection.stop is None
            recorder.when = recorder.node("steps", (numbers[0], None if to_the_end else numbers[-1] + 1))
            recorder.step = 0
        else:
            raise BadArgument("these steps don't follow one another; write for step in t.iter[...]:")
        return numbers[0] if isinstance(self._selection, int) else self

    def _no_number(self, *args: Any) -> NoReturn:
        raise ControlFlow(
            "this body is recorded once for all its steps, so it has no step number; for one, write "
            "for step in t.iter[...]:"
        )

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __index__ = __int__ = __bool__ = _no_number
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __mod__ = __contains__ = _no_number
    __hash__ = object.__hash__

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._recorder.step, self._recorder.when = self._token
