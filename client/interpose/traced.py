"""What every model has that blocks can be opened on: edits that stay, and values that exist only in a block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .errors import BadArgument, DeferredError
from .tracing.edits import Edit, Editor
from .tracing.execution import Options
from .tracing.handles import Module
from .tracing.recorder import Recorder
from .tracing.tracer import ACTIVE, Session


class Traced(Module):
    """A model, edited or not. The access to the model itself it shares with its edited copies."""

    _output_is_logits = True
    _runs_programs = True

    def _set_up(self, access: Any, edits: Sequence[Edit]) -> None:
        Module.__init__(self, self, "")
        self.__dict__.update(_access=access, _edits=tuple(edits), _adapter=None)

    def edit(self, *, inplace: bool = False) -> Editor:
        """Open a block whose interventions stay: they come first in every later block of the edited model.

        `with model.edit() as edited:` leaves `model` as it was; with `inplace` it is `model` that is edited.
        """
        edited = self if inplace else type(self).__new__(type(self))
        if not inplace:
            edited._set_up(self._access, self._edits)
            edited.__dict__.update(_aliases=self._aliases, _adapter=self._adapter)
        return Editor(edited, self._edit_recorder())

    def clear_edits(self) -> None:
        """Forget all edits, and the adapter that one chose."""
        self.__dict__.update(_edits=(), _adapter=None)

    def _edit_recorder(self) -> Recorder:
        """What records an edit, which has no prompt."""
        raise NotImplementedError

    @staticmethod
    def _check_joins(session: Session, options: Options) -> None:
        """Raises BadArgument for what is said of a session's block, and would have to be said of the session."""
        plain = Options()
        names = ("timeout", "blocking", "batching")
        own = [name for name in names if getattr(options, name) != getattr(plain, name)]
        own += ["remote"] if options.remote and not session.remote else []
        if own:
            raise BadArgument(f"{', '.join(own)}: a session runs as one job; say it of the session")

    def _joined(self, session: Session) -> Recorder:
        """The recorder of an open session, for one more block of it. Raises DeferredError if it is another's."""
        if not self._is(session.model):
            raise DeferredError("a session's traces are all of its own model")
        if self._edits is not session.edits:
            raise DeferredError("a session's edits are those of the model it is opened on: open it on this one")
        return session.recorder

    def _program(self, recorder: Recorder) -> Any:
        from .program import Program

        return Program.of(recorder)

    def _prepared(self, prompt: Any, inputs: Mapping[str, Any]) -> tuple[Any, Mapping[str, Any]]:
        """A prompt and its further inputs as they are; models with a processor make them ready."""
        return prompt, inputs

    def _is(self, other: Any) -> bool:
        """Whether `other` is this model, edited or not."""
        return getattr(other, "_access", None) is self._access

    def _recording(self) -> Recorder:
        tracer = ACTIVE.get()
        if tracer is None or not self._is(tracer.model):
            raise DeferredError("values of the model exist only inside a block: with model.trace(prompt): ...")
        return tracer.recorder
