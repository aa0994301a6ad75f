"""Counter-based noise: uniform, the same on host and device, and a function of the token alone."""

from __future__ import annotations

import numpy as np
import torch

from zoo import noise


def keys(seed: int, rows: np.ndarray, columns: int) -> torch.Tensor:
    return torch.from_numpy(noise.token_keys(seed, rows, columns))


def test_host_and_tensor_mix_alike():
    drawn = np.random.default_rng(0).integers(0, 2**32, 10_000)
    value = np.concatenate([np.arange(1000), 2**32 - 1 - np.arange(1000), drawn]).astype(np.uint32)
    tensor = noise._mix(torch.from_numpy(value.view(np.int32)))
    assert np.array_equal(tensor.numpy().view(np.uint32), noise.hash32(value))
    assert len(np.unique(noise.hash32(np.arange(200_000, dtype=np.uint32)))) == 200_000  # a bijection


def test_uniform_is_uniform_in_the_open_interval():
    u = noise.uniform(keys(0, np.arange(64), 64), noise.salt("layers.0", 3), 32).double()
    assert 0 < float(u.min()) < 1e-4 and 1 - 1e-4 < float(u.max()) < 1
    assert abs(float(u.mean()) - 1 / 2) < 3e-3 and abs(float(u.var()) - 1 / 12) < 1e-3
    histogram = torch.histc(u, 16, 0, 1) / u.numel()
    assert float((histogram - 1 / 16).abs().max()) < 2e-3
    flat = u.reshape(-1, 32)
    correlation = torch.corrcoef(flat.T) - torch.eye(32)
    assert float(correlation.abs().max()) < 0.08  # 4096 tokens: 1/64 a standard deviation


def test_the_largest_number_is_below_one():
    """Its logarithm is asked for."""
    assert float(noise.uniform(torch.tensor([15340575], dtype=torch.int32), 0, 1)) == 1 - 2**-24


def test_neighbours_in_every_coordinate_are_independent():
    base = noise.uniform(keys(0, np.arange(32), 32), noise.salt("a", 0), 8).reshape(-1)
    others = {
        "seed": noise.uniform(keys(1, np.arange(32), 32), noise.salt("a", 0), 8),
        "row": noise.uniform(keys(0, np.arange(1, 33), 32), noise.salt("a", 0), 8),
        "far row": noise.uniform(keys(0, np.arange(32) + 2**32, 32), noise.salt("a", 0), 8),
        "name": noise.uniform(keys(0, np.arange(32), 32), noise.salt("b", 0), 8),
        "step": noise.uniform(keys(0, np.arange(32), 32), noise.salt("a", 1), 8),
    }
    for name, other in others.items():
        assert abs(float(torch.corrcoef(torch.stack([base, other.reshape(-1)]))[0, 1])) < 0.05, name


def test_keys_of_a_row_do_not_depend_on_the_rows_beside_it():
    whole = noise.token_keys(7, np.arange(100, 108), 33)
    parts = [noise.token_keys(7, np.arange(start, start + 2), 33) for start in (100, 102, 104, 106)]
    assert np.array_equal(whole, np.concatenate(parts))
    assert np.array_equal(whole[:, :20], noise.token_keys(7, np.arange(100, 108), 20))
    assert len(np.unique(noise.token_keys(7, np.arange(256), 256))) > 65_500  # of 65 536: 32 bits hardly ever collide


def test_dropout_keeps_the_expectation_and_is_a_function_of_the_key():
    key, salt = keys(0, np.arange(64), 64), noise.salt("layers.0.mixer", 5)
    x = torch.ones(64, 64, 16)
    y = noise.dropout(x, 0.25, key, salt)
    assert set(y.unique().tolist()) == {0.0, float(torch.tensor(1 / 0.75))}
    assert abs(float(y.mean()) - 1) < 0.01
    assert torch.equal(y[3:9, 5:20], noise.dropout(x[3:9, 5:20], 0.25, key[3:9, 5:20], salt))
    assert noise.dropout(x, 0.0, key, salt) is x


def test_normal_is_normal_in_every_number():
    key, salt = keys(0, np.arange(64), 64), noise.salt("objective", 3)
    drawn = noise.normal(key, salt, 33).double()
    assert drawn.shape == (64, 64, 33) and bool(drawn.isfinite().all())
    flat = drawn.reshape(-1, 33)
    assert float(flat.mean(0).abs().max()) < 0.06 and float((flat.std(0) - 1).abs().max()) < 0.05
    assert float((torch.corrcoef(flat.T) - torch.eye(33)).abs().max()) < 0.08
    assert float((torch.corrcoef(flat.square().T) - torch.eye(33)).abs().max()) < 0.08, "nor do pairs share a size"
    inside = [float((flat.abs() < bound).double().mean()) for bound in (1, 2, 3)]
    np.testing.assert_allclose(inside, [0.6827, 0.9545, 0.9973], atol=3e-3)
    assert torch.equal(noise.normal(key[3:9, 5:20], salt, 33), noise.normal(key, salt, 33)[3:9, 5:20])
