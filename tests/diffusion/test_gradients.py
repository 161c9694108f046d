"""PCGrad and NashMTL against the authors' numbers, and the properties that define them."""

import numpy as np
import pytest
import torch
from golden import load
from hypothesis import given, settings
from hypothesis import strategies as st

from dtr_ray.diffusion.balancers import nash_weights, project_conflicting_gradients
from dtr_ray.diffusion.gradients import gram_matrix, projection_coefficients

quick = settings(derandomize=True, deadline=None, max_examples=150)
seeds = st.integers(0, 2**31)


def random_gradients(num: int, size: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, size, generator=generator, dtype=torch.float64)


def projected_one_by_one(gradients: torch.Tensor, orders: torch.Tensor) -> torch.Tensor:
    """PCGrad as its algorithm is written down, on the gradients themselves."""
    found = gradients.clone()
    for i, order in enumerate(orders.tolist()):
        for j in order:
            product = found[i] @ gradients[j]
            if product < 0:
                found[i] -= product / gradients[j].square().sum() * gradients[j]
    return found


@pytest.mark.parametrize("case", ["pc0", "pc1", "pc2", "pc3"])
@pytest.mark.parametrize(("name", "order"), [("order0", [0, 1, 2, 3]), ("order1", [3, 2, 1, 0])])
def test_projected_gradients_equal_the_authors(case: str, name: str, order: list[int]):
    arrays, _ = load("mtl")
    gradients, orders = arrays[f"{case}_grads"], torch.tensor([order] * 4)
    expected = arrays[f"{case}_{name}_sum"]
    found = project_conflicting_gradients(gradients, [order] * 4)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert torch.equal(found, project_conflicting_gradients(gradients, orders))
    coefficients = projection_coefficients(gram_matrix(gradients), orders)
    single = coefficients @ gradients.double()
    torch.testing.assert_close(single, arrays[f"{case}_{name}_projected_f64"].double(), rtol=0, atol=1e-5)


def test_a_gradient_that_does_not_meet_itself_is_another_one_where_the_authors_data_shows_it():
    arrays, _ = load("mtl")
    others = [[j for j in range(4) if j != i] for i in range(4)]
    found = project_conflicting_gradients(arrays["pc3_grads"], others)
    difference = (found - arrays["pc3_order0_sum"]).abs().max().item()
    assert difference == pytest.approx(0.438, abs=1e-3)


@quick
@given(st.integers(1, 8), st.integers(1, 12), seeds)
def test_projections_follow_the_algorithm_in_any_order(num: int, size: int, seed: int):
    gradients = random_gradients(num, size, seed)
    orders = torch.rand(num, num, generator=torch.Generator().manual_seed(seed)).argsort(1)
    coefficients = projection_coefficients(gram_matrix(gradients), orders)
    # A product of about 0 may be negative for one and not for the other: then hardly anything is lost.
    torch.testing.assert_close(
        coefficients @ gradients, projected_one_by_one(gradients, orders), rtol=1e-7, atol=1e-7
    )


@quick
@given(st.integers(2, 30), seeds)
def test_of_two_gradients_none_is_left_that_conflicts(size: int, seed: int):
    gradients = random_gradients(2, size, seed)
    orders = torch.tensor([[0, 1], [1, 0]])
    gram = gram_matrix(gradients)
    first, second = projection_coefficients(gram, orders) @ gradients
    scale = gram.diagonal().max().item()
    assert (first @ gradients[1]).item() >= -1e-12 * scale
    assert (second @ gradients[0]).item() >= -1e-12 * scale
    total = project_conflicting_gradients(gradients, orders)
    assert (gradients @ total >= -1e-12 * scale).all()


@quick
@given(st.integers(1, 8), seeds)
def test_gradients_without_conflict_are_left_as_they_are(num: int, seed: int):
    gradients = random_gradients(num, 20, seed).abs()
    orders = torch.arange(num).expand(num, num)
    assert torch.equal(projection_coefficients(gram_matrix(gradients), orders), torch.eye(num).double())


def test_a_gradient_of_zeros_changes_nothing():
    gradients = torch.tensor([[1.0, 0.0], [0.0, 0.0], [-1.0, 1.0]])
    orders = [[0, 1, 2]] * 3
    expected = project_conflicting_gradients(gradients[[0, 2]], [[0, 1]] * 2)
    torch.testing.assert_close(project_conflicting_gradients(gradients, orders), expected)


def test_gradients_that_are_not_finite_show_in_the_sum():
    gradients = torch.tensor([[1.0, 0.0], [torch.nan, 1.0]])
    assert project_conflicting_gradients(gradients, [[0, 1]] * 2).isnan().any()


@pytest.mark.parametrize("orders", [[[0, 1]], [[0, 2], [0, 1]], [[-1, 0], [0, 1]], [0, 2], 1])
def test_orders_that_are_none_are_refused(orders: object):
    with pytest.raises(ValueError, match="orders"):
        project_conflicting_gradients(torch.ones(2, 3), orders)


def test_gradients_that_are_no_matrix_are_refused():
    with pytest.raises(ValueError, match=r"gradients are of shape \(3,\)"):
        project_conflicting_gradients(torch.ones(3), [[0]])


@pytest.mark.parametrize("size", [1, 1 << 12, (1 << 12) + 1, 40_000])
def test_dot_products_are_exact_to_float64(size: int):
    gradients = random_gradients(3, size, 0).float()
    exact = gradients.double() @ gradients.double().T
    torch.testing.assert_close(gram_matrix(gradients), exact, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("case", ["nash0", "nash1", "nash2"])
def test_bargaining_weights_equal_the_exact_ones(case: str):
    arrays, _ = load("mtl")
    expected = arrays[f"{case}_alpha_newton"]
    found = nash_weights(arrays[f"{case}_GTG"])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    if case != "nash1":  # where the authors' solver gives up and returns ones
        torch.testing.assert_close(found, arrays[f"{case}_alpha_official_normalised"], rtol=1e-6, atol=0)
    of_array = nash_weights(arrays[f"{case}_GTG"].numpy())
    assert isinstance(of_array, np.ndarray)
    assert np.array_equal(of_array, found.numpy())


@quick
@given(st.integers(1, 16), st.floats(0, 8), st.floats(0, 6), seeds)
def test_weights_solve_the_bargain_of_any_positive_definite_matrix(
    size: int, condition: float, scales: float, seed: int
):
    generator = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(generator.standard_normal((size, size)))
    gram = (basis * np.logspace(0, -condition, size)) @ basis.T
    scale = 10 ** generator.uniform(-scales, scales, size)
    gram = gram * scale * scale[:, None]
    weights = nash_weights((gram + gram.T) / 2)
    assert (weights > 0).all()
    np.testing.assert_allclose(gram @ weights, 1 / weights, rtol=1e-6)


@quick
@given(st.integers(1, 6), st.integers(1, 4), seeds)
def test_weights_of_gradients_that_depend_on_one_another_are_finite(num: int, size: int, seed: int):
    """K gradients in few dimensions, of small whole numbers: zeros, copies and exact opposites are common."""
    gradients = torch.randint(-2, 3, (num, size), generator=torch.Generator().manual_seed(seed)).double()
    weights = nash_weights(gradients @ gradients.T)
    assert weights.isfinite().all()
    assert (weights > 0).all()
    # The bargain improves all whose gradients can be improved together, and harms none.
    gains = gradients @ (weights @ gradients)
    assert (gains >= -1e-3 * gradients.norm(dim=1)).all()


def test_weights_without_a_bargain_are_the_documented_ones():
    zeros = nash_weights(torch.zeros(3, 3))
    assert zeros.tolist() == [1, 1, 1]
    with_zero = nash_weights(torch.diag(torch.tensor([4.0, 0.0, 1.0])))
    torch.testing.assert_close(with_zero, torch.tensor([0.5, 0.75, 1.0]).double())
    opposites = torch.tensor([[2.0, 0.0], [-1.0, 0.0]])
    weights = nash_weights(opposites @ opposites.T)
    torch.testing.assert_close(weights, torch.tensor([0.5e4, 1e4]).double(), rtol=1e-6, atol=0)
    same = nash_weights(torch.ones(4, 4))
    torch.testing.assert_close(same, torch.full((4,), 0.5).double())


@pytest.mark.parametrize(
    ("gram", "message"),
    [
        (np.ones((2, 3)), r"shape \(2, 3\): it must be square"),
        (np.array([[1.0, np.nan], [np.nan, 1.0]]), "not finite"),
        (np.array([[1.0, 2.0], [2.0, 1.0]]), "not positive semi-definite"),
    ],
)
def test_matrices_that_are_no_gram_matrix_are_refused(gram: np.ndarray, message: str):
    with pytest.raises(ValueError, match=message):
        nash_weights(gram)


def test_arrays_give_arrays_and_one_order_serves_all() -> None:
    gradients = np.random.default_rng(0).standard_normal((4, 9)).astype(np.float32)
    order = [2, 0, 3, 1]
    found = project_conflicting_gradients(gradients, order)
    expected = project_conflicting_gradients(torch.from_numpy(gradients), [order] * 4)
    assert isinstance(found, np.ndarray)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected.numpy())
