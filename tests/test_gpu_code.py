"""`python -m benchmarks gpu_code`: the bytes that generated code moves may not grow; the count of ours is right."""

import json
import subprocess
import sys

import pytest

from benchmarks import gpu_code
from benchmarks.lora_bytes import Linears, linears_bytes, linears_products
from benchmarks.report import BenchmarkError
from harness.paths import REPO

# MB of one double and one single block, with a little room for another version of inductor. Lower them when they fall.
CEILINGS_MB = {
    "bf16_none": 3_560,
    "bf16_rank16": 3_940,
    "bf16_rank16_separate": 4_905,
    "bf16_rank128": 4_015,
    "fp8_none": 3_065,
    "fp8_rank16": 3_445,
    "fp8_rank16_separate": 4_410,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "gpu_code.json"
    command = [sys.executable, "-m", "benchmarks", "gpu_code", "--json", str(path)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text(encoding="utf-8")), done.stdout, path.with_suffix(".png")


@pytest.fixture
def figures(finished):
    return finished[0]


def test_every_key_is_there(figures):
    for name in gpu_code.VARIANTS:
        assert figures[f"{name}_mb"] > 1000, name
        for kind in gpu_code.COUNTS:
            assert isinstance(figures[f"{name}_{kind}"], int)
    for key in ("bf16_rank16_over_none", "bf16_rank128_over_none", "fp8_rank16_over_none", "machine", "date", "notes"):
        assert key in figures


def test_bytes_do_not_grow(figures):
    for name, ceiling in CEILINGS_MB.items():
        assert figures[f"{name}_mb"] <= ceiling, name


def test_goals_are_met(figures):
    assert len(figures["goals"]) == 3
    assert all(goal["met"] for goal in figures["goals"]), figures["goals"]


def test_lora_layers_with_nothing_bound_cost_nothing_over_bf16(figures):
    assert figures["bf16_none_mb"] == figures["bf16_bare_mb"]
    for kind in gpu_code.COUNTS:
        assert figures[f"bf16_none_{kind}"] == figures[f"bf16_bare_{kind}"]


def test_our_blocks_move_no_more_than_those_of_diffusers(figures):
    for dtype in ("bf16", "fp8"):
        assert figures[f"{dtype}_bare_mb"] <= figures[f"diffusers_{dtype}_none_mb"]
        assert figures[f"{dtype}_bare_kernels"] <= figures[f"diffusers_{dtype}_none_kernels"]


def test_nothing_waits_for_the_device_or_leaves_it(figures):
    for name in gpu_code.VARIANTS:
        assert figures[f"{name}_syncs"] == 0, name
        assert figures[f"{name}_host_copies"] == 0, name


def test_counts_of_products(figures):
    # 14 linears in a double block, 6 in a single one, in 10 and 3 calls.
    assert figures["bf16_none_products"] == figures["fp8_none_products"] == 20
    assert figures["bf16_rank16_products"] == 20 + 13
    assert figures["bf16_rank16_separate_products"] == 2 * 20 + 13
    assert figures["peft_bf16_rank16_products"] == 3 * 20


def test_the_table_and_the_picture_show_the_figures(finished):
    figures, stdout, picture = finished
    for name in gpu_code.VARIANTS:
        assert f"{figures[f'{name}_mb']:,.0f}" in stdout
    assert "never measured" in stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


# The count itself, by hand.


def test_one_linear():
    linear = Linears(rows=10, in_features=32, out_features=[64], weight_width=2)
    base = 2 * (10 * 32 + 64 * 32 + 64 + 10 * 64)
    assert linears_bytes(linear, 0, fused=True) == linears_bytes(linear, 0, fused=False) == base
    down = 2 * (10 * 32 + 16 * 32 + 10 * 16)
    up = 2 * (10 * 16 + 64 * 16)
    assert linears_bytes(linear, 16, fused=True) == base + down + up
    assert linears_bytes(linear, 16, fused=False) == base + down + up + 2 * (2 * 10 * 64)


def test_linears_that_share_an_input_read_it_once_for_their_loras():
    one = Linears(10, 32, [64], 2)
    three = Linears(10, 32, [64, 64, 64], 2)
    assert linears_bytes(three, 0, fused=True) == 3 * linears_bytes(one, 0, fused=True)
    assert linears_bytes(three, 16, fused=True) == 3 * linears_bytes(one, 16, fused=True) - 2 * 2 * (10 * 32)


def test_float8_reads_one_byte_and_scales_and_the_loras_read_bfloat16():
    wide, narrow = Linears(10, 32, [64], 2), Linears(10, 32, [64], 1)
    saved = 10 * 32 + 64 * 32
    assert linears_bytes(narrow, 0, fused=True) == linears_bytes(wide, 0, fused=True) - saved + 4 * (10 + 64)
    lora = [linears_bytes(each, 16, fused=True) - linears_bytes(each, 0, fused=True) for each in (wide, narrow)]
    assert lora[0] == lora[1]


def test_products_of_one_call():
    call = Linears(10, 32, [64, 64, 64, 256], 2)
    assert [linears_products(call, rank, fused) for rank, fused in ((0, True), (16, True), (16, False))] == [4, 5, 9]


def test_an_operator_without_a_count_is_an_error():
    block = {"bytes": 0, **dict.fromkeys(gpu_code.COUNTS, 0), "operators": [{"name": "add_loras_", "weights": []}]}
    with pytest.raises(BenchmarkError, match="add_loras_"):
        gpu_code.count({"double": block}, 16, fused=True)


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("        zuf0 = buf3.item()", "syncs"),
        ("        u0 = aten._local_scalar_dense(buf1)", "syncs"),
        ("        torch.cuda.synchronize()", "syncs"),
        ("        buf4 = empty_strided_cpu((3, 4), (4, 1), torch.float32)", "host_copies"),
        ("        buf5 = torch.ops.prims.device_put(buf4, device(type='cpu'))", "host_copies"),
    ],
)
def test_a_sync_or_a_copy_to_the_host_in_the_code_would_be_seen(line, kind):
    from benchmarks.generated_code import crossings

    assert crossings(line)[kind] >= 1
    assert not any(crossings("        triton_poi_fused_0.run(arg0_1, buf0, 12288, stream=stream0)").values())
