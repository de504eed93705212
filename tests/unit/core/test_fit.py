import random

import pytest

from galvatron.core.fit import fit_line, residual

MIB = 2**20


def test_known_line_is_recovered_exactly():
    samples = [(4096 * 4**i, 3e-5 + 4096 * 4**i * 2e-10) for i in range(8)]
    line = fit_line(samples)
    assert line == pytest.approx((3e-5, 2e-10), rel=1e-6)
    assert residual(line, samples) < 1e-6


def test_noise_of_ten_percent_moves_both_coefficients_little():
    noise = random.Random(0)
    samples = [(4096 * 4**i, (3e-5 + 4096 * 4**i * 2e-10) * noise.uniform(0.9, 1.1)) for i in range(9)]
    line = fit_line(samples)
    assert line == pytest.approx((3e-5, 2e-10), rel=0.15)
    assert 0 < residual(line, samples) < 0.1


def test_no_nearby_line_fits_better():
    samples = [(4096, 1e-3), (65536, 1.4e-3), (2**20, 2e-3), (2**24, 3e-2)]

    def cost(line):
        return sum(((line[0] + line[1] * b) / t - 1) ** 2 for b, t in samples)

    best = fit_line(samples)
    for factor in (0.99, 1.01):
        assert cost(best) < cost((best[0] * factor, best[1]))
        assert cost(best) < cost((best[0], best[1] * factor))


def test_one_sample_is_fitted():
    assert residual(fit_line([(4096, 1e-4)]), [(4096, 1e-4)]) < 1e-9


@pytest.mark.parametrize(
    ("samples", "line"),
    [
        (((MIB, 3.0), (2 * MIB, 5.0)), (1.0, 2.0 / MIB)),
        (((MIB, 1.0), (2 * MIB, 3.0)), (0.0, 15 / 13 / MIB)),
        (((MIB, 3.0), (2 * MIB, 1.0)), (1.2, 0.0)),
    ],
)
def test_a_fitted_line_is_never_negative(samples: tuple[tuple[int, float], ...], line: tuple[float, float]) -> None:
    assert fit_line(samples) == pytest.approx(line)
