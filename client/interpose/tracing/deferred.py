"""What all deferred values share, whichever face they wear: recording operations, shapes, writes, saving."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NoReturn

from ..errors import BadArgument, ControlFlow, ShapeUnknown, UnknownOp
from ..graph import ops
from ..graph.specs import FLOATING
from ..graph.values import DTYPES, DType, TensorSpec
from .bases import Base, View, is_same, is_view, why
from .gradients import Backward, EarlyGradient
from .notes import note
from .outside import is_dtype
from .recorder import Recorder


class Deferred:
    """A value inside the model that will exist when the block has run.

    Operators, indexing and every operation of the op table record a node. `role` marks the values whose reading
    has a rule of its own: "block" (a block's output, whose `[0]` is the hidden states, as published notebooks
    write), "rest" (its `[1:]`, which adds nothing to a tuple) and "model" (the model's output, whose `.logits` is
    itself).
    """

    _interpose_deferred: ClassVar[bool] = True
    _recorder: Recorder
    _root: Base
    _chain: tuple[View, ...]
    _at: tuple[int, int]
    _role: str
    _absent: str
    """Why the value never came, if it didn't."""

    def _begin(self, recorder: Recorder, base: Base, chain: tuple[View, ...], node: int) -> None:
        self._recorder, self._root, self._chain = recorder, base, chain
        self._at = base.node() if chain else node, node
        self._role = self._absent = ""

    # -- what is known while recording -------------------------------------------------------------------------

    @property
    def _spec(self) -> TensorSpec:
        spec = self._recorder.spec(self._at[1])
        if not isinstance(spec, TensorSpec):
            raise ShapeUnknown("the shape of this value depends on values, so it is known only after the block")
        return spec

    @property
    def shape(self) -> tuple[int, ...]:
        return self._spec.shape

    @property
    def ndim(self) -> int:
        return len(self._spec.shape)

    @property
    def dtype(self) -> Any:
        return DType(self._spec.dtype)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.ndim

    def numel(self) -> int:
        return self._spec.numel

    nelement = numel

    def element_size(self) -> int:
        return DTYPES[self._spec.dtype]

    def is_floating_point(self) -> bool:
        return self._spec.dtype in FLOATING

    def __len__(self) -> int:
        if not self.shape:
            raise BadArgument("a value without dimensions has no length")
        return self.shape[0]

    def __iter__(self) -> Iterator[Any]:
        if self._role == "block":
            raise BadArgument("a block's output isn't a tuple here; write output[0] for the hidden states")
        return iter([self[index] for index in range(len(self))])

    def __repr__(self) -> str:
        spec = self._recorder.spec(self._at[1])
        shown = f"{spec.dtype}{list(spec.shape)}" if isinstance(spec, TensorSpec) else "of unknown shape"
        point = getattr(self._root, "point", "value")
        lost = "" if self._recorder.open else f"; {why(self).message}"
        return f"<deferred {shown} {point}{''.join(f'.{step[0]}' for step in self._chain)}{lost}>"

    def __str__(self) -> str:
        # What is printed after the block should be the value; a debugger's look at it (repr) fails nowhere.
        if not self._recorder.open:
            raise why(self)
        return repr(self)

    def __format__(self, spec: str) -> str:
        return str(self) if not spec else self._no_number()

    __hash__ = object.__hash__

    # -- reading and writing parts -----------------------------------------------------------------------------

    def __getitem__(self, index: Any) -> Any:
        if self._role == "block" and type(index) is int:
            if index != 0:
                raise BadArgument(
                    f"a block's output is its hidden states; row {index} of them is output[0][{index}]"
                )
            return self._recorder.again(self)
        if self._role == "model":
            if isinstance(index, str):
                return getattr(self, index)
            if type(index) is int:
                note("output[0] of the model is the first row of its logits; all of them are output.logits")
        part = self._recorder.op("getitem", (self, index), {})
        if self._role == "block" and index == slice(1, None):
            part._role = "rest"
        return part

    def __setitem__(self, index: Any, value: Any) -> None:
        if self._role == "block" and type(index) is int:
            if index != 0:
                raise BadArgument(f"row {index} of a block's hidden states is written output[0][{index}] = ...")
            self._recorder.points.put_back(self, value)
            return
        plain = self._recorder.arg(index)
        if is_view(value, self, ("getitem", plain if isinstance(plain, tuple) else (plain,))):
            return  # the second half of `x[i] += y`, which has been written already
        self._root.write(self._chain, plain, self._recorder.arg(value))

    def _fill(self, value: Any) -> Any:
        """Write all of it; returns the value itself, as torch's in-place methods do."""
        self._root.write(self._chain, ..., self._recorder.arg(value))
        return self

    # -- keeping -----------------------------------------------------------------------------------------------

    def save(self) -> Any:
        """Keep the value as it is at this line: after the block it is a real tensor (without torch, an array).

        Returns the value itself. Saved again, at a later line, it is that line's value under the name returned.
        """
        if self._role == "block":
            note("a block's saved output is [batch, seq, hidden]: after the block, [0] is its first row")
        if isinstance(self._root, EarlyGradient):
            return self._root.keep(self)
        return self._recorder.save(self)

    def _become(self, value: Any) -> None:
        """Turn into the real value."""
        raise NotImplementedError

    # -- gradients ---------------------------------------------------------------------------------------------

    def backward(self, gradient: Any = None, retain_graph: Any = None, create_graph: bool = False) -> Backward:
        """Run gradients back from this number; `with loss.backward():` is a block to read and replace them in.

        Several backwards of one block need no `retain_graph`.
        """
        if gradient is not None:
            return (self * gradient).sum().backward()  # type: ignore[no-any-return]
        if create_graph:
            raise BadArgument("gradients of gradients aren't taken; leave out create_graph=True")
        return self._recorder.gradients.start(self)

    def retain_grad(self) -> None:
        """Keep the gradient of the backwards that follow: after the block it is `.grad`."""
        self._recorder.gradients.retain(self)

    @property
    def grad(self) -> Any:
        """The value's gradient: deferred inside the block, real after it if it was retained."""
        if "_gradient" in self.__dict__:
            return self.__dict__["_gradient"]
        return self._recorder.gradients.of(self)

    @grad.setter
    def grad(self, value: Any) -> None:
        gradient = self._recorder.gradients.of(self)
        if is_same(value, gradient):
            return  # the second half of `h.grad *= 2`, which has been written already
        gradient._root.write(gradient._chain, None, self._recorder.arg(value))

    @property
    def requires_grad(self) -> bool:
        return False

    @requires_grad.setter
    def requires_grad(self, wanted: bool) -> None:
        """Nothing to do: asking for a gradient is enough."""

    def requires_grad_(self, wanted: bool = True) -> Any:
        return self

    def _keep_gradient(self, gradient: Any) -> None:
        """The value's gradient has come, and the value itself was not saved."""
        self.__dict__["_gradient"] = gradient

    # -- what needs the value itself ---------------------------------------------------------------------------

    def __bool__(self) -> bool:
        raise ControlFlow(
            "Python can't branch on a value that exists only when the block runs; choose between values with "
            "torch.where(condition, a, b), between bodies with t.cond(condition, then, otherwise), repeat with "
            "t.while_loop(proceed, body, *init, most=n), or save it and branch after the block"
        )

    def _no_number(self, *args: Any) -> NoReturn:
        raise ControlFlow(
            "this value exists only when the block runs, so Python can't have it as a number; compute with it as "
            "it is, repeat by it with t.while_loop(...), or save it and take it after the block, in a "
            "session after the session's"
        )

    def _not_rounded(self, *args: Any) -> NoReturn:
        raise ControlFlow(
            "this value exists only when the block runs: x.round(), x.floor(), x.ceil() and x.trunc() round it "
            "there; or save it and round it after the block"
        )

    __round__ = __floor__ = __ceil__ = __trunc__ = _not_rounded
    __int__ = __float__ = __index__ = __complex__ = tolist = numpy = _no_number

    def item(self) -> Any:
        """The only number in it, still deferred: after the block, saved, a tensor without dimensions."""
        return self._recorder.op("reshape", (self, ()), {})

    def __contains__(self, item: Any) -> bool:
        raise ControlFlow("whether a deferred value contains something isn't known yet; write (x == item).any()")

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise ControlFlow("NumPy can't have this value before the block has run; save it and convert it afterwards")

    # -- where it lives, which is not the graph's business -------------------------------------------------------

    def cpu(self) -> Any:
        return self

    cuda = cpu

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """A dtype conversion; devices are left to the server."""
        if kwargs.pop("copy", False):
            return self.to(*args, **kwargs).clone()
        wanted = [arg for arg in (*args, *kwargs.values()) if is_dtype(arg)]
        if wanted:
            return self._recorder.op("to", (self, wanted[0]), {})
        other = next((arg for arg in args if hasattr(arg, "dtype")), None)
        return self if other is None else self._recorder.op("to", (self, other.dtype), {})

    def type(self, dtype: Any) -> Any:
        return self._recorder.op("to", (self, dtype), {})

    # -- operations --------------------------------------------------------------------------------------------

    def _interpose_record(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What the `interpose.torch` namespace calls."""
        return self._recorder.op(name, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_recorder" not in self.__dict__:
            raise AttributeError(name)
        if self._role == "model":
            found = self._recorder.points.output_field(self, name)
            if found is not None:
                return found
        if name in ops.INPLACE:
            return in_place(self, name)
        if name in _LATER:
            raise ControlFlow(f"{name} is there after the block; add .save() here to have it then")
        spellings = ops.lookup(name).spellings
        raise UnknownOp(f"tensors have no method {name!r}; it is written {' or '.join(spellings)}")


_LATER = ("value",)


def in_place(value: Deferred, name: str) -> Callable[..., Any]:
    """A torch in-place method of a value: the operation it stands for, then a write of the result."""

    def method(*args: Any, **kwargs: Any) -> Any:
        if name == "zero_":
            return value._fill(0)
        if name in ("fill_", "copy_"):
            return value._fill(args[0])
        return _fill_alike(value, value._recorder.op(ops.INPLACE[name], (value, *args), kwargs))

    return method


def _fill_alike(value: Deferred, result: Any) -> Any:
    """Write a result into a value in place. Raises BadArgument where torch would: it has fewer kinds of numbers."""
    kinds = [value._recorder.kind_of(each) for each in (value, result)]
    if None not in kinds and kinds[0] < kinds[1]:
        raise BadArgument(f"the result is no {value._spec.dtype}; make a new value instead of writing it in place")
    return value._fill(result)


def _method(name: str) -> Callable[..., Any]:
    def method(self: Deferred, *args: Any, **kwargs: Any) -> Any:
        return self._recorder.op(name, (self, *args), kwargs)

    method.__name__ = name
    return method


def _reflected(name: str) -> Callable[..., Any]:
    def method(self: Deferred, other: Any) -> Any:
        if isinstance(other, tuple):
            if self._role == "rest":
                return other  # (hidden,) + block.output[1:], where a block's output is a tuple
            raise BadArgument("a tuple and a tensor make no tuple; to set a block's output write output = hidden")
        return self._recorder.op(name, (other, self), {})

    return method


def _augmented(name: str) -> Callable[..., Any]:
    def method(self: Deferred, other: Any) -> Any:
        return _fill_alike(self, self._recorder.op(name, (self, other), {}))

    return method


_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
_UNARY = {"neg": "neg", "pos": "positive", "abs": "abs", "invert": "bitwise_not"}


def _equip() -> None:
    for name, op in ops.OPS.items():
        if op.method and not hasattr(Deferred, name):
            setattr(Deferred, name, _method(name))
    for python, name in ops.OPERATORS.items():
        setattr(Deferred, f"__{python}__", _method(name))
        setattr(Deferred, f"__r{python}__", _reflected(name))
        if python != "matmul":  # tensors have no @= in place: Python makes it x = x @ y
            setattr(Deferred, f"__i{python}__", _augmented(name))
    for name in _COMPARISONS:
        setattr(Deferred, f"__{name}__", _method(name))
    for python, name in _UNARY.items():
        setattr(Deferred, f"__{python}__", _method(name))
    for name in ("T", "mT", "H", "mH"):
        if name in ops.OPS:
            setattr(Deferred, name, property(_method(name)))


_equip()
