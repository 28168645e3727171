"""What `print(model)` shows, from manifests small enough to read."""

from __future__ import annotations

from dataclasses import replace

import pytest
from interpose.draw import draw
from interpose.errors import UnknownModule
from interpose.graph.manifest import Layout, Leaf, Manifest, ModuleInfo, Param

HIDDEN = Leaf(("batch", "seq", 8), "float32")
PATTERN = Leaf(("batch", 2, "seq", "key"), "float32")


TREE = """\
tiny: float32, 12 blocks, 50 tokens in the vocabulary, at most 32 positions

Tiny                                   -> logits [batch, seq, 50]
  ids: Embedding                       -> [batch, seq] int64
  layers: ModuleList
    0-11 x Block                       -> [batch, seq, 8]
      attn: Attention                  -> ([batch, seq, 8], -)
        . pattern, scores [batch, 2, seq, key]
        drop: Dropout                  stands for pattern of attn
      mlp: Linear      weight [16, 8]  -> [batch, seq, 16]
"""


def module(path: str, cls: str, output: Layout = None, calls: int = 1, **more: object) -> ModuleInfo:
    points = {"output": output} | dict(more.pop("points", {}))  # type: ignore[call-overload]
    return replace(ModuleInfo(path, cls, {"exit": tuple(range(calls))}, points), **more)  # type: ignore[arg-type]


def linear(path: str, out: int, into: int) -> ModuleInfo:
    output = Leaf(("batch", "seq", out), "float32")
    return module(path, "Linear", output, params={"weight": Param((out, into), "float32")})


def block(path: str, wide: int = 16) -> list[ModuleInfo]:
    return [
        module(path, "Block", HIDDEN),
        module(f"{path}.attn", "Attention", (HIDDEN, None), points={"pattern": PATTERN, "scores": PATTERN}),
        module(f"{path}.attn.drop", "Dropout", calls=0, stands_for=(f"{path}.attn", "pattern")),
        linear(f"{path}.mlp", wide, 8),
    ]


def manifest(*blocks: list[ModuleInfo], **more: object) -> Manifest:
    logits = {"loss": None, "logits": Leaf(("batch", "seq", 50), "float32")}
    top = [module("", "Tiny", logits), module("ids", "Embedding", Leaf(("batch", "seq"), "int64"))]
    modules = [*top, module("layers", "ModuleList", calls=0), *(info for infos in blocks for info in infos)]
    facts: dict[str, object] = {"vocab": 50, "positions": 32, "blocks": tuple(infos[0].path for infos in blocks)}
    by_path = {info.path: info for info in modules}
    return Manifest("tiny", "r1", "Tiny", "float32", by_path, **(facts | more))  # type: ignore[arg-type]


def test_equal_blocks_fold_and_every_column_lines_up() -> None:
    drawn = draw(manifest(*(block(f"layers.{i}") for i in range(12))))
    assert drawn.splitlines() == TREE.splitlines()


def test_a_block_that_differs_inside_stands_apart() -> None:
    wide = [block(f"layers.{i}", wide=32 if i == 2 else 16) for i in range(5)]
    lines = [line.split()[0] for line in draw(manifest(*wide)).splitlines() if " Block" in line]
    assert lines == ["0-1", "2:", "3-4"]


def test_neighbours_fold_only_where_their_numbers_run_on() -> None:
    drawn = draw(manifest(block("layers.0"), block("layers.2"), block("layers.3")))
    assert "0: Block" in drawn
    assert "2-3 x Block" in drawn


def test_calls_beyond_one_and_none_are_told() -> None:
    often = [module("layers.0", "Block", HIDDEN, calls=3), module("layers.0.spare", "Dropout", calls=0)]
    drawn = draw(manifest(often))
    assert "[batch, seq, 8] (3 calls)" in drawn
    assert "spare: Dropout" in drawn and "(never called)" in drawn
    assert drawn.count("never called") == 1, "a container isn't called either, but that is no news"


def test_what_limits_its_use_is_said_at_the_end() -> None:
    drawn = draw(manifest(attention="no interface", row_independent=False, row_note="dynamic RoPE"))
    assert drawn.splitlines()[-2].endswith("no interface")
    assert drawn.splitlines()[-1].endswith("dynamic RoPE")


def test_a_part_is_drawn_alone_under_its_full_path() -> None:
    whole = manifest(block("layers.0"), block("layers.1"))
    assert draw(whole, "layers.1.mlp") == "layers.1.mlp: Linear  weight [16, 8]  -> [batch, seq, 16]"
    with pytest.raises(UnknownModule):
        draw(whole, "layers.7")
