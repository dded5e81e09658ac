"""Muon against torch's own, matrix by matrix."""

import pytest
import torch

from engine.train.muon import Muon, orthogonalize

SHAPES = [(24, 16), (16, 24), (16, 16), (24, 16)]


def matrices(seed):
    g = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=g)) for shape in SHAPES]


def named(params):
    return {str(i): p for i, p in enumerate(params)}


def test_steps_equal_those_of_torch():
    ours, theirs = matrices(0), matrices(0)
    settings = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9}
    a, b = Muon(named(ours), **settings), torch.optim.Muon(theirs, **settings)
    a.found_inf = torch.zeros(())
    for step in range(4):
        for p, q, g in zip(ours, theirs, matrices(1 + step), strict=True):
            p.grad, q.grad = g.detach().clone(), g.detach().clone()
        before = [p.detach().clone() for p in ours]
        a.step()
        b.step()
        moved = max((p - was).norm() for p, was in zip(ours, before, strict=True))
        # Newton-Schulz in bf16 (eps 2^-8) rounds in another order; an update is 1% of this
        for p, q in zip(ours, theirs, strict=True):
            assert (p - q).norm() < 0.02 * moved * (1 + step)


@pytest.mark.parametrize("rows,columns", [(40, 16), (16, 40), (32, 32)])
def test_orthogonalised_matrices_have_singular_values_near_one(rows, columns):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, rows, columns, generator=g) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    core = u.mT @ orthogonalize(x).float() @ vh.mT  # the same singular vectors, values near one
    found = core.diagonal(dim1=1, dim2=2)
    assert ((found > 0.6) | (s < 0.05 * s[:, :1])).all() and (found < 1.3).all()
    assert (core - torch.diag_embed(found)).abs().max() < 0.05


def test_scratch_is_bounded_by_cutting_a_shape_into_batches(monkeypatch):
    whole, cut = matrices(0), matrices(0)
    for limit, params in ((2**24, whole), (24 * 16, cut)):
        monkeypatch.setattr("engine.train.muon.BATCH_ELEMENTS", limit)
        optimizer = Muon(named(params), lr=0.1, weight_decay=0.0)
        optimizer.found_inf = torch.zeros(())
        for p, g in zip(params, matrices(5), strict=True):
            p.grad = g.detach()
        optimizer.step()
    for p, q in zip(whole, cut, strict=True):
        torch.testing.assert_close(p, q, atol=2e-3, rtol=0)
