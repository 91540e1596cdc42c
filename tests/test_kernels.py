"""The form for CUDA keeps what the definition keeps; its kernel agrees with the probabilities that it never writes.

On a GPU the tests take its kernel. Elsewhere they take no kernel but the rest of that form; where Triton is installed,
one test runs this file once more with the kernel in Triton's interpreter.
"""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from lat_optuna.model import significance as forms
from lat_optuna.model.significance import (
    Keep,
    attend_and_choose,
    attention_probabilities,
    choose_rows,
    context_of_rows,
    significance,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNEL = forms.kernels is not None and (INTERPRETED or DEVICE == "cuda")
LOW = [torch.float16, torch.bfloat16]
VOTES = LOW if DEVICE == "cuda" else [torch.float32, *LOW]
"""What the kernel is tested with: on a GPU fp32 is not its affair; in the interpreter it is the sharpest."""
MASKS = ["none", "padding", "window", "window and padding", "by head", "nothing allowed"]

needs_kernel = pytest.mark.skipif(not KERNEL, reason="there is no GPU, or no Triton")
needs_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="there is no GPU")


class Probabilities:
    """In the kernel's place where there is none."""

    @staticmethod
    def received(query, key, allowed, real):
        return significance(attention_probabilities(query, key, allowed), real)

    received_op = received


@pytest.fixture(scope="module", autouse=True)
def _kernel():
    """Triton's interpreter up to 3.6 does not know numpy 2.4; a CPU without it takes no kernel."""
    with pytest.MonkeyPatch.context() as patch:
        if not KERNEL:
            patch.setattr(forms, "kernels", Probabilities)
        elif INTERPRETED:
            from triton.runtime import interpreter

            original = interpreter._patch_lang_tensor

            def with_index(tensor, scope):
                original(tensor, scope)
                scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

            patch.setattr(interpreter, "_patch_lang_tensor", with_index)
        yield


@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda" or find_spec("triton") is None, reason="there is no Triton")
def test_the_kernel_in_tritons_interpreter():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-q", __file__]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def projections(dtype, n=70, batch=3, heads=2, size=32, seed=0):
    """Query, key and value as a model has them: (batch, heads, n, size) in views of (batch, n, heads * size)."""
    made = torch.Generator().manual_seed(seed)
    parts = [2 * torch.randn(batch, n, heads, size, generator=made) for _ in range(3)]
    return [part.to(dtype).to(DEVICE).transpose(1, 2) for part in parts]


def masks(kind, n=70, batch=3, heads=2):
    """What is allowed, and what is real."""
    ns = torch.tensor([n, n // 2 + 1, 1])[:batch]
    real = (torch.arange(n) < ns[:, None]).to(DEVICE)
    near = ((torch.arange(n)[:, None] - torch.arange(n)).abs() < 9).to(DEVICE)
    if kind == "none":
        return None, None
    if kind == "padding":
        return real[:, None, None], real
    if kind == "window":
        return near[None, None], None
    if kind == "window and padding":
        return near & real[:, None, None], real
    if kind == "by head":
        return torch.stack([near, near.logical_not()])[None].expand(batch, heads, n, n), None
    allowed = near & real[:, None, None]
    allowed[0, :, 3:6] = False
    allowed[1] = False
    return allowed, None


def exact_votes(query, key, allowed, real):
    return significance(attention_probabilities(query.float(), key.float(), allowed), real)


def votes_agree(query, key, allowed, real):
    found = forms.kernels.received(query, key, allowed, real)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact_votes(query, key, allowed, real), atol=1e-4, rtol=1e-4)
    assert torch.equal(found, forms.kernels.received(query, key, allowed, real))


def skip_what_the_interpreter_cannot(dtype):
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies the bits of bf16")


@needs_kernel
@pytest.mark.parametrize("dtype", VOTES)
@pytest.mark.parametrize("kind", MASKS)
def test_votes_are_those_of_the_probabilities(kind, dtype):
    skip_what_the_interpreter_cannot(dtype)
    query, key, _ = projections(dtype)
    votes_agree(query, key, *masks(kind))


@needs_kernel
@pytest.mark.parametrize("dtype", VOTES)
@pytest.mark.parametrize("size", [8, 20, 64, 96, 128])
@pytest.mark.parametrize("n", [1, 64, 130])
def test_votes_of_all_head_sizes_and_numbers_of_rows(n, size, dtype):
    skip_what_the_interpreter_cannot(dtype)
    query, key, _ = projections(dtype, n, 2, 1, size)
    votes_agree(query, key, *masks("padding", n, 2))


@needs_kernel
def test_votes_of_any_strides_and_of_rows_that_are_not_numbers():
    packed = torch.randn(2, 40, 3, 2, 32, generator=torch.Generator().manual_seed(0)).half().to(DEVICE)
    query, key, _ = (part.transpose(1, 2) for part in packed.unbind(2))
    votes_agree(query, key, None, None)
    votes_agree(query.transpose(2, 3).contiguous().transpose(2, 3), key[:, :, ::2].repeat_interleave(2, 2), None, None)
    real = torch.arange(80, device=DEVICE)[::2].expand(2, -1) < torch.tensor([[80], [50]], device=DEVICE)
    votes_agree(query, key, real[:, None, None], real)
    expected = forms.kernels.received(query, key, real[:, None, None], real)
    packed[1, 25:] = torch.nan
    assert torch.equal(forms.kernels.received(query, key, real[:, None, None], real), expected)


@needs_kernel
def test_the_kernel_leaves_large_heads_and_other_precisions_to_the_probabilities():
    for size, dtype in ((160, torch.float16), (32, torch.float32), (32, torch.float64)):
        assert not forms.kernels.fits(projections(dtype, 20, 2, 1, size)[0])
    assert forms.kernels.fits(projections(torch.float16, 20, 2, 1, 32)[0])


@needs_gpu
@needs_kernel
def test_new_shapes_compile_no_new_kernel():
    def run(n, kind):
        query, key, _ = projections(torch.float16, n)
        forms.kernels.received(query, key, *masks(kind, n))

    def compiled():
        return len(forms.kernels._received.device_caches[torch.cuda.current_device()][0])

    for kind in MASKS:
        run(70, kind)
    before = compiled()
    for kind in MASKS:
        for n in (2, 16, 33, 64, 96, 128, 131):
            run(n, kind)
    assert compiled() == before


def of_cuda(query, key, value, allowed, keep, rows=None, dropout=0.0):
    """The form for CUDA, also on a CPU."""
    if DEVICE == "cuda":  # in fp32 that is the whole form
        return attend_and_choose(query, key, value, allowed, keep, rows, dropout)
    return forms._fused(query, key, value, allowed, keep, rows, dropout)


def keep_for(real, n=70, width=30):
    if real is None:
        return Keep(width)
    counts = (real.sum(-1) * width // n).clamp(min=1)
    return Keep(width, counts, real)


def differ_at_the_cut_alone(rows, votes, keep):
    """Rows that one form keeps and the other does not receive what the last row that stays receives."""
    expected = choose_rows(votes, keep)
    n = votes.size(1)
    for found, ours, received in zip(rows.tolist(), expected.tolist(), votes.tolist(), strict=True):
        differing = set(found) ^ set(ours)
        assert n not in differing
        cut = min((received[row] for row in ours if row < n and row >= keep.protected), default=0.0)
        assert all(abs(received[row] - cut) <= 1e-3 * cut for row in differing)


@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
@pytest.mark.parametrize("kind", MASKS)
def test_rows_context_and_gradients_are_those_of_the_whole_form(kind, dtype):
    skip_what_the_interpreter_cannot(dtype)
    allowed, real = masks(kind)
    keep = keep_for(real)
    inputs = [part.requires_grad_() for part in projections(dtype)]
    rows, context = of_cuda(*inputs, allowed, keep)
    assert context.dtype == dtype
    assert context.isfinite().all()
    if KERNEL or dtype == torch.float32:  # without the kernel scores are rounded to the low precision
        differ_at_the_cut_alone(rows, exact_votes(*(part.detach() for part in inputs[:2]), allowed, real), keep)
    # The whole form in fp32. Padding is not read, nor is a row that nothing is allowed.
    whole = [part.detach().float().requires_grad_() for part in inputs]
    valid = rows.clamp(max=69)
    expected = context_of_rows(attention_probabilities(*whole[:2], allowed), whole[2], valid)
    read = torch.ones_like(rows, dtype=torch.bool)
    if allowed is not None:
        read &= allowed.expand(3, 2, 70, 70).any(-1).all(1).gather(1, valid)
    if keep.counts is not None:
        read &= torch.arange(30, device=DEVICE) < keep.counts[:, None]
    weights = torch.randn(context.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE) * read[:, :, None]
    tolerance = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 8e-2, "rtol": 5e-2}
    torch.testing.assert_close(context.float() * read[:, :, None], expected * read[:, :, None], **tolerance)
    (context * weights.to(dtype)).sum().backward()
    (expected * weights).sum().backward()
    for ours, theirs in zip(inputs, whole, strict=True):
        error = (ours.grad.float() - theirs.grad).norm() / theirs.grad.norm()
        assert error < (1e-4 if dtype == torch.float32 else 3e-2)


def test_a_replay_keeps_to_its_rows_and_saves_the_same_tensors():
    inputs = [part.requires_grad_() for part in projections(torch.float32)]
    allowed, real = masks("window and padding")
    shapes, found = [], []
    rows = None
    for _ in range(2):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, to=saved: to.append(x.shape) or x, lambda x: x):
            rows, context = of_cuda(*inputs, allowed, keep_for(real), rows)
        shapes.append(saved)
        found.append((rows, context))
    assert shapes[0] == shapes[1]
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])


def test_dropout_is_that_of_the_context_alone():
    query, key, value = projections(torch.float32)
    rows, context = of_cuda(query, key, value, None, Keep(30))
    again, dropped = of_cuda(query, key, value, None, Keep(30), dropout=0.5)
    assert torch.equal(rows, again)
    assert not torch.allclose(context, dropped)
    mean = sum(of_cuda(query, key, value, None, Keep(30), rows, 0.5)[1] for _ in range(300)) / 300
    assert (mean - context).norm() < 0.2 * context.norm()


@pytest.mark.parametrize("masked", [False, True])
def test_a_compiled_graph_is_whole_and_fits_other_shapes(masked):
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    close = {"atol": 3e-2, "rtol": 3e-2} if DEVICE == "cuda" else {"atol": 1e-3, "rtol": 1e-3}

    from torch._dynamo.testing import CompileCounterWithBackend

    def layer(query, key, value, real, counts, width):
        keep = Keep(width, counts, real)
        rows, context = of_cuda(query, key, value, None if real is None else real[:, None, None], keep)
        return rows, context

    torch.compiler.reset()
    backend = CompileCounterWithBackend("inductor" if DEVICE == "cuda" else "aot_eager")
    compiled = torch.compile(layer, dynamic=True, fullgraph=True, backend=backend)
    counted = []
    for n in (70, 50, 33):
        _, real = masks("padding" if masked else "none", n)
        counts = keep_for(real, n, n // 2).counts
        ours = [part.requires_grad_() for part in projections(dtype, n)]
        plain = [part.detach().clone().requires_grad_() for part in ours]
        rows, context = compiled(*ours, real, counts, n // 2)
        expected_rows, expected = layer(*plain, real, counts, n // 2)
        assert torch.equal(rows, expected_rows)
        torch.testing.assert_close(context, expected, **close)
        context.square().sum().backward()
        expected.square().sum().backward()
        for part, other in zip(ours, plain, strict=True):
            assert (part.grad - other.grad).norm() < 1e-2 * other.grad.norm()
        counted.append(backend.frame_count)
    assert counted[0] == counted[-1]
    if KERNEL:
        targets = [str(node.target) for graph in backend.graphs for node in graph.graph.nodes]
        assert any("received" in target for target in targets)
