"""Where models lie: on devices as operators state them, at the true size of well-known models."""

from __future__ import annotations

import io
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from interpose.cli.main import app
from interpose.errors import ConfigError
from interpose.runtime.partial_loading import inside, load_part, outside
from interpose_server.models.devices import GIB, Devices
from interpose_server.models.placement import Load, Plan, plan
from interpose_server.models.planning import figures, plan_for, ranges
from interpose_server.models.ranges import divided
from interpose_server.models.report import fewest, rows, show
from interpose_server.models.sizes import Part, Sizes
from interpose_server.models.spec import ModelSpec, Placement
from models import tiny
from peft import LoraConfig
from published import written
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

MB = 1 << 20


def model(blocks: int = 8, weights: int = 1024, outside: int = 256, **part: Any) -> Sizes:
    """One of small figures, in megabytes."""
    its = Part(weights * MB, **{"work_token": 100, "cache_token": 10, "output_token": 10, **part})
    return Sizes("made", "Made", "float32", "", 1, "blocks", (its,) * blocks, Part(outside * MB, work_token=50))


def spec(**fields: Any) -> ModelSpec:
    return ModelSpec(name="made", **fields)


@pytest.mark.parametrize(
    ("text", "nodes"),
    [
        ("80GB", [[80]]),
        ("8x80GB", [[80] * 8]),
        ("2x24GB,1x48GB", [[24, 24, 48]]),
        ("4x80GB+4x80GB", [[80] * 4, [80] * 4]),
        (" 2 × 1.5TB + 16G ", [[1536, 1536], [16]]),
        ("1*512MB", [[0.5]]),
    ],
)
def test_devices_are_stated_by_operators(text: str, nodes: list[list[float]]) -> None:
    found = Devices.parse(text)
    assert [[device.memory / GIB for device in node] for node in found.nodes] == nodes
    assert Devices.parse(str(found)) == found


@pytest.mark.parametrize("text", ["", "x80GB", "8x", "0x80GB", "80", "8x80GB,", "eight of them", "8x80GB++8x80GB"])
def test_others_arent_understood(text: str) -> None:
    with pytest.raises(ConfigError, match="8x80GB, as 2x24GB,1x48GB"):
        Devices.parse(text)


def test_ranges_are_as_even_as_can_be() -> None:
    """Against all divisions there are."""
    dice = random.Random(0)
    for _ in range(60):
        blocks = [dice.randint(1, 9) for _ in range(dice.randint(3, 8))]
        rooms = [dice.randint(5, 20) for _ in range(dice.randint(1, 3))]
        home = dice.randint(0, 6)
        found = divided(blocks, home, rooms)
        assert [index for its in found for index in its] == list(range(len(blocks))) and all(found)

        def fullest(
            ranges: list[range], blocks: list[int] = blocks, home: int = home, rooms: list[int] = rooms
        ) -> float:
            held = [sum(blocks[index] for index in its) for its in ranges]
            held[0] += home
            return max(one / room for one, room in zip(held, rooms, strict=True))

        best = min(fullest(ranges) for ranges in _divisions(len(blocks), len(rooms)))
        assert fullest(found) == pytest.approx(best, rel=1e-6)


def _divisions(blocks: int, parts: int, start: int = 0) -> list[list[range]]:
    if parts == 1:
        return [[range(start, blocks)]]
    return [
        [range(start, stop), *rest]
        for stop in range(start + 1, blocks - parts + 2)
        for rest in _divisions(blocks, parts - 1, stop)
    ]


@pytest.mark.parametrize(
    ("devices", "placement", "count"),
    [
        ("1x24GB", Placement.DEVICE, 1),
        ("4x8GB,1x24GB", Placement.DEVICE, 1),
        ("2x8GB", Placement.DEVICES, 2),
        ("8x5GB", Placement.DEVICES, 3),
        ("8x4GB", Placement.BLOCKS, 5),
        ("1x8GB+1x8GB", Placement.BLOCKS, 2),
        ("3x4GB+2x4GB", Placement.BLOCKS, 5),
        ("1x8GB+2x8GB", Placement.DEVICES, 2),
    ],
)
def test_one_device_before_several_and_those_before_ranges(devices: str, placement: Placement, count: int) -> None:
    found = plan(model(), Devices.parse(devices))
    assert (found.placement, len(found.shards)) == (placement, count)
    assert found.fits and [shard.home for shard in found.shards] == [True] + [False] * (count - 1)
    assert sum(shard.weights for shard in found.shards) == found.sizes.weights
    assert [index for shard in found.shards for index in shard.blocks] == list(range(8))


def test_a_small_model_takes_a_part_of_a_device() -> None:
    found = plan(model(blocks=4, weights=512), Devices.parse("2x80GB"))
    assert (found.share, found.parts) == (0.05, (0.05,))
    assert plan(model(), Devices.parse("24GB")).share == 0.4
    assert plan(model(), Devices.parse("16GB")).share == 1.0


def test_a_spec_has_the_last_word() -> None:
    there = Devices.parse("8x80GB")
    for fields, placement, parts in [
        ({"placement": "blocks"}, Placement.BLOCKS, (1.0, 1.0)),
        ({"shards": 3}, Placement.BLOCKS, (1.0,) * 3),
        ({"placement": "blocks", "shards": 1}, Placement.BLOCKS, (1.0,)),
        ({"placement": "devices", "devices": 5}, Placement.DEVICES, (5.0,)),
        ({"devices": 2}, Placement.DEVICES, (2.0,)),
        ({"devices": 6}, Placement.BLOCKS, (1.0,) * 6),
        ({"devices": 6, "adapters": {"a": "org/a"}}, Placement.BLOCKS, (1.0,) * 6),
        ({"devices": 0.5}, Placement.DEVICE, (0.15,)),
    ]:
        found = plan(model(), there, spec(**fields))
        assert (found.placement, found.parts) == (placement, parts), fields


def test_home_takes_a_part_of_the_first_ranges_device() -> None:
    found = plan(model(outside=2048), Devices.parse("4x80GB"), spec(placement="blocks", shards=4))
    assert found.home_share == 0.05
    assert found.flight == 4  # a batch for each range
    assert len(found.shards[0].blocks) < len(found.shards[1].blocks)


def test_a_range_needs_room_for_what_is_no_block_while_it_is_loaded() -> None:
    found = plan(model(outside=1024), Devices.parse("8x6GB"), spec(placement="blocks"))
    assert [shard.loading - shard.weights for shard in found.shards] == [1024 * MB] * len(found.shards)
    assert all(shard.loading <= shard.usable for shard in found.shards)
    with pytest.raises(ConfigError, match="GiB while it is loaded"):
        plan(model(outside=2048), Devices.parse("8x6GB"), spec(placement="blocks"))


@pytest.mark.parametrize(("home", "counts"), [(False, [1, 1, 1]), (True, [1, 1, 1])])
def test_ranges_without_devices_are_of_like_bytes(home: bool, counts: list[int]) -> None:
    found = ranges(spec(source=str(tiny("llama"))), 3, home=home)
    assert [len(its) for its in found] == counts
    assert [path for its in found for path in its] == [f"model.layers.{index}" for index in range(3)]
    with pytest.raises(ConfigError, match="has 3 blocks, which can't be 4 ranges"):
        ranges(spec(source=str(tiny("llama"))), 4, home=home)


def test_ranges_are_those_of_a_plan_on_devices_of_one_size(smollm2: Path) -> None:
    for devices, count in [("2x24GB", 2), ("5x80GB", 5), ("3x8GB+4x8GB", 7)]:
        its = spec(source=str(smollm2), placement="blocks", shards=count)
        planned = plan(figures(its), Devices.parse(devices), its).shards
        assert [len(shard.blocks) for shard in planned] == [len(part) for part in ranges(its, count, home=True)]


def test_home_beside_a_range_leaves_it_fewer_blocks(smollm2: Path) -> None:
    its = spec(source=str(smollm2))
    assert [len(part) for part in ranges(its, 2, home=False)] == [15, 15]
    assert [len(part) for part in ranges(its, 2, home=True)] == [11, 19]


@pytest.mark.parametrize("arch", ["gpt2", "llama", "mixtral", "gemma3", "mamba", "bert"])
def test_processes_hold_the_weights_that_were_planned(arch: str) -> None:
    """Each range, loaded by itself, and home with all else."""
    found = plan(figures(spec(source=str(tiny(arch)))), Devices.parse("3x24GB"), spec(placement="blocks", shards=3))
    paths = [[f"{found.sizes.path}.{index}" for index in shard.blocks] for shard in found.shards]
    held = [_held(load_part(tiny(arch), inside(its), device="cpu")) for its in paths]
    held[0] += _held(load_part(tiny(arch), outside([path for its in paths for path in its]), device="cpu"))
    assert held == [shard.weights for shard in found.shards]


def _held(part: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*part.parameters(), *part.buffers()) if not tensor.is_meta)


def test_batches_nobody_asked_for_are_made_smaller_before_a_model_is_refused() -> None:
    sizes = model(work_token=400_000)
    assert plan(sizes, Devices.parse("24GB")).load == Load(4, 2048)
    assert plan(sizes, Devices.parse("11GB")).load == Load(1, 2048)
    with pytest.raises(ConfigError, match=r"Batches of 3,\d+ tokens would fit"):
        plan(sizes, Devices.parse("11GB"), load=Load(4, 2048))


@pytest.mark.parametrize(
    ("devices", "fields", "text"),
    [
        ("2x4GB", {}, r"8\.2 GiB of weights in float32.*doesn't fit on 2x4GB, 5\.8 GiB of it usable"),
        (
            "1x24GB",
            {"shards": 2},
            "made can't be placed as 2 shards on 1x24GB: that takes 2 devices, and there are 1",
        ),
        ("1x4GB", {"placement": "device"}, "as placement device on 1x4GB"),
        ("1x80GB+1x80GB", {"placement": "devices"}, "as placement devices on .*: no machine has 2"),
    ],
)
def test_refusals_have_the_numbers(devices: str, fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        plan(model(), Devices.parse(devices), spec(**fields))
    assert caught.value.details["reason"] == "too_large"


def test_what_no_devices_make_possible_isnt_called_too_large() -> None:
    for fields, told in (
        ({"shards": 9}, "made has 8 blocks, which can't be 9 ranges"),
        ({"placement": "device", "shards": 2}, "placement device is one device, not 2"),
    ):
        with pytest.raises(ConfigError) as caught:
            plan(model(), Devices.parse("8x80GB"), spec(**fields))
        assert (caught.value.message, caught.value.details["reason"]) == (told, "misconfigured")


def test_a_row_longer_than_the_model_takes_is_refused() -> None:
    sizes = figures(spec(source=str(tiny("llama"))))
    with pytest.raises(ConfigError, match="at most 128 tokens, not 129"):
        plan(sizes, Devices.parse("8GB"), load=Load(1, 129))
    assert plan(sizes, Devices.parse("8GB")).load.context == 128


def test_a_model_without_blocks_fits_one_device_or_none() -> None:
    sizes = Sizes("made", "Made", "float32", "", 1, "", (), Part(8 * GIB))
    assert plan(sizes, Devices.parse("2x16GB")).placement is Placement.DEVICE
    with pytest.raises(ConfigError, match="doesn't fit"):
        plan(sizes, Devices.parse("4x8GB"))


def true(name: str) -> Sizes:
    return figures(spec(source=str(written(name))))


def brief(found: Plan) -> list[str]:
    """Blocks, weights, KV, activations, saves of every device, in GiB."""
    return [" ".join((row[2], *row[3:7])) for row in rows(found)]


TABLES = {
    ("Llama-3.1-70B", "4x80GB"): (
        "devices",
        [
            "0-38 66.1 2.4 2.6 4.9",
            "39-79 65.3 2.6 2.3 5.1",
        ],
    ),
    ("Mixtral-8x22B", "8x80GB"): (
        "blocks",
        [
            "0-13 66.0 1.8 2.8 1.3",
            "14-27 65.3 1.8 2.8 1.3",
            "28-41 65.3 1.8 2.8 1.3",
            "42-55 65.3 1.8 2.8 1.3",
        ],
    ),
    ("Llama-3.1-405B", "8x141GB"): (
        "blocks",
        [
            "0-16 108.8 3.7 4.5 4.2",
            "17-35 112.8 4.2 4.5 4.8",
            "36-54 112.8 4.2 4.5 4.8",
            "55-73 112.8 4.2 4.5 4.8",
            "74-92 112.8 4.2 4.5 4.8",
            "93-111 112.8 4.2 4.5 4.8",
            "112-125 83.1 3.1 4.5 3.5",
        ],
    ),
    ("Llama-3.1-405B", "8x80GB+8x80GB"): (
        "blocks",
        [
            "0-7 55.3 3.2 4.5 2.0",
            "8-17 59.4 4.1 4.5 2.5",
            "18-27 59.4 4.1 4.5 2.5",
            "28-37 59.4 4.1 4.5 2.5",
            "38-47 59.4 4.1 4.5 2.5",
            "48-57 59.4 4.1 4.5 2.5",
            "58-67 59.4 4.1 4.5 2.5",
            "68-77 59.4 4.1 4.5 2.5",
            "78-87 59.4 4.1 4.5 2.5",
            "88-97 59.4 4.1 4.5 2.5",
            "98-107 59.4 4.1 4.5 2.5",
            "108-117 59.4 4.1 4.5 2.5",
            "118-125 47.5 3.2 4.5 2.0",
        ],
    ),
    ("DeepSeek-R1", "8x80GB+8x80GB"): (
        "blocks",
        [
            "0-7 58.7 0.7 6.0 0.9",
            "8-13 64.3 0.5 6.0 0.7",
            "14-19 64.3 0.5 6.0 0.7",
            "20-25 64.3 0.5 6.0 0.7",
            "26-31 64.3 0.5 6.0 0.7",
            "32-37 64.3 0.5 6.0 0.7",
            "38-43 64.3 0.5 6.0 0.7",
            "44-49 64.3 0.5 6.0 0.7",
            "50-55 64.3 0.5 6.0 0.7",
            "56-60 53.6 0.4 6.0 0.5",
        ],
    ),
    ("DeepSeek-R1", "8x141GB"): (
        "blocks",
        [
            "0-11 101.6 0.6 6.0 1.3",
            "12-21 107.2 0.5 6.0 1.1",
            "22-31 107.2 0.5 6.0 1.1",
            "32-41 107.2 0.5 6.0 1.1",
            "42-51 107.2 0.5 6.0 1.1",
            "52-60 96.5 0.5 6.0 1.0",
        ],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "devices"), list(TABLES))
def test_true_sizes_on_stated_devices(name: str, devices: str) -> None:
    found = plan(true(name), Devices.parse(devices), load=Load(4, 2048))
    placement, table = TABLES[name, devices]
    assert (found.placement, brief(found)) == (placement, table)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "devices"),
    [
        ("Llama-3.1-70B", "1x80GB"),
        ("Mixtral-8x22B", "2x80GB"),
        ("Llama-3.1-405B", "8x80GB"),
        ("DeepSeek-R1", "8x80GB"),
    ],
)
def test_true_sizes_that_dont_fit(name: str, devices: str) -> None:
    with pytest.raises(ConfigError, match=f"doesn't fit on {devices}"):
        plan(true(name), Devices.parse(devices))


def test_the_table_reads_without_a_terminal() -> None:
    out = io.StringIO()
    found = plan(model(), Devices.parse("8x4GB"))
    show(found, Console(file=out, width=120))
    text = out.getvalue()
    assert "\x1b" not in text
    assert all(" ".join(row[:2]) in " ".join(text.replace("│", " ").split()) for row in rows(found))
    assert "Placement: blocks (ranges of blocks, a process each); 5 devices." in text


def test_the_command_plans_and_refuses() -> None:
    start = ["plan", str(tiny("llama"))]
    run = CliRunner().invoke(app, [*start, "--devices", "2x24GB", "--dtype", "bfloat16"])
    assert run.exit_code == 0 and "3 blocks, bfloat16" in run.stdout
    assert "Placement: device (one device); 1 device, 0.05 of it." in run.stdout
    run = CliRunner().invoke(app, [*start, "--devices", "2x4GB", "--shards", "2", "--rows", "1"])
    assert run.exit_code == 0 and "0-0" in run.stdout and "batches in flight of 1 row of 128 tokens" in run.stdout
    for arguments, text in [
        (["--devices", "2x2GB", "--shards", "3"], "that takes 3 devices, and there are 2"),
        (["--devices", "4x24GB", "--shards", "4"], "has 3 blocks, which can't be 4 ranges"),
        (["--devices", "1x1GB"], "Without --devices, the fewest that do are named"),
        (["--devices", "two"], "aren't understood"),
        (["--devices", "00x1GB"], "aren't understood"),
        (["--devices", "99999999x1GB"], "aren't understood"),
        (["--devices", f"1x{'9' * 400}GB"], "aren't understood"),
        (["--devices", "1x2GB", "--dtype", "int3"], "no dtype 'int3'"),
        (["--devices", "1x2GB", "--placement", "there"], "no placement 'there'; there are auto, device"),
        (["--devices", "1x2GB", "--placement", "block"], "did you mean blocks?"),
        (["--devices", "1x2GB", "--context", "500"], "at most 128 tokens"),
    ]:
        run = CliRunner().invoke(app, [*start, *arguments])
        assert run.exit_code == 1 and text in run.stderr


def test_adapters_are_among_the_weights(tmp_path: Path) -> None:
    """21.5 GB of them, rank 2048 on all linear layers, beside 16 GB."""
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    LoraConfig(r=2048, target_modules=linear).save_pretrained(str(tmp_path))
    its = spec(source=str(written("Llama-3.1-8B")))
    adapted = its.model_copy(update={"adapters": {"a": str(tmp_path)}})
    devices = Devices.parse("8x24GB")
    alone, together = plan_for(its, devices), plan_for(adapted, devices)
    assert (len(alone.shards), len(together.shards)) == (1, 2)
    assert sum(shard.weights for shard in together.shards) == together.sizes.weights
    command = ["plan", its.source, "--adapter", f"a={tmp_path}"]
    run = CliRunner().invoke(app, [*command, "--devices", "8x24GB"])
    assert run.exit_code == 0, run.output
    assert "Of the weights 20,480.0 MiB are those of adapters." in run.stdout
    assert "20,480.0 MiB" in CliRunner().invoke(app, command).stdout
    run = CliRunner().invoke(app, ["plan", its.source, "--adapter", "a"])
    assert run.exit_code == 1 and "an adapter is NAME=SOURCE" in run.stderr


def test_without_devices_the_command_names_the_fewest_of_each_kind() -> None:
    run = CliRunner().invoke(app, ["plan", str(written("Llama-3.1-8B"))])
    assert run.exit_code == 0, run.output
    cells = [
        [cell.strip() for cell in line.strip("│").split("│")] for line in run.stdout.splitlines() if "│" in line
    ]
    assert [row[:3] for row in cells] == [
        *(["24", "1", "device"], ["48", "0.5", "device"], ["80", "0.3", "device"], ["141", "0.2", "device"]),
    ]
    assert "GB " in run.stdout and "tokens that fit" in run.stdout
    assert run.stdout.rstrip().endswith("--devices 1x24GB")
    run = CliRunner().invoke(app, ["plan", str(tiny("llama")), "--shards", "4"])
    assert run.exit_code == 1 and "has 3 blocks, which can't be 4 ranges" in run.stderr


@pytest.mark.slow
def test_a_model_too_large_for_all_machines_of_a_kind_says_so_and_names_those_that_do() -> None:
    found = fewest(spec(source=str(written("DeepSeek-R1"))))
    assert [plan and (len(plan.shards), plan.nodes) for plan in found.values()] == [None, (20, 3), (10, 2), (6, 1)]


def test_plans_import_no_torch() -> None:
    """A controller asks for them, beside much else."""
    script = "import sys, interpose_server.models.report; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
