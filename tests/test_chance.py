"""Noise that privacy rests on: of the right shape, and never the same again."""

from __future__ import annotations

import torch

from fanbu.chance import Chance


def test_noise_is_gaussian_and_fresh_each_time() -> None:
    chance, like = Chance(), torch.zeros(200, 500)
    one, two, other = chance.normal(like, 2.0), chance.normal(like, 2.0), Chance().normal(like, 2.0)
    assert one.shape == like.shape
    assert one.dtype == torch.float32
    assert abs(float(one.mean())) < 0.04
    assert abs(float(one.std()) - 2.0) < 0.03
    assert abs(float((one.abs() < 2.0).double().mean()) - 0.6827) < 0.01
    for again in (two, other):
        assert not (again == one).any()
        assert abs(float(torch.corrcoef(torch.stack([one.flatten(), again.flatten()]))[0, 1])) < 0.02
    u = chance.uniform(10_000)
    assert 0 < float(u.min()) < 0.01
    assert 0.99 < float(u.max()) < 1
    assert len(u.unique()) == 10_000
