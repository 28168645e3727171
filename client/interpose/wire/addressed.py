"""Naming a graph's attachments by their content."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..graph.model import Graph
from .tensors import encode_tensor


def addressed(graph: Graph, tensors: Mapping[str, Any]) -> tuple[Graph, dict[str, Any]]:
    """The graph with its attachments' provisional names replaced by content ids, and the tensors by content id."""
    names = {key: encode_tensor(tensor).sha for key, tensor in tensors.items()}
    return graph.renamed(names), {names[key]: tensor for key, tensor in tensors.items()}
