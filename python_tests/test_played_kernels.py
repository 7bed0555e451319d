"""The CUDA kernels without a card: csrc/ops_cuda.cu, played on the CPU (played/cuda.h), has the CPU operators' bits."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import CASES
from played import compare

HERE = Path(__file__).parent
CSRC = HERE.parent / "csrc"
TORCH = Path(torch.__file__).parent
COMPILER = os.environ.get("CXX", "g++")

pytestmark = pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no compiler {COMPILER}")


def compile_played(csrc: Path, library: Path) -> Path:
    """The operators of a copy of csrc, their kernels played on the CPU."""
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
    flags += ["-DPACD_NO_CLONES", "-DTORCH_TARGET_VERSION=0x020b000000000000", f'-DPACD_PLAYED="{csrc}/ops_cuda.cu"']
    flags += ["-w", f"-I{csrc}", f"-I{HERE / 'played'}", "-isystem", str(TORCH / "include")]
    libraries = [str(TORCH / "lib" / name) for name in ("libtorch_cpu.so", "libc10.so")]
    source = str(HERE / "played" / "operators.cpp")
    built = subprocess.run(
        [COMPILER, *flags, source, "-o", str(library), *libraries], capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr[-4000:]
    return library


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    torch.ops.load_library(compile_played(CSRC, tmp_path_factory.mktemp("played") / "played.so"))
    return torch.ops.pacd_played


@pytest.mark.parametrize("name", CASES)
def test_the_table_of_cases_gives_the_bits_of_the_cpu(name, played):
    for call in compare.table_calls(name):
        assert compare.difference(call, played) is None


EDGES = [compare.noise_calls, compare.row_calls, compare.team_calls, compare.window_calls, compare.copies_calls]


@pytest.mark.parametrize("calls", EDGES, ids=lambda calls: calls.__name__)
def test_sizes_about_a_warp_a_block_and_a_grid_give_the_bits_of_the_cpu(calls, played):
    for call in calls():
        assert compare.difference(call, played) is None


def test_a_row_of_no_image_reads_no_other_memory(played):
    assert compare.outside(played) is None


def test_edge_sizes_are_tried_with_every_operator():
    operators = {case.op for case in CASES.values() if not case.op.endswith("copies")}
    assert operators <= {name for calls in EDGES for name, _ in calls()}


def test_a_grid_that_no_card_takes_is_an_error(played):
    empty = torch.zeros(0, 3, dtype=torch.float64)
    assert played.normal_quantile(empty, False).shape == (0, 3)
    assert played.noisy_copies(torch.zeros(2, 0), None, 0.5, 3, 7, 0, 1, torch.float32, False, None, None).shape == (
        6,
        0,
    )


# What is wrong, and the text that is replaced, in csrc/ops_cuda.cu.
STRIDE = "const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x"
MISTAKES = {
    "no barrier before lanes are written": ("__syncthreads();  // everyone", "// everyone"),
    "no barrier in the tree": ("__syncthreads();\n      if (lane < half)", "if (lane < half)"),
    "no barrier before the result": ("}\n    __syncthreads();", "}"),
    "a barrier for some": ("__syncthreads();\n      if (lane < half) {", "if (lane < half) {\n __syncthreads();"),
    "one half-warp's mask for both": ("0xFFFFu << (threadIdx.x & 16u)", "0xFFFFu"),
    "the whole warp's mask": ("0xFFFFu << (threadIdx.x & 16u)", "0xFFFFFFFFu"),
    "shuffles over a whole warp": ("part[0], width, lanes)", "part[0], width, 32)"),
    "a shuffle less": ("width = lanes / 2; width > 0;", "width = lanes / 2; width > 1;"),
    "a join less": ("half = team_lanes / 2; half > 0;", "half = team_lanes / 2; half > 1;"),
    "a row too many": ("row < rows; row += stride", "row <= rows; row += stride"),
    "a row too few": ("row < rows; row += stride", "row + 1 < rows; row += stride"),
    "a team's row too few": ("row < rows; row += gridDim.x", "row + 1 < rows; row += gridDim.x"),
    "rows counted twice": (f"{STRIDE};\n  const int lane", f"{STRIDE} - 32;\n  const int lane"),
    "rows not counted": (f"{STRIDE};\n  const int lane", f"{STRIDE} + 32;\n  const int lane"),
    "a row left out": (f"{STRIDE};\n  for (int64_t row", f"{STRIDE} + 1;\n  for (int64_t row"),
    "a tile left out": (f"{STRIDE};\n  for (int64_t i", f"{STRIDE} + 1;\n  for (int64_t i"),
    "an element too many": ("if (e < kernel.elements)", "if (e <= kernel.elements)"),
    "an element too few": ("if (e < kernel.elements)", "if (e + 1 < kernel.elements)"),
    "a copy too few": ("first < kernel.copies; first +=", "first + 1 < kernel.copies; first +="),
    "an image left out": ("image < images; image += groups", "image < images; image += groups + 1"),
    "every thread of a warp adds for all": ("counter && lane == __ffs(static_cast<int>(same)) - 1", "counter"),
    "the first thread alone adds": ("lane == __ffs(static_cast<int>(same)) - 1", "lane == 0"),
    "a thread that others do not wait for": ("(; first < rows; first +=", "(; first + lane < rows; first +="),
    "a grid of no blocks": ("(items + block_size - 1) / block_size", "items / block_size"),
}  # fmt: skip
# The same in csrc/kernels/noise.h and lattice.h, there on the way that one element in a thousand takes.
LATTICE = {
    "an open cell taken for decided": ("if (is_open(lattice, t, j)) return settle(at, e);", ""),
    "another block's words": ("tile_lanes + lane);\n    NoiseKey", "tile_lanes + lane + 1);\n    NoiseKey"),
    "no further digits": ("further.stream |= further_digits;", ""),
    "a void row not marked": ("if (!exact.decided) mark(at.voids);", ""),
    "the next channel's lattice": ("return lattices[e / plane];", "return lattices[(e + 1) / plane];"),
}
NOISE = {
    "four where there are three": ("e + wide <= elements", "e + wide <= elements + 1"),
    "the last of four left out": (
        "for (int j = 0; j < wide; ++j) convert(",
        "for (int j = 0; j + 1 < wide; ++j) convert(",
    ),
    "a channel's end overlooked": ("if (pixel == plane) ++channel, pixel = 0;", ""),
    "the next row's image": ("table[3 * r];", "table[3 * r + 3];"),
    "stream and sample exchanged": (
        "(table[3 * r + 1]), static_cast<uint32_t>(table[3 * r + 2])",
        "(table[3 * r + 2]), static_cast<uint32_t>(table[3 * r + 1])",
    ),
    "an image too many": ("image < images ? image : 0", "image <= images ? image : 0"),
    "an image before the first": ("image >= 0 && image < images", "image < images"),
}
VOTES = {
    "a void row's vote": ("if (voids && voids[row]) return counter + classes;", ""),
    "no column for void rows": ("(classes + (voids != nullptr))", "classes"),
}
MUTANTS = {
    "nothing": ("ops_cuda.cu", "constexpr int block_size = 256;", "constexpr int block_size = 256;"),
    **{name: ("ops_cuda.cu", *texts) for name, texts in MISTAKES.items()},
    **{name: ("kernels/noise.h", *texts) for name, texts in NOISE.items()},
    **{name: ("kernels/lattice.h", *texts) for name, texts in LATTICE.items()},
    **{name: ("kernels/votes.h", *texts) for name, texts in VOTES.items()},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_a_mistake_in_a_kernel_is_found(name, tmp_path):
    file, old, new = MUTANTS[name]
    csrc = shutil.copytree(CSRC, tmp_path / "csrc")
    text = (csrc / file).read_text(encoding="utf-8")
    assert text.count(old) == 1, "the mutation's place has changed"
    (csrc / file).write_text(text.replace(old, new), encoding="utf-8")
    library = compile_played(csrc, tmp_path / "mutant.so")
    found = subprocess.run(
        [sys.executable, str(HERE / "played" / "compare.py"), str(library)],
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    print(found.stdout[-600:], found.stderr[-600:])
    assert (found.returncode == 0) == (name == "nothing")


NVCC = shutil.which("nvcc")
ARITHMETIC = r"\b(?:add|sub|mul|fma|mad|div|sqrt|rcp)\.[a-z.]*f(?:32|64)\b"


def instructions(flags: list[str], ptx: Path) -> Counter[str]:
    """The floating point instructions that nvcc makes of ops_cuda.cu."""
    flags = [*flags, "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA", f"-I{CSRC}", "-isystem"]
    command = [
        str(NVCC),
        "-std=c++20",
        "-ptx",
        *flags,
        str(TORCH / "include"),
        str(CSRC / "ops_cuda.cu"),
        "-o",
        str(ptx),
    ]
    subprocess.run(command, check=True, capture_output=True)
    return Counter(re.findall(ARITHMETIC, ptx.read_text(encoding="utf-8")))


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="no nvcc")
def test_nvcc_rounds_every_operation_as_it_is_written(tmp_path):
    """In PTX `add.f32` and `mul.f32` may still become one fma; with .rn they are rounded each, as on the CPU."""
    text = (CSRC.parent / "CMakeLists.txt").read_text(encoding="utf-8")
    (flags,) = re.findall(r"target_compile_options\(pacd_ops_cuda PRIVATE ([^)]*)\)", text)
    made = instructions(flags.split(), tmp_path / "made.ptx")
    assert all(".rn" in name and ".ftz" not in name for name in made), made
    assert made["fma.rn.f64"] > 1000 and made["mul.rn.f32"] > 100
    contracted = instructions([f for f in flags.split() if f != "--fmad=false"], tmp_path / "contracted.ptx")
    assert "mul.f32" in contracted and "add.f64" in contracted
