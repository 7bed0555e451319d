"""The contract of all operators: registration, opcheck, reference.py, split invariance, compile, CUDA bits."""

from __future__ import annotations

import inspect

import pytest
import torch
from conftest import CASES, different_bits, lowered
from torch import Tensor

from pacd_fast import ops
from pacd_fast.ops import libraries, reference

OPERATORS = sorted({case.op for case in CASES.values()})
CPU_ONLY = ["narrow_grad", "convolve3x3"]  # of layers.py, see test_layers.py


def registered() -> list[str]:
    return sorted(
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("pacd_fast::")
    )


def test_every_operator_has_a_case_a_wrapper_and_a_plain_version():
    assert registered() == sorted([*OPERATORS, *CPU_ONLY])
    wrappers = {name for name, value in vars(ops).items() if inspect.isfunction(value) and name in ops.__all__}
    wrappers -= {
        "transformed",
        "tally_votes",
        "lattice_of",
        "lattice_step",
        "require_on_lattice",
    }  # no operators of their own
    assert wrappers == {name for name in CASES if "," not in name} | set(CPU_ONLY)  # the latter: test_layers.py
    assert all(callable(getattr(reference, name)) for name in wrappers)


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_is_registered_everywhere(name):
    keys = ["CPU", "Meta"] + (["CUDA"] if ops.cuda_library == "loaded" else [])
    for key in keys:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"pacd_fast::{name}", key), key


def test_a_driver_too_old_for_the_cuda_library_is_named_when_it_is_loaded(monkeypatch):
    problem = libraries.driver_problem(12040, 13020)
    assert problem == (
        "not usable: the driver supports CUDA 12.4 and the library needs 13.0; "
        "install a driver >= 580 or build with nvcc 12.x"
    )
    for driver, runtime in ((12080, 12090), (13000, 13020), (13010, 12040), (0, 13000)):  # 0: no driver, no card
        assert libraries.driver_problem(driver, runtime) is None
    if ops.cuda_library == "loaded":
        monkeypatch.setattr(libraries, "cuda_versions", lambda path: (11080, 12040))
        assert libraries._load_cuda().startswith("not usable: the driver supports CUDA 11.8")
        monkeypatch.undo()
        driver, runtime = libraries.cuda_versions(libraries._load("pacd_ops_cuda"))
        assert runtime >= 12000 and (driver == 0 or driver >= runtime // 1000 * 1000)


def kind(argument: object) -> object:
    if not isinstance(argument, Tensor):
        return type(argument)
    layouts = (torch.contiguous_format, torch.channels_last) if argument.dim() == 4 else (torch.contiguous_format,)
    dense = tuple(argument.is_contiguous(memory_format=layout) for layout in layouts)
    return argument.dtype, argument.dim(), argument.numel() == 0, dense


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name):
    calls = lowered(name)
    assert calls
    kinds = {}  # opcheck looks at dtypes, layouts and emptiness; sizes are for the plain versions below
    for func, args in calls:
        kinds.setdefault((func, *(kind(each) for each in args)), (func, args))
    for func, args in kinds.values():
        torch.library.opcheck(func, args)
    if name == "noisy_copies":
        func, args = calls[0]
        torch.library.opcheck(func, (args[0].requires_grad_(), *args[1:]))


@pytest.mark.parametrize("name", CASES)
def test_equals_the_plain_version(name):
    """As the case's own `close` has it, which asserts; and it would not if one number were another."""
    case, refused = CASES[name], 0
    for args, options in case.arguments():
        ours, plain = case.run(*args, **options), case.plain(*args, **options)
        case.close(ours, plain)
        assert ours.shape == plain.shape
        for at in torch.isfinite(ours).nonzero()[:1]:
            wrong = ours.clone()
            wrong[tuple(at)] = 2 * wrong[tuple(at)] + 1.7
            with pytest.raises(AssertionError):
                case.close(wrong, plain)
            refused += 1
    assert refused


@pytest.mark.parametrize("shape", [(1,), (3, 17), (2, 3, 64), (4, 1, 28, 28), (2, 3, 31, 33)])
def test_noise_does_not_depend_on_the_split(shape):
    x, ids = torch.rand(*shape), torch.arange(shape[0]) * 3 + 5
    whole = ops.noisy_copies(x, 0.7, 13, 11, image_ids=ids).unflatten(0, (shape[0], 13))
    for i in range(shape[0]):
        for first, count in ((0, 1), (1, 5), (6, 7)):
            part = ops.noisy_copies(x[i : i + 1], 0.7, count, 11, first=first, image_ids=ids[i : i + 1])
            assert torch.equal(part, whole[i, first : first + count])


def test_noise_does_not_depend_on_threads_or_layout():
    x = torch.rand(5, 3, 32, 32)
    threads = torch.get_num_threads()
    plain = ops.noisy_copies(x, 0.7, 20, 3)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(plain, ops.noisy_copies(x, 0.7, 20, 3))
            assert torch.equal(plain, ops.noisy_copies(x, 0.7, 20, 3, memory_format=torch.channels_last))
    finally:
        torch.set_num_threads(threads)


def test_noise_is_different_for_every_key():
    x = torch.zeros(1, 64)
    base = dict(seed=1, first=0, image_ids=torch.tensor([0]), stream=0)
    changes = (
        {"seed": 2},
        {"seed": 1 + 2**32},
        {"first": 1},
        {"image_ids": torch.tensor([1])},
        {"image_ids": torch.tensor([2**32])},
        {"stream": 1},
    )
    draws = [ops.noisy_copies(x, 1.0, **{**base, **change}) for change in ({}, *changes)]
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == len(draws)


def test_half_precision_rounds_like_torch():
    x = torch.cat(
        [
            torch.randn(4000),
            torch.randn(4000) * 1e-6,
            torch.tensor([0.0, 65519.9, 65520.0, 1e30, 6e-8, 2.9e-8, torch.inf]),
        ]
    )
    x = torch.cat([x, -x]).unsqueeze(0)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(ops.noisy_copies(x, 0.0, dtype=dtype), x.to(dtype))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradient_is_the_sum_over_copies(memory_format):
    x = torch.rand(3, 2, 4, 4, requires_grad=True)
    std = torch.tensor([0.5, 0.25])
    y = ops.noisy_copies(x, 0.5, 5, 1, mean=[0.1, 0.2], std=std, memory_format=memory_format)
    weight = torch.randn_like(y)
    (gradient,) = torch.autograd.grad((y * weight).sum(), x)
    expected = weight.unflatten(0, (3, 5)).sum(1) / std.view(1, 2, 1, 1)
    torch.testing.assert_close(gradient, expected)
    y = ops.noisy_copies(x, 0.5, 5, 1)
    (first,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, 6 * y.detach().unflatten(0, (3, 5)).sum(1))


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_pooling_has_all_derivatives(layout):
    x = torch.randn(2, 5, 6, 5, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    torch.autograd.gradcheck(ops.max_pool_relu, x, check_forward_ad=True, check_batched_grad=True)
    curved = lambda x: ops.max_pool_relu(x).square()  # noqa: E731
    torch.autograd.gradgradcheck(curved, x, check_fwd_over_rev=True)
    v = torch.randn_like(x)
    for ours, plain in zip(
        torch.func.jvp(torch.func.grad(lambda x: curved(x).sin().sum()), (x.detach(),), (v,)),
        torch.func.jvp(torch.func.grad(lambda x: reference.max_pool_relu(x).square().sin().sum()), (x.detach(),), (v,)),
        strict=True,
    ):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels", [1, 5, 20])
def test_pooling_keeps_a_nan_and_gives_it_the_gradient(dtype, channels):
    x = torch.randn(2, channels, 4, 4).to(dtype).contiguous(memory_format=torch.channels_last)
    x[:, ::2, 1, 1], x[:, :, 2, 2] = torch.nan, -torch.tensor(torch.nan, dtype=dtype)  # of either sign
    ours, plain = x.clone(memory_format=torch.preserve_format).requires_grad_(), x.requires_grad_()
    found, expected = ops.max_pool_relu(ours), reference.max_pool_relu(plain)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(9.0), expected.nan_to_num(9.0))
    found.sum().backward()
    expected.sum().backward()
    assert torch.equal(ours.grad, plain.grad)


@pytest.mark.parametrize("dims", [0, 1, 4])
def test_pooling_of_stacked_images(dims):
    x = torch.randn(3, 2, 5, 6, 4)
    stacked = x.movedim(0, dims)
    found = torch.func.vmap(ops.max_pool_relu, in_dims=dims)(stacked)
    assert torch.equal(found, torch.stack([reference.max_pool_relu(each) for each in x]))
    slope = torch.func.vmap(torch.func.grad(lambda x: ops.max_pool_relu(x).sin().sum()), in_dims=dims)(stacked)
    plain = [torch.func.grad(lambda x: reference.max_pool_relu(x).sin().sum())(each) for each in x]
    assert torch.equal(slope, torch.stack(plain))


def test_compiles_without_a_break():
    def step(x: Tensor, counts: Tensor, weight: Tensor, first: int) -> Tensor:
        noisy = ops.noisy_copies(x, 0.5, 4, 9, first=first)
        index = torch.arange(len(x)).repeat_interleave(4)
        ops.add_votes_(counts, noisy.flatten(1) @ weight, index)
        return ops.clopper_pearson_lower(counts, 4, 0.4) + ops.normal_quantile(counts.double() / 4)

    x, weight = torch.rand(3, 1, 4, 4), torch.randn(16, 5)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for first in (0, 4, 8):
        ours, theirs = torch.zeros(3, 5, dtype=torch.int64), torch.zeros(3, 5, dtype=torch.int64)
        assert torch.equal(compiled(x, ours, weight, first), step(x, theirs, weight, first))
        assert torch.equal(ours, theirs) and int(ours.sum()) == 12


def test_rows_without_a_finite_largest_logit_do_not_vote():
    inf, nan = torch.inf, torch.nan
    logits = torch.tensor(
        [[1, inf, 2], [-inf] * 3, [inf] * 3, [nan, 1, inf], [0, nan, 1], [-inf, 3, -inf], [3.4e38, 0, 0]]
    )
    counts = torch.zeros(1, 3, dtype=torch.int64)
    assert ops.add_votes_(counts, logits, torch.zeros(7, dtype=torch.int64)).tolist() == [5]
    assert counts.tolist() == [[1, 1, 0]]


def test_float64_logits_are_compared_in_float64():
    logits = torch.tensor([[1.0, 1 + 2.0**-50, 1.0], [2.0**-1060, 0.0, 2.0**-1059]], dtype=torch.float64)
    counts = torch.zeros(1, 3, dtype=torch.int64)
    ops.add_votes_(counts, logits, torch.zeros(2, dtype=torch.int64))
    assert counts.tolist() == [[0, 1, 1]] and logits.float().argmax(1).tolist() == [0, 0]


def test_votes_split_over_calls_and_threads():
    logits, index = torch.randn(40_000, 10), torch.randint(0, 50, (40_000,))
    whole, parts = torch.zeros(50, 10, dtype=torch.int64), torch.zeros(50, 10, dtype=torch.int64)
    ops.add_votes_(whole, logits, index)
    for piece, where in zip(logits.split(777), index.split(777), strict=True):
        ops.add_votes_(parts, piece, where)
    assert torch.equal(whole, parts) and int(whole.sum()) == 40_000


BAD = {
    "x must be floating .N, C, H, W.": lambda x: ops.max_pool_relu(x[0]),
    "with H, W >= 2": lambda x: ops.max_pool_relu(x[..., :1]),
    "sigma": lambda x: ops.noisy_copies(x, -1.0),
    "sigma must be finite": lambda x: ops.noisy_copies(x, float("nan")),
    "copies": lambda x: ops.noisy_copies(x, 1.0, 0),
    "seed": lambda x: ops.noisy_copies(x, 1.0, 1, -1),
    "samples": lambda x: ops.noisy_copies(x, 1.0, 2, first=2**32 - 1),
    "stream": lambda x: ops.noisy_copies(x, 1.0, stream=65536),
    "image_ids": lambda x: ops.noisy_copies(x, 1.0, image_ids=torch.tensor([0])),
    "float32, bfloat16": lambda x: ops.noisy_copies(x.double(), 1.0),
    "dtype": lambda x: ops.noisy_copies(x, 1.0, dtype=torch.float64),
    "come together": lambda x: ops.noisy_copies(x, 1.0, mean=[0.0] * 3),
    "one number per channel": lambda x: ops.noisy_copies(x, 1.0, mean=[0.0], std=[1.0]),
    "memory_format": lambda x: ops.noisy_copies(x, 1.0, memory_format=torch.channels_last_3d),
    "channels_last needs": lambda x: ops.noisy_copies(x[0], 1.0, memory_format=torch.channels_last),
    "out must be": lambda x: ops.noisy_copies(x, 1.0, out=torch.empty(1, 3, 4, 4)),
    "out must be contiguous": lambda x: ops.noisy_copies(x, 1.0, out=torch.empty(2, 3, 4, 8)[..., ::2]),
    "counts": lambda x: ops.add_votes_(torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)),
    "logits": lambda x: ops.add_votes_(
        torch.zeros(2, 3, dtype=torch.int64), torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64)
    ),
    "float64 .M, 3., not torch.complex64": lambda x: ops.add_votes_(
        torch.zeros(2, 3, dtype=torch.int64), torch.zeros(4, 3).to(torch.complex64), torch.zeros(4, dtype=torch.int64)
    ),
    "image_index must be int64": lambda x: ops.add_votes_(
        torch.zeros(2, 3, dtype=torch.int64), torch.zeros(4, 3), torch.zeros(3, dtype=torch.int64)
    ),
    r"image_index must be in \[0, 2\)": lambda x: ops.add_votes_(
        torch.zeros(2, 3, dtype=torch.int64), torch.zeros(4, 3), torch.tensor([0, 1, 2, 0])
    ),
    r"void must be bool \[4\]": lambda x: ops.add_votes_(
        torch.zeros(2, 4, dtype=torch.int64), torch.zeros(4, 3), torch.zeros(4).long(), torch.zeros(4)
    ),
    "\\[M, 2\\], not": lambda x: ops.add_votes_(
        torch.zeros(2, 3, dtype=torch.int64), torch.zeros(4, 3), torch.zeros(4).long(), torch.zeros(4).bool()
    ),
    "k must be int64": lambda x: ops.clopper_pearson_lower(torch.tensor(1.0), 10, 0.1),
    r"k must be in \[0, n\]": lambda x: ops.clopper_pearson_upper(torch.tensor(11), 10, 0.1),
    "n must be": lambda x: ops.clopper_pearson_lower(torch.tensor(0), 0, 0.1),
    "alpha": lambda x: ops.clopper_pearson_lower(torch.tensor(1), 10, 1.0),
    "p must be float64": lambda x: ops.normal_quantile(torch.tensor(0.5)),
    "rounding": lambda x: ops.normal_quantile(torch.tensor(0.5, dtype=torch.float64), rounding="nearest"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_a_clear_error(message):
    with pytest.raises(ValueError, match=message):
        BAD[message](torch.rand(2, 3, 4, 4))


@pytest.mark.parametrize("row", [(-1, 0, 0), (2, 0, 0), (0, -1, 0), (0, 2**15, 0), (0, 0, -1), (0, 0, 2**32)])
def test_rows_out_of_range_are_refused(row):
    x, one = torch.rand(2, 5), torch.ones(1, dtype=torch.float64)
    table = torch.tensor([(0, 1, 2), row])
    with pytest.raises(RuntimeError, match=r"image in \[0, B\), stream in \[0, 2\^15\), sample in"):
        ops.operators.lattice_copies_(torch.empty(2, 5), x, None, 0.5, one, 0 * one, 7, 0, 0, table)
    if row[1] != 2**15:
        with pytest.raises(RuntimeError, match=r"stream in \[0, 2\^16\)"):
            ops.operators.noisy_copies_(torch.empty(2, 5), x, None, 0.5, 7, 0, 0, None, None, table)


def test_a_table_of_rows_has_a_row_for_each_of_out():
    x = torch.rand(2, 5)
    for table in (torch.zeros(3, 3).long(), torch.zeros(2, 2).long(), torch.zeros(2, 3), torch.zeros(6).long()):
        with pytest.raises(RuntimeError, match="rows must be int64"):
            ops.operators.noisy_copies_(torch.empty(2, 5), x, None, 0.5, 7, 0, 0, None, None, table)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_of_many_pieces_are_those_of_the_pieces(dtype, layout):
    x, ids = torch.rand(4, 3, 9, 7), torch.tensor([5, 2**47, 0, 77])
    pieces = [(2, 1, 0, 5), (0, 0, 2**32 - 3, 3), (2, 7, 90, 1), (3, 2**15 - 1, 6, 4)]
    table = torch.tensor([(image, stream, first + i) for image, stream, first, count in pieces for i in range(count)])
    step, offset = torch.tensor([1 / 255, 0.1, 1e-5]).double(), torch.tensor([0, 0.3, -2.0]).double()
    x[3, 1, 2, 3] = torch.nan  # void
    outs = [torch.empty(13, 3, 9, 7, dtype=dtype).contiguous(memory_format=layout) for _ in range(4)]
    ops.operators.noisy_copies_(outs[0], x, ids, 0.5, 7, 0, 0, None, None, table)
    void = ops.operators.lattice_copies_(outs[1], x, ids, 0.5, step, offset, 7, 0, 0, table)
    voids = []
    for begin, (image, stream, first, count) in zip((0, 5, 8, 9), pieces, strict=True):
        part, one = slice(begin, begin + count), slice(image, image + 1)
        ops.operators.noisy_copies_(outs[2][part], x[one], ids[one], 0.5, 7, first, stream, None, None)
        voids.append(
            ops.operators.lattice_copies_(outs[3][part], x[one], ids[one], 0.5, step, offset, 7, first, stream)
        )
    assert different_bits(outs[0], outs[2]) is None and different_bits(outs[1], outs[3]) is None
    assert torch.equal(void, torch.cat(voids)) and void.tolist() == [False] * 9 + [True] * 4


def test_nothing_in_nothing_out():
    assert ops.noisy_copies(torch.rand(0, 3, 4, 4), 1.0, 5).shape == (0, 3, 4, 4)
    assert ops.noisy_copies(torch.rand(2, 0), 1.0, 5).shape == (10, 0)
