"""The Triton kernels against the dense product and against PyTorch's ops.

The same tests run compiled on a CUDA device (`-m gpu`) and, everywhere triton is installed, in its interpreter. That is
chosen when triton is imported and for the whole process, so `test_in_the_interpreter` runs this file in another one.
"""

import os
import subprocess
import sys
import warnings
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitrail.coders import Codes, make_coder, sparse
from vitrail.coders.sparse import activations, decode

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
ROOT = Path(__file__).parents[2]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
few = settings(max_examples=25, deadline=None, derandomize=True, database=None)


def has_an_interpreter():
    """3.6's interpreter turns arrays into scalars in a way that NumPy has given up; the kernels compile with 3.2."""
    try:
        return tuple(int(part) for part in version("triton").split(".")[:2]) >= (3, 9)
    except PackageNotFoundError:
        return False


def on_kernels(test):
    if INTERPRETED:
        return test
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")(test))


@contextmanager
def products(*, triton: bool):
    """Either implementation, whatever the device. Memory that nobody wrote is NaN."""
    module = kernels() if triton else None
    before = torch.are_deterministic_algorithms_enabled()
    with mock.patch.object(sparse, "_kernels", return_value=module):
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*deterministic", UserWarning)
                yield
        finally:
            torch.use_deterministic_algorithms(before)


def kernels():
    from vitrail.coders import triton_kernels

    return triton_kernels


def parts_of(n):
    """Bags of more than n entries are split. In use the number is too large for a small test to reach."""
    return mock.patch.object(kernels(), "PART", n)


@st.composite
def bags(draw):
    """Offsets of 0 to 6 uneven bags, often empty; the entries' rows, any of them more than once."""
    counts = draw(st.lists(st.sampled_from([0, 0, 1, 2, 5, 17, 40]), max_size=6))
    m, d = draw(st.sampled_from([1, 3, 8])), draw(st.sampled_from([1, 5, 16, 33]))
    rows = draw(st.lists(st.integers(0, m - 1), min_size=sum(counts), max_size=sum(counts)))
    offsets = torch.tensor([0, *counts]).cumsum(0)
    return offsets, torch.tensor(rows, dtype=torch.int64), m, d


def random_codes(n=7, d_sae=9, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    z = torch.rand(n, d_sae, generator=generator, dtype=torch.float64)
    z = z * (z > 0.6)
    z[2] = 0  # an empty row
    z[:, 3] = 0  # a latent that never fires
    z[:, 4] = 1  # one that always does
    return Codes.from_dense(z.to(dtype).to(DEVICE))


def normal(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def assert_sums(out, exact, absolute):
    """As exact as the dtype: of the sum where it has 16 bits, as it is rounded once; else of the summands' sizes."""
    eps = torch.finfo(out.dtype).eps
    allowed = eps * exact.abs() + 1e-6 * absolute if out.dtype.itemsize == 2 else 8 * eps * absolute
    assert out.shape == exact.shape
    assert bool(((out.cpu().double() - exact).abs() <= allowed + torch.finfo(out.dtype).tiny).all())


# -- what runs everywhere


@pytest.mark.skipif(not has_an_interpreter(), reason="triton 3.9 or later is not installed")
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_in_the_interpreter():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-n0", "-p", "no:cacheprovider", str(Path(__file__))]
    environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    assert " passed" in ran.stdout


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="an interpreted kernel is not compiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_kernels_compile_for_a_card_that_is_not_here(dtype, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    number = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float64: "*fp64"}[dtype]
    sums = tl.float64 if dtype == torch.float64 else tl.float32
    types = dict.fromkeys(("table", "weights", "out", "per_row", "per_latent"), number)
    types |= dict.fromkeys(("indices", "offsets", "rows", "order"), "*i64")
    types |= {"parts": "*fp64" if dtype == torch.float64 else "*fp32"}
    given = dict(STEPS=15, IN_ORDER=False, SUMS=sums, PART=512, ENTRIES=16, COLUMNS=128)
    for kernel in (kernels()._parts, kernels()._bags, kernels()._dots):
        constants = {name: given[name] for name in kernel.arg_names if name in given}
        signature = {name: "constexpr" if name in given else types.get(name, "i32") for name in kernel.arg_names}
        source = ASTSource(kernel, signature, constants)
        made = triton.compile(source, target=GPUTarget("cuda", 80, 32), options=dict(kernels().LAUNCH))
        assert made.asm["ptx"]
        assert "atom" not in made.asm["ptx"]


def test_the_device_chooses(monkeypatch):
    assert sparse._kernels(torch.device("cpu")) is None
    sums, dots = torch.ones(2, 4), torch.ones(2)
    stand_in = SimpleNamespace(bag=mock.Mock(return_value=sums), entry_dots=mock.Mock(return_value=dots))
    monkeypatch.setattr(sparse, "_kernels", {torch.device("cpu"): stand_in}.get)
    codes, table, rows = Codes.from_dense(torch.eye(3)[:2]), torch.ones(3, 4), torch.ones(2, 4)
    assert sparse.bag(table, codes.indices, codes.offsets, codes.values) is sums
    assert stand_in.bag.call_args.args == (table, codes.indices, codes.offsets, codes.values)
    assert sparse.entry_dots(rows, table, codes) is dots
    assert stand_in.entry_dots.call_args.args == (rows, table, codes)


@pytest.mark.parametrize("missing", ["triton", "card", "compiler"])
def test_on_cuda_without_what_triton_needs_the_pytorch_ops_do_it(missing, monkeypatch):
    broken = ModuleType("vitrail.coders.triton_kernels")
    broken.bag = mock.Mock(side_effect=RuntimeError("Failed to find C compiler."))
    monkeypatch.setitem(sys.modules, "vitrail.coders.triton_kernels", broken)
    monkeypatch.setattr("vitrail.coders.triton_kernels", broken, raising=False)
    monkeypatch.setattr(sparse, "find_spec", lambda name: None if missing == "triton" else object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5) if missing == "card" else (8, 0))
    for name in ("ones", "arange"):  # made on a device that is not here
        real = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, device=None, real=real: real(*a))
    choose = sparse._kernels.__wrapped__
    if missing == "compiler":
        with pytest.warns(UserWarning, match="PyTorch's slower ops. Failed to find C compiler"):
            assert choose(torch.device("cuda", 0)) is None
        broken.bag = mock.Mock()
        assert choose(torch.device("cuda", 0)) is broken
    else:
        assert choose(torch.device("cuda", 0)) is None
        broken.bag.assert_not_called()


# -- the kernels themselves


@on_kernels
@needs_triton
def test_two_bags_by_hand():
    table = torch.tensor([[1.0, 2, 3], [10, 20, 30]], device=DEVICE)
    indices, offsets = torch.tensor([1, 0, 1], device=DEVICE), torch.tensor([0, 2, 2, 3], device=DEVICE)
    weights = torch.tensor([1.0, 3.0, 0.5], device=DEVICE)
    # 1 * (10, 20, 30) + 3 * (1, 2, 3);   nothing;   0.5 * (10, 20, 30)
    want = [[13.0, 26.0, 39.0], [0.0, 0.0, 0.0], [5.0, 10.0, 15.0]]
    for n in (512, 1):
        with products(triton=True), parts_of(n):
            assert sparse.bag(table, indices, offsets, weights).tolist() == want


@on_kernels
@needs_triton
def test_dots_by_hand():
    codes = Codes.from_dense(torch.tensor([[0.0, 1, 1], [1, 0, 0]], device=DEVICE))
    per_row = torch.tensor([[1.0, 2], [3, 4]], device=DEVICE)
    per_latent = torch.tensor([[10.0, 1], [20, 1], [30, 1]], device=DEVICE)
    with products(triton=True):
        # row 0 with latents 1 and 2: 20 + 2, 30 + 2; row 1 with latent 0: 30 + 4
        assert sparse.entry_dots(per_row, per_latent, codes).tolist() == [22.0, 32.0, 34.0]


@on_kernels
@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@few
@given(bags(), st.sampled_from([torch.int32, torch.int64]), st.sampled_from([4, 512]))
def test_bags_of_any_shape_equal_the_dense_product_and_embedding_bag(dtype, drawn, whole, n_part):
    offsets, rows, m, d = drawn
    table, weights = normal(m, d, dtype=dtype), normal(len(rows), dtype=dtype, seed=1)
    indices, offsets = rows.to(DEVICE, whole), offsets.to(DEVICE, whole)
    dense = torch.zeros(len(offsets) - 1, m, dtype=torch.float64)
    absolute = dense.clone()
    bag_of = torch.arange(len(dense)).repeat_interleave(offsets.diff().cpu().long())
    dense.index_put_((bag_of, rows), weights.cpu().double(), accumulate=True)
    absolute.index_put_((bag_of, rows), weights.cpu().double().abs(), accumulate=True)
    with products(triton=True), parts_of(n_part):
        out = sparse.bag(table, indices, offsets, weights)
        again = sparse.bag(table, indices, offsets, weights)
    assert (out.dtype, out.device) == (table.dtype, table.device)
    assert torch.equal(out, again)
    assert_sums(out, dense @ table.cpu().double(), absolute @ table.cpu().double().abs())
    with products(triton=False):
        by_torch = sparse.bag(table, indices, offsets, weights)
    if dtype.itemsize > 2:
        assert_sums(out, by_torch.cpu().double(), absolute @ table.cpu().double().abs())


@on_kernels
@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [1, 5, 300])
def test_dots_equal_the_dense_product_in_either_order_of_reading(dtype, d):
    codes = random_codes(dtype=dtype)
    per_row, per_latent = normal(7, d, dtype=dtype), normal(9, d, dtype=dtype, seed=1)
    dense = (per_row.double() @ per_latent.double().t())[codes.rows(), codes.indices]
    small = Codes(codes.offsets.int(), codes.indices.int(), codes.values, codes.d_sae)
    with products(triton=True):
        by_rows = sparse.entry_dots(per_row, per_latent, codes)
        assert "transposed" not in codes._pattern
        codes.transposed()
        by_latents = sparse.entry_dots(per_row, per_latent, codes)
        assert torch.equal(sparse.entry_dots(per_row, per_latent, small), by_rows)
    assert by_rows.dtype == dtype
    assert torch.equal(by_rows, by_latents)
    absolute = (per_row.double().abs() @ per_latent.double().abs().t())[codes.rows(), codes.indices].cpu()
    assert_sums(by_rows, dense.cpu(), absolute)
    if dtype.itemsize > 2:
        with products(triton=False):
            assert_sums(by_rows, sparse.entry_dots(per_row, per_latent, codes).cpu().double(), absolute)


@on_kernels
@needs_triton
def test_tables_may_be_views():
    codes = random_codes()
    whole, wide = normal(5, 9), normal(9, 11, seed=1)
    views = [whole.t(), wide[:, 2:7], wide[:, ::2][:, :5], wide[:1, :5].expand(9, 5)]
    per_row = normal(5, 7, seed=2).t()
    with products(triton=True), parts_of(4):
        for table in views:
            out = sparse.bag(table, codes.indices, codes.offsets, codes.values)
            torch.testing.assert_close(out, codes.to_dense() @ table)
            dots = sparse.entry_dots(per_row, table, codes)
            torch.testing.assert_close(dots, (per_row @ table.t())[codes.rows(), codes.indices])
        strided = codes.values.repeat_interleave(2)[::2]
        out = sparse.bag(wide, codes.indices.repeat_interleave(2)[::2], codes.offsets, strided)
        torch.testing.assert_close(out, codes.to_dense() @ wide)


@on_kernels
@needs_triton
def test_sixteen_bits_are_summed_in_float32():
    # 300 ones: in bfloat16 the sum would stay at 256, where the next number is 258; 300 itself bfloat16 can say.
    for n_part in (512, 64):
        with products(triton=True), parts_of(n_part):
            ones = torch.ones(300, 1, dtype=torch.bfloat16, device=DEVICE)
            offsets = torch.tensor([0, 300], device=DEVICE)
            assert sparse.bag(ones, torch.arange(300, device=DEVICE), offsets, ones[:, 0]).item() == 300
            codes = Codes(offsets[:2] // 300, torch.zeros(1, dtype=torch.int64, device=DEVICE), ones[:1, 0], 1)
            assert sparse.entry_dots(ones.t(), ones.t(), codes).item() == 300


@on_kernels
@needs_triton
def test_with_nothing_to_sum_there_are_zeros():
    whole = dict(dtype=torch.int64, device=DEVICE)
    none, table = torch.empty(0, **whole), normal(4, 3)
    with products(triton=True):
        out = sparse.bag(table, none, torch.zeros(3, **whole), normal(0))
        assert torch.equal(out, torch.zeros_like(out))
        assert out.shape == (2, 3)
        assert sparse.bag(table, none, torch.zeros(1, **whole), normal(0)).shape == (0, 3)
        assert sparse.bag(table[:, :0], none, torch.zeros(3, **whole), normal(0)).shape == (2, 0)
        codes = Codes.from_dense(torch.zeros(2, 4, dtype=torch.float64, device=DEVICE))
        assert sparse.entry_dots(normal(2, 3), table, codes).shape == (0,)
        assert kernels().entry_dots(normal(2, 3), table, codes).shape == (0,)


@on_kernels
@needs_triton
def test_two_dtypes_at_once_are_refused_as_by_embedding_bag():
    codes, table = random_codes(), normal(9, 3)
    with products(triton=True):
        with pytest.raises(ValueError, match=r"table's dtype torch.float64, got torch.float32"):
            sparse.bag(table, codes.indices, codes.offsets, codes.values.float())
        with pytest.raises(ValueError, match=r"one dtype, got torch.float32 and torch.float64"):
            sparse.entry_dots(normal(7, 3).float(), table, codes)


@on_kernels
@needs_triton
def test_gradients_in_fp64():
    codes = random_codes(n=4, d_sae=5)
    y, W_enc, b_dec, b_enc = normal(4, 2), normal(2, 5, seed=1), normal(2, seed=2), normal(5, seed=3)
    W_dec, at = normal(5, 2, seed=4), (codes.rows(), codes.indices)

    def decoded(values, W_dec):
        return decode(codes.with_values(values), W_dec)

    def whole(y, b_dec, W_enc, b_enc, W_dec):
        found = ((y - b_dec) @ W_enc + b_enc).detach()[at]
        return decode(activations(y, b_dec, W_enc, b_enc, codes.with_values(found)), W_dec)

    with products(triton=True), parts_of(2):
        arguments = [t.clone().requires_grad_() for t in (codes.values, W_dec)]
        assert torch.autograd.gradcheck(decoded, arguments)
        arguments = [t.clone().requires_grad_() for t in (y, b_dec, W_enc, b_enc, W_dec)]
        assert torch.autograd.gradcheck(whole, arguments)


@on_kernels
@needs_triton
@pytest.mark.parametrize("name", ["topk", "batch_topk", "matryoshka"])
def test_a_step_of_a_coder_is_that_of_the_pytorch_ops(name):
    x = normal(24, 10, dtype=torch.float32)
    losses, gradients = [], []
    for triton in (True, False):
        k = {} if name == "matryoshka" else {"k": 6}
        coder = make_coder(name, d_in=10, d_sae=40, normalization="none", **k).to(DEVICE)
        with products(triton=triton), parts_of(8):
            step = coder.loss(x)
            step.loss.backward()
        losses.append(step.loss.detach())
        gradients.append([parameter.grad for parameter in coder.parameters()])
    torch.testing.assert_close(*losses)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert ours.abs().sum() > 0
