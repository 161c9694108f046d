"""Count-sketches keep angles, to the error that they state."""

import pytest
import torch

from dtr_ray.analysis.sketch import Sketch


def pair(num_values: int, cosine: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two random vectors whose cosine is exactly `cosine`."""
    generator = torch.Generator().manual_seed(seed)
    a, noise = torch.randn(2, num_values, generator=generator, dtype=torch.float64)
    noise -= noise @ a / (a @ a) * a
    b = cosine * a / a.norm() + (1 - cosine**2) ** 0.5 * noise / noise.norm()
    return a, b


def cosine_of(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0))


@pytest.mark.parametrize("cosine", [0.0, -0.5, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("size", [64, 512])
def test_the_error_of_a_cosine_is_the_stated_one(cosine: float, size: int):
    a, b = pair(8000, cosine, seed=1)
    errors = []
    for key in range(200):
        sketch = Sketch(8000, size, key)
        errors.append(cosine_of(sketch([a]), sketch([b])) - cosine)
    found = torch.tensor(errors)
    stated = (1 - cosine**2) / size**0.5
    # 200 draws tell a standard error to about 5 percent.
    assert 0.8 * stated < found.square().mean().sqrt() < 1.25 * stated
    # The mean is off by no more than its own error, and a bias of the order of 1 / D.
    assert abs(found.mean()) < 4 * stated / 200**0.5 + 2 / size


def test_parts_are_one_vector():
    vector = torch.randn(600, generator=torch.Generator().manual_seed(0))
    sketch = Sketch(600, 50, 3, 4)
    parts = [vector[:100].view(10, 10), vector[100:101].view(()), vector[101:]]
    assert torch.equal(sketch(parts), sketch([vector]))
    assert sketch([vector]).shape == (50,)


def test_a_sketch_is_linear_and_each_number_goes_to_one_place():
    sketch = Sketch(600, 50, 7)
    a, b = torch.randint(-9, 9, (2, 600), generator=torch.Generator().manual_seed(1)).float()
    assert torch.equal(sketch([a + 2 * b]), sketch([a]) + 2 * sketch([b]))
    one = torch.zeros(600)
    one[123] = 5
    assert sketch([one]).abs().sort().values[-2:].tolist() == [0, 5]


def test_short_vectors_are_kept_as_they_are():
    vector = torch.randn(50)
    assert torch.equal(Sketch(50, 50, 0)([vector[:20].view(4, 5), vector[20:]]), vector)


def test_the_key_alone_decides_the_places():
    vector = torch.randn(600, generator=torch.Generator().manual_seed(0))
    same, again, other = (Sketch(600, 50, *key)([vector]) for key in ((1, 2), (1, 2), (1, 3)))
    assert torch.equal(same, again)
    assert not torch.equal(same, other)


def test_another_number_of_values_is_no_vector_of_the_sketch():
    with pytest.raises((AssertionError, RuntimeError)):
        Sketch(600, 50, 0)([torch.zeros(599)])
