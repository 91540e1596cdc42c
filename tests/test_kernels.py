"""A layer that drops by kernels keeps what the definition keeps. They agree with the probabilities that they never
write, and with a sort.

On a GPU the tests take Triton's kernels, on a CPU those in C++, or torch's operators where there is no compiler. Where
Triton is installed, one test runs this file once more with its kernels in Triton's interpreter.
"""

import os
import platform
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import CASES, inputs_for, results

from lat_optuna.length_config import LengthConfig
from lat_optuna.model import adapt, cpu_kernels, kernels, num_layers
from lat_optuna.model import significance as forms
from lat_optuna.model.significance import (
    Keep,
    as_choice,
    attend_and_choose,
    attention_probabilities,
    choose_rows,
    context_of_rows,
    significance,
)

if "MARCH" in os.environ:  # kernels for another processor
    cpu_kernels.FLAGS = tuple(flag.replace("native", os.environ["MARCH"]) for flag in cpu_kernels.FLAGS)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNEL = kernels.cuda_kernels is not None if INTERPRETED or DEVICE == "cuda" else cpu_kernels.available()
LOW = [torch.float16, torch.bfloat16]
VOTES = LOW if DEVICE == "cuda" else [torch.float32, *LOW]
"""On a GPU fp32 is not the kernel's affair; in the interpreter it is the sharpest test."""
MASKS = ["none", "padding", "window", "window and padding", "by head", "nothing allowed"]

needs_kernel = pytest.mark.skipif(not KERNEL, reason="there is no compiler; or, for a GPU, no Triton")
needs_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="there is no GPU")


@pytest.fixture(scope="module", autouse=True)
def _interpreted():
    """Triton's kernels on a CPU. Its interpreter up to 3.6 does not know numpy 2.4."""
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETED:
            from triton.runtime import interpreter

            original = interpreter._patch_lang_tensor

            def with_index(tensor, scope):
                original(tensor, scope)
                scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

            patch.setattr(interpreter, "_patch_lang_tensor", with_index)
            patch.setitem(kernels.BY_DEVICE, "cpu", kernels.cuda_kernels)
            patch.setattr(kernels.cuda_kernels, "DTYPES", (torch.float32, *LOW))
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
    found = kernels.received(query, key, allowed, real)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact_votes(query, key, allowed, real), atol=1e-4, rtol=1e-4)
    assert torch.equal(found, kernels.received(query, key, allowed, real))


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
    expected = kernels.received(query, key, real[:, None, None], real)
    packed[1, 25:] = torch.nan
    assert torch.equal(kernels.received(query, key, real[:, None, None], real), expected)


@needs_kernel
def test_the_kernel_leaves_large_heads_and_other_precisions_to_the_probabilities():
    for size, dtype in ((160, torch.float16), (32, torch.float32), (32, torch.float64)):
        fit = dtype != torch.float64 if DEVICE == "cpu" and not INTERPRETED else dtype == torch.float32 and INTERPRETED
        assert kernels.fit(*projections(dtype, 20, 2, 1, size)) == fit
    assert kernels.fit(*projections(torch.float16, 20, 2, 1, 32))
    query, key, value = projections(torch.float16, 20, 2, 1, 32)
    assert not kernels.fit(query, key, value.double())


@needs_gpu
@needs_kernel
def test_new_shapes_compile_no_new_kernel():
    def run(n, kind):
        query, key, _ = projections(torch.float16, n)
        allowed, real = masks(kind, n)
        votes = kernels.received(query, key, allowed, real)
        for batch in (1, 3):  # counts of a layer begin anywhere
            counts = torch.ones(2, batch, dtype=torch.int64, device=DEVICE)
            for keep in (Keep(n, None), Keep(1 + n // 2, counts[1], None if real is None else real[:batch], 1 + n % 2)):
                forms.choose(votes[:batch], keep)

    def compiled():
        both = kernels.cuda_kernels._received, kernels.cuda_kernels._choose
        return sum(len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in both)

    for kind in MASKS:
        run(70, kind)
    before = compiled()
    for kind in MASKS:
        for n in (2, 16, 33, 64, 96, 128):  # beyond it the choice has a block of twice as many
            run(n, kind)
    assert compiled() == before


@pytest.fixture
def vote():
    """Votes of each kind, on the device."""

    def make(kind, n, batch=4):
        made = torch.Generator().manual_seed(n)
        votes = torch.rand(batch, n, generator=made) * 12
        if kind == "tied":
            votes = (votes / 4).round()
        elif kind == "constant":
            votes[:] = 0.25
        elif kind == "signed zeros and worse":
            worst = [] if DEVICE == "cuda" else [torch.nan, -torch.nan]  # its sort has an order of its own for these
            votes = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, -1.0, 1e-42, *worst])
            votes = votes[torch.randint(len(votes), (batch, n), generator=made)]
        return votes.to(DEVICE)

    return make


def agrees(votes, keep):
    """The kernel's choice is the sort's; ``real`` too, where there is filler."""
    expected = as_choice(choose_rows(votes, keep), keep, votes.size(1))
    found = forms.choose(votes, keep)
    assert torch.equal(found.rows, expected.rows)
    assert torch.equal(found.positions, expected.positions)
    assert (found.real is None) == (expected.real is None)
    assert found.real is None or torch.equal(found.real, expected.real)
    start = torch.arange(votes.size(0), device=DEVICE)[:, None] * votes.size(1)
    assert torch.equal(found.flat, (start + expected.rows).flatten())
    return found


@needs_kernel
@pytest.mark.parametrize("n", [1, 2, 17, 64, 130, 513])
@pytest.mark.parametrize("kind", ["random", "tied", "constant", "signed zeros and worse"])
def test_the_choice_is_that_of_a_sort(vote, kind, n):
    votes = vote(kind, n)
    for width in {1, 2, n // 3, n - 1, n} & set(range(1, n + 1)):
        for protected in {1, 2} & set(range(width + 1)):
            agrees(votes, Keep(width, protected=protected))


@needs_kernel
@pytest.mark.parametrize("n", [1, 2, 17, 64, 130, 513])
@pytest.mark.parametrize("kind", ["random", "tied"])
@pytest.mark.parametrize("left", [False, True])
def test_the_choice_of_padded_and_ragged_batches_is_that_of_a_sort(vote, left, kind, n):
    votes = vote(kind, n)
    ns = torch.tensor([n, n // 2 + 1, 1, 0], device=DEVICE)  # the last one is nothing but padding
    real = torch.arange(n, device=DEVICE) < ns[:, None]
    real = real.flip(-1) if left else real
    positions = (3 * torch.arange(n, device=DEVICE) + torch.arange(4, device=DEVICE)[:, None]).contiguous()
    for width in {1, n // 3, n} & set(range(1, n + 1)):
        counts = (ns * width // n).clamp(min=1)
        for packed in {False, not left}:
            agrees(votes, Keep(width, counts, real, 1, packed, None, n))
            agrees(votes, Keep(width, counts, real, 1, packed, positions, 3 * n + 7))
    agrees(votes[:2], Keep(n // 2 + 1, None, real[:2], 1, not left, positions[:2]))
    agrees(votes, Keep(n, torch.full((4,), n, device=DEVICE) // 2 + 1, None, 1, True, None, n))
    # Of any strides, and counts that begin anywhere.
    table = torch.stack([counts, counts, counts])[:, :3]
    wide = real.repeat_interleave(2, 1)[:, ::2]
    agrees(votes.T.contiguous().T[:3], Keep(n, table[1], wide[:3], 2 if n > 1 else 1, False, positions[:3], n))


@needs_kernel
def test_votes_that_are_no_numbers_choose_some_rows():
    votes = torch.full((2, 40), torch.nan, device=DEVICE)
    votes[1, 5:] = 1.0
    choice = forms.choose(votes, Keep(12))
    assert (choice.rows.diff() > 0).all()
    assert (choice.rows < 40).all()


@needs_kernel
@pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="a CPU takes any number")
def test_too_many_rows_for_the_kernel_are_sorted():
    votes = torch.rand(2, kernels.cuda_kernels.LONGEST + 1, device=DEVICE)
    assert forms.choose(votes, Keep(5)).flat is None
    assert agrees(votes[:, :-1].contiguous(), Keep(5)).flat is not None


@needs_kernel
@pytest.mark.skipif(DEVICE == "cuda", reason="there, test_cuda.py does")
@pytest.mark.parametrize("significance", ["all", "cls"])
@pytest.mark.parametrize("drops", ["everywhere", "once"])
@pytest.mark.parametrize(
    "name",
    [
        "BertForQuestionAnswering",
        "Albert-groups",
        "ModernBertForTokenClassification",
        "DeiTForImageClassificationWithTeacher",
    ],
)
def test_models_give_the_same_with_the_kernel(name, drops, significance, monkeypatch):
    if significance == "cls" and name.startswith("ModernBert"):
        pytest.skip("its layers have windows")
    ns = (13, 20, 7, 1)
    model = adapt(CASES[name].build(), significance=significance)
    layers = num_layers(model)
    falling = tuple(range(18, 18 - 2 * layers, -2))
    config = LengthConfig(falling if drops == "everywhere" else (20, *[10] * (layers - 1)), 20)
    of_all_rows, calls = kernels.context, []
    monkeypatch.setattr(kernels, "context", lambda *given: calls.append(given) or of_all_rows(*given))
    monkeypatch.setattr(forms, "BLOCK", 1)  # without the kernel, votes alone as well
    for left in {False, "input_ids" in inputs_for(model, ns)}:
        batch = inputs_for(model, ns, pad_to=23 if drops == "everywhere" else 20, left=left)
        found = {}
        for kernel in (True, False):
            monkeypatch.setattr(kernels, "_run_on", lambda tensor, answer=kernel: answer)
            model.zero_grad()
            with model.at(config):
                outputs = model(**batch)
            parts = [part for parts in results(model, outputs, ns, left) for part in parts]
            sum(part.square().sum() for part in parts).backward()
            found[kernel] = parts + [weights.grad for weights in model.parameters() if weights.grad is not None]
        assert all(torch.equal(*pair) for pair in zip(found[True], found[False], strict=True))
        assert not calls  # not with gradients
        monkeypatch.setattr(kernels, "_run_on", lambda tensor: True)
        with model.eval().at(config), torch.no_grad():  # votes, choice and context at once
            parts = [part for parts in results(model, model(**batch), ns, left) for part in parts]
        torch.testing.assert_close(parts, [part.detach() for part in found[True][: len(parts)]], atol=1e-5, rtol=1e-4)
        dropping = layers if drops == "everywhere" else 1 + left  # padding on the left goes in the first layer
        attending = layers if significance == "cls" else layers - dropping
        assert len(calls) == (0 if INTERPRETED else attending)  # Triton's have none for context alone
        calls.clear()


def test_queries_of_kept_rows_are_not_copied_as_a_whole(monkeypatch):
    query, key, value = projections(torch.float32)
    seen = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            if str(func).startswith(("aten.clone", "aten.copy_", "aten._to_copy", "aten._unsafe_view")):
                seen.append(func)
            return made

    choice, _ = attend_and_choose(query, key, value, None, Keep(30))
    with Copies():
        kept = choice.of(query.transpose(1, 2)).transpose(1, 2)
    assert not seen
    assert torch.equal(kept, query.gather(2, choice.rows[:, None, :, None].expand(-1, 2, -1, 32)))


def keep_for(real, n=70, width=30):
    if real is None:
        return Keep(width)
    counts = (real.sum(-1) * width // n).clamp(min=1)
    return Keep(width, counts, real)


def differ_at_the_cut_alone(choice, votes, keep):
    """Rows that one form keeps and the other does not receive what the last row that stays receives."""
    expected = as_choice(choose_rows(votes, keep), keep, votes.size(1))
    assert (choice.real is None) == (expected.real is None)
    assert choice.real is None or torch.equal(choice.real, expected.real)
    counts = [expected.rows.size(1)] * len(votes) if keep.counts is None else keep.counts.tolist()
    each = zip(choice.rows.tolist(), expected.rows.tolist(), counts, votes.tolist(), strict=True)
    for found, ours, count, received in each:
        differing = set(found[:count]) ^ set(ours[:count])
        cut = min((received[row] for row in ours[:count] if row >= keep.protected), default=0.0)
        assert all(abs(received[row] - cut) <= 1e-3 * cut for row in differing)


@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
@pytest.mark.parametrize("kind", MASKS)
def test_rows_context_and_gradients_are_those_of_the_whole_form(kind, dtype):
    skip_what_the_interpreter_cannot(dtype)
    allowed, real = masks(kind)
    keep = keep_for(real)
    inputs = [part.requires_grad_() for part in projections(dtype)]
    choice, context = attend_and_choose(*inputs, allowed, keep)
    assert context.dtype == dtype
    assert context.isfinite().all()
    if KERNEL or dtype == torch.float32:  # without the kernel scores are rounded to the low precision
        differ_at_the_cut_alone(choice, exact_votes(*(part.detach() for part in inputs[:2]), allowed, real), keep)
    # The whole form in fp32. Padding is not read, nor is a row that nothing is allowed.
    whole = [part.detach().float().requires_grad_() for part in inputs]
    expected = context_of_rows(attention_probabilities(*whole[:2], allowed), whole[2], choice.rows)
    read = torch.ones_like(choice.rows, dtype=torch.bool) if choice.real is None else choice.real
    if allowed is not None:
        read = read & allowed.expand(3, 2, 70, 70).any(-1).all(1).gather(1, choice.rows)
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
    choice = None
    for _ in range(2):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, to=saved: to.append(x.shape) or x, lambda x: x):
            choice, context = attend_and_choose(*inputs, allowed, keep_for(real), choice)
        shapes.append(saved)
        found.append((choice, context))
    assert shapes[0] == shapes[1]
    assert found[0][0] is found[1][0]
    torch.testing.assert_close(found[0][1], found[1][1])


def at_once(query, key, value, allowed, keep):
    """Choice and context by one kernel, which agree with the whole form in fp32. Nothing else has a context."""
    context, rows, positions, real, flat = kernels.attend_and_choose(
        query, key, value, allowed, keep.real, keep.counts, keep.positions, keep.width, keep.protected, keep.tokens
    )
    assert context.dtype == value.dtype
    query, key, value = query.float(), key.float(), value.float()
    probabilities = attention_probabilities(query, key, allowed)
    votes = significance(probabilities, keep.real)
    choice = forms.Choice(rows, positions, None if keep.counts is None else real, flat)
    differ_at_the_cut_alone(choice, votes, keep)
    read = real if keep.real is None else real & keep.real.gather(1, rows)
    assert (context[~read] == 0).all()
    expected = context_of_rows(probabilities, value, rows)
    tolerance = {"atol": 1e-4, "rtol": 1e-4} if context.dtype == torch.float32 else {"atol": 8e-2, "rtol": 5e-2}
    torch.testing.assert_close(context[read].float(), expected[read], **tolerance)
    return context, rows


once = pytest.mark.skipif(not cpu_kernels.available() or INTERPRETED, reason="there is no compiler")


@once
@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
@pytest.mark.parametrize("kind", MASKS)
def test_votes_choice_and_context_at_once(kind, dtype):
    parts = [part.cpu() for part in projections(dtype)]
    allowed, real = (each if each is None else each.cpu() for each in masks(kind))
    at_once(*parts, allowed, keep_for(real))
    if real is not None:  # more rows than are real
        at_once(*parts, allowed, Keep(60, None, real))


@once
@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
@pytest.mark.parametrize("size", [7, 8, 20, 64, 96, 160])
@pytest.mark.parametrize("n", [1, 31, 64, 130])
def test_all_head_sizes_and_numbers_of_rows_at_once(n, size, dtype):
    parts = [part.cpu() for part in projections(dtype, n, 2, 3, size)]
    at_once(*parts, None, Keep((n + 1) // 2))
    real = torch.arange(n) < torch.tensor([[n], [n // 2 + 1]])
    at_once(*parts, real[:, None, None], keep_for(real, n, (n + 1) // 2))


@once
@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("queries", [70, 1, 33])
def test_context_alone_at_once(queries, kind, dtype):
    query, key, value = (part.cpu() for part in projections(dtype))
    allowed, _ = (each if each is None else each.cpu() for each in masks(kind))
    query = query[:, :, :queries]
    if allowed is not None and allowed.size(2) > 1:
        allowed = allowed[:, :, :queries]
    found = kernels.context(query, key, value, allowed)
    assert found.dtype == dtype
    parts = query.float(), key.float(), value.float()
    rows = torch.arange(queries).expand(3, -1)
    expected = context_of_rows(attention_probabilities(*parts[:2], allowed), parts[2], rows)
    tolerance = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 8e-2, "rtol": 5e-2}
    seen = torch.ones(3, queries, dtype=torch.bool)
    if kind == "nothing allowed":  # such a row attends to nothing that anybody reads
        seen[0, 3:6] = seen[1] = False
    torch.testing.assert_close(found.float()[seen], expected[seen], **tolerance)


@once
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_inputs_whose_weights_are_made_again(dtype):
    parts = projections(dtype, 3000, 1, 2)  # 36 MB of weights in bf16
    at_once(*(part.cpu() for part in parts), None, Keep(1000))


@once
@pytest.mark.parametrize("batch", [1, 5])
def test_at_once_gives_the_same_with_any_number_of_threads_and_in_any_batch(batch):
    parts = [part.cpu().contiguous() for part in projections(torch.bfloat16, batch=5)]
    alone = [each[:batch] for each in at_once(*parts, None, Keep(30))]
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found = at_once(*(part[:batch] for part in parts), None, Keep(30))
            assert all(torch.equal(*pair) for pair in zip(found, alone, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_dropout_is_that_of_the_context_alone():
    query, key, value = projections(torch.float32)
    choice, context = attend_and_choose(query, key, value, None, Keep(30))
    again, dropped = attend_and_choose(query, key, value, None, Keep(30), dropout=0.5)
    assert torch.equal(choice.rows, again.rows)
    assert not torch.allclose(context, dropped)
    mean = sum(attend_and_choose(query, key, value, None, Keep(30), choice, 0.5)[1] for _ in range(300)) / 300
    assert (mean - context).norm() < 0.2 * context.norm()


@pytest.mark.skipif(INTERPRETED, reason="in a graph a CPU has its own kernels")
@pytest.mark.parametrize("masked", [False, True])
def test_a_compiled_graph_is_whole_and_fits_other_shapes(masked):
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    close = {"atol": 3e-2, "rtol": 3e-2} if DEVICE == "cuda" else {"atol": 1e-3, "rtol": 1e-3}

    from torch._dynamo.testing import CompileCounterWithBackend

    def layer(query, key, value, real, counts, width):
        keep = Keep(width, counts, real, tokens=query.size(2))
        choice, context = attend_and_choose(query, key, value, None if real is None else real[:, None, None], keep)
        return choice.positions, context

    kind = "inductor" if DEVICE == "cuda" else "aot_eager"
    for training in (False, True):
        counted = []
        torch.compiler.reset()
        backend = CompileCounterWithBackend(kind)
        compiled = torch.compile(layer, dynamic=True, fullgraph=True, backend=backend)
        for n in (70, 50, 33):
            _, real = masks("padding" if masked else "none", n)
            counts = keep_for(real, n, n // 2).counts
            ours = [part.requires_grad_(training) for part in projections(dtype, n)]
            plain = [part.detach().clone().requires_grad_(training) for part in ours]
            positions, context = compiled(*ours, real, counts, n // 2)
            expected_positions, expected = layer(*plain, real, counts, n // 2)
            assert torch.equal(positions, expected_positions)
            torch.testing.assert_close(context, expected, **close)
            if training:
                context.square().sum().backward()
                expected.square().sum().backward()
                for part, other in zip(ours, plain, strict=True):
                    assert (part.grad - other.grad).norm() < 1e-2 * other.grad.norm()
            counted.append(backend.frame_count)
        # Inductor's backward pass on CUDA asks whether the width is a multiple of 8 (33 // 2 is).
        assert counted[-1] <= counted[0] + (training and DEVICE == "cuda")
        if KERNEL:
            targets = [str(node.target) for graph in backend.graphs for node in graph.graph.nodes]
            for name in ("received", "choose") if training or DEVICE == "cuda" else ("attend_and_choose",):
                assert any(f"lat_optuna.{name}" in target for target in targets)


@pytest.mark.skipif(not cpu_kernels.available(), reason="there is no compiler")
def test_kernels_for_the_cpu_are_compiled_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpu_kernels, "FLAGS", (*cpu_kernels.FLAGS, "-O0"))  # it is not about speed
    (folder := tmp_path / "folder").mkdir()
    made = cpu_kernels._library(folder)
    (kept,) = (tmp_path / "lat_optuna").iterdir()
    assert made == kept
    before = kept.stat()
    assert cpu_kernels._library(folder) == kept
    assert (kept.stat().st_ino, kept.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)

    monkeypatch.setenv("XDG_CACHE_HOME", str(kept))  # not a folder: nothing can be kept
    assert cpu_kernels._library(folder) == folder / kept.name
    assert (folder / kept.name).exists()
    assert list((tmp_path / "lat_optuna").iterdir()) == [kept]


@pytest.mark.skipif(not cpu_kernels.available() or platform.machine() != "x86_64", reason="it is about such processors")
@pytest.mark.skipif("MARCH" in os.environ, reason="it is inside of itself")
@pytest.mark.parametrize("march", ["x86-64-v3", "x86-64-v4", "cooperlake"])
def test_kernels_of_other_processors_do_the_same(march, tmp_path):
    needed = {"x86-64-v3": "avx2", "x86-64-v4": "avx512f", "cooperlake": "avx512_bf16"}[march]
    if f" {needed} " not in Path("/proc/cpuinfo").read_text():
        pytest.skip(f"this processor has no {needed}")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-q", __file__]
    environment = {**os.environ, "MARCH": march, "XDG_CACHE_HOME": str(tmp_path)}
    chosen = "(at_once and not long) or votes_are_those or choice_is_that"
    done = subprocess.run([*command, "-k", chosen], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((tmp_path / "lat_optuna").iterdir())) == 1


@pytest.mark.parametrize("trouble", ["no compiler", "no C++", "another system"])
def test_without_kernels_for_the_cpu_torch_does_the_work_and_the_log_says_why(trouble, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if trouble == "no compiler":
        monkeypatch.setattr(cpu_kernels, "COMPILERS", ("a-compiler-that-nobody-has",))
    elif trouble == "no C++":
        monkeypatch.setattr(cpu_kernels, "SOURCE", tmp_path / "bad.cpp")
        cpu_kernels.SOURCE.write_text("this is not C++")
    else:
        monkeypatch.setattr(cpu_kernels.sys, "platform", "win32")
    with caplog.at_level("INFO", "lat_optuna"):
        assert not cpu_kernels._loaded.__wrapped__()
    expected = "bad.cpp" if trouble == "no C++" and cpu_kernels.available() else "compilers"
    assert expected in caplog.text
    assert not (tmp_path / "lat_optuna").exists()


@pytest.mark.skipif(DEVICE == "cuda", reason="it is about CPUs")
def test_who_counts_operators_sees_all_of_them():
    query, key, value = projections(torch.float32)
    seen = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Seen():
        attend_and_choose(query, key, value, None, Keep(30))
    assert any("softmax" in name for name in seen)
    assert any("sort" in name for name in seen)
