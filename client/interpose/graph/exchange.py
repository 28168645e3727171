"""What a graph takes beside hook points (attachments, parameters, calls, masks) and gives out (saves, logs)."""

from __future__ import annotations

from ..errors import BadArgument, InvalidGraph, UnknownPoint
from .accesses import sizes
from .calls import called_spec, module_flops
from .checker import ALWAYS, Checker, Known, arity, handles
from .model import Node
from .ops import UNKNOWN
from .specs import Spec, flat, nbytes, plain_bytes
from .values import TensorSpec


@handles("attachment")
def attachment(checker: Checker, node: Node) -> Known:
    arity(node, 1)
    sha = node.args[0]
    spec = checker.attachments.get(sha) if isinstance(sha, str) else None
    if spec is None:
        raise InvalidGraph("it names an attachment that the graph doesn't list")
    return Known(spec, ALWAYS, bytes=spec.nbytes)


@handles("param")
def param(checker: Checker, node: Node) -> Known:
    arity(node, 2)
    path, name = node.args
    if not isinstance(path, str) or not isinstance(name, str):
        raise BadArgument("a parameter is named by its module's path and its own name")
    info = checker.manifest.module(path)
    param = info.params.get(name)
    if param is None:
        offered = ", ".join(info.params) or "none"
        raise UnknownPoint(f"{path or 'the model'} has no parameter {name!r}; it has {offered}")
    return Known(TensorSpec(param.shape, param.dtype), ALWAYS)


@handles("call")
def call(checker: Checker, node: Node) -> Known:
    if not node.args or not isinstance(node.args[0], str):
        raise BadArgument("call takes a module's path and one tensor")
    arity(node, 2)
    info = checker.manifest.module(node.args[0])
    given = checker.tensor(node.args[1])
    spec = called_spec(info.points, given)
    flops = module_flops(checker.manifest, info.path, given)
    return Known(spec, checker.moment(node.args), bytes=nbytes(spec), peak=4 * nbytes(spec), flops=flops)


@handles("attention_mask")
def attention_mask(checker: Checker, node: Node) -> Known:
    arity(node, 0)
    own = sizes(checker, node)
    spec: Spec = UNKNOWN
    if own.rows is not None and own.seq is not None:
        spec = TensorSpec((own.rows, own.seq), "int64")
    return Known(spec, (node.run, 0, -1))


@handles("save")
def save(checker: Checker, node: Node) -> Known:
    arity(node, 1)
    spec = checker.specs(node.args[0])
    size = (
        spec.nbytes
        if isinstance(spec, TensorSpec)
        else sum(nbytes(item) or plain_bytes(item) for item in flat(spec))
    )
    return Known(spec, checker.moment_of(node), bytes=size)


@handles("tell")
def tell(checker: Checker, node: Node) -> Known:
    if not node.args or len(node.args) > 16:
        raise BadArgument("one to sixteen values can be logged")
    return Known(None, checker.moment(node.args))
