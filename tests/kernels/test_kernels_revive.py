"""AuxK on packed dead rows: its loss, its gradient, and which features it takes."""

from __future__ import annotations

import pytest
import torch

from saelab_kernels.revive import aux_dead, aux_loss, packed, reference

SHAPES = [(1, 1, 1, 1, 1), (7, 5, 33, 4, 2), (33, 16, 129, 129, 8), (20, 9, 70, 30, 30), (12, 6, 40, 25, 100)]


def problem(n_tokens: int, width: int, n_features: int, n_dead: int, dtype: torch.dtype = torch.float64):
    """rows, residual, centred, W_enc, b_enc, W_dec"""
    rows = torch.randperm(n_features)[:n_dead]
    residual, centred = torch.randn(2, n_tokens, width, dtype=dtype)
    W_enc, W_dec = torch.randn(2, n_features, width, dtype=dtype)
    return rows, residual, centred, W_enc, 0.1 * torch.randn(n_features, dtype=dtype), W_dec


def test_the_loss_by_hand():
    acts, residual = torch.tensor([[4.0, 1.0], [0.0, 2.0]]), torch.tensor([[2.0, 1.0], [0.0, 3.0]])
    W_enc = torch.tensor([[9.0, 9.0], [1.0, 0.0], [0.0, 1.0]])
    W_dec = torch.tensor([[9.0, 9.0], [0.5, 0.0], [0.0, 0.5]])
    rows = torch.tensor([1, 2])
    # both: recon (2, 0.5) and (0, 1), errors 0.25 and 4; the larger alone: (2, 0) and (0, 1), 1 and 4; variance 4
    assert aux_dead(rows, residual, acts, W_enc, torch.zeros(3), W_dec, 2).loss.item() == pytest.approx(4.25 / 4)
    assert aux_dead(rows, residual, acts, W_enc, torch.zeros(3), W_dec, 1).loss.item() == pytest.approx(5 / 4)


def test_features_that_reconstruct_the_residual_leave_nothing_and_silent_ones_all_of_it():
    residual = torch.rand(5, 4, dtype=torch.bfloat16).float()  # products of any precision are exact
    eye, rows = torch.eye(4), torch.arange(4)
    assert aux_dead(rows, residual, residual, eye, torch.zeros(4), eye, 4).loss.item() == pytest.approx(0.0, abs=1e-12)
    centred = residual - residual.mean(0)
    silent = aux_dead(rows, centred, residual, eye, torch.full((4,), -100.0), eye, 4)
    assert silent.loss.item() == pytest.approx(1.0)
    assert not silent.W_enc_grad.any()
    assert not silent.W_dec_grad.any()


@pytest.mark.parametrize(("n_tokens", "width", "n_features", "n_dead", "k_aux"), SHAPES)
def test_loss_and_gradient_agree_with_autograd_of_the_definition(n_tokens, width, n_features, n_dead, k_aux):
    inputs = problem(n_tokens, width, n_features, n_dead)
    expected = reference.aux_dead(*inputs, k_aux)
    found = aux_dead(*inputs, k_aux)
    assert torch.equal(found.rows, inputs[0])
    for actual, wanted in zip((found.loss, *found[2:]), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("k_aux", [3, 30])
def test_the_gradient_agrees_with_finite_differences(k_aux):
    rows, residual, centred, *weights = problem(6, 4, 20, 8)
    weights = [weight.requires_grad_() for weight in weights]

    def loss(W_enc, b_enc, W_dec):
        return aux_loss(rows, residual, centred, W_enc, b_enc, W_dec, k_aux)

    assert torch.autograd.gradcheck(loss, weights)


@pytest.mark.parametrize(("units", "loss_error", "grad_error"), [(False, 1e-6, 1e-5), (True, 1e-3, 1e-2)])
def test_float32_weights_give_the_precision_of_the_devices_products(
    units, loss_error, grad_error, relative_rms, monkeypatch
):
    monkeypatch.setattr(packed.dispatch, "bfloat16_units", lambda _: units)
    inputs = problem(200, 48, 300, 120)
    low = [tensor.float() if tensor.is_floating_point() else tensor for tensor in inputs]
    wide = [tensor.double() if tensor.is_floating_point() else tensor for tensor in low]
    found, expected = aux_dead(*low, 24), reference.aux_dead(*wide, 24)
    assert relative_rms(found.loss, expected[0]) < loss_error
    for actual, wanted in zip(found[2:], expected[1:], strict=True):
        assert actual.dtype == torch.float32
        assert relative_rms(actual, wanted) < grad_error


@pytest.mark.parametrize("asked", ["auto", "reference"])
def test_the_differentiable_loss_has_the_packed_gradient_at_the_dead_rows_and_none_elsewhere(asked, monkeypatch):
    monkeypatch.setenv("SAELAB_KERNELS", asked)
    rows, residual, centred, *weights = problem(20, 8, 50, 15)
    weights = [weight.requires_grad_() for weight in weights]
    (3 * aux_loss(rows, residual, centred, *weights, 6)).backward()
    found = aux_dead(rows, residual, centred, *weights, 6)
    for weight, packed_grad in zip(weights, found[2:], strict=True):
        assert not packed_grad.requires_grad
        torch.testing.assert_close(weight.grad[rows], 3 * packed_grad)
        weight.grad[rows] = 0
        assert not weight.grad.any()


def test_it_keeps_the_dtype_of_the_weights_and_takes_the_activations_for_constants():
    rows, residual, centred, *weights = problem(20, 8, 50, 15, dtype=torch.bfloat16)
    weights = [weight.requires_grad_() for weight in weights]
    centred.requires_grad_()
    loss = aux_loss(rows, residual, centred, *weights, 6)
    assert loss.dtype == torch.float32
    loss.backward()
    assert [weight.grad.dtype for weight in weights] == [torch.bfloat16] * 3
    assert centred.grad is None
    assert aux_dead(rows, residual, centred, *weights, 6).W_enc_grad.dtype == torch.float32


@pytest.mark.parametrize("k", [1, 2, 5, 29, 30, 31])
@pytest.mark.parametrize("ties", [False, True])
def test_as_many_features_stay_as_asked_and_equal_ones_by_their_place(k, ties):
    values = torch.randn(40, 30)
    if ties:
        values = (2 * values).round()
    kept = values.clone()
    packed.keep_largest_(kept, k)
    wanted = reference.largest(values, min(k, 30))
    expected = torch.zeros_like(values).scatter(1, wanted, values.gather(1, wanted)).relu()
    assert torch.equal(kept, expected)


def test_nan_is_not_hidden():
    rows, residual, centred, *weights = problem(20, 8, 50, 15)
    centred[3, 2] = float("nan")
    assert aux_dead(rows, residual, centred, *weights, 6).loss.isnan()
    rows, residual, centred, *weights = problem(20, 8, 50, 15)
    weights[0][rows[4], 1] = -float("nan")
    assert aux_dead(rows, residual, centred, *weights, 6).loss.isnan()


def test_no_tokens_or_no_dead_features_cost_nothing():
    rows, residual, centred, *weights = problem(0, 8, 50, 15)
    empty = aux_dead(rows, residual, centred, *weights, 6)
    assert empty.loss.item() == 0
    assert not empty.W_dec_grad.any()
    rows, residual, centred, *weights = problem(20, 8, 50, 0)
    assert aux_dead(rows, residual, centred, *weights, 6).W_enc_grad.shape == (0, 8)


def test_a_perfect_reconstruction_without_variance_is_zero_not_nan():
    rows, residual, centred, *weights = problem(20, 8, 50, 15)
    weights[1] -= 100
    found = aux_dead(rows, torch.zeros_like(residual), centred, *weights, 6)
    assert found.loss.item() == 0
    assert not found.W_enc_grad.isnan().any()


def test_two_runs_are_bitwise_equal():
    inputs = problem(200, 48, 300, 120, dtype=torch.float32)
    for first, second in zip(aux_dead(*inputs, 24), aux_dead(*inputs, 24), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("replaced", "error", "sentence"),
    [
        ({0: torch.tensor([0, 50])}, ValueError, r"rows must lie in 0..49, got 0..50"),
        ({0: torch.tensor([-1])}, ValueError, r"got -1..-1"),
        ({0: torch.tensor([1], dtype=torch.int32)}, TypeError, "rows must be int64"),
        ({0: torch.tensor([[1]])}, ValueError, r"rows must have shape \[n_dead\]"),
        ({1: torch.ones(3, 8)}, ValueError, r"residual must have shape \[20, 8\], got \[3, 8\]"),
        ({2: torch.ones(20, 9)}, ValueError, r"centred must have shape \[any, 8\]"),
        ({4: torch.ones(3)}, ValueError, r"b_enc must have shape \[50\]"),
        ({5: torch.ones(50, 9)}, ValueError, r"W_dec must have shape \[50, 8\]"),
        ({6: 0}, ValueError, "k_aux must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named(replaced, error, sentence):
    inputs = [*problem(20, 8, 50, 15), 6]
    for place, value in replaced.items():
        inputs[place] = value
    for function in (aux_dead, aux_loss):
        with pytest.raises(error, match=sentence):
            function(*inputs)
