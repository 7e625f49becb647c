import pytest
import torch

from vitrail.coders import Codes
from vitrail.metrics.sparsity import Sparsity


def test_counts_by_hand():
    # two images of three tokens (CLS first), four latents
    z = torch.zeros(2, 3, 4)
    z[0, 0, :3] = 1  # CLS: latents 0 1 2
    z[0, 1, 1] = 1  # patch: latent 1 again
    z[1, 2, 3] = 1  # the second image: one latent, once
    sparsity = Sparsity(d_sae=4, n_tokens=3, cls_token=0)
    sparsity.update(Codes.from_dense(z[:1].flatten(0, 1)))
    sparsity.update(Codes.from_dense(z[1:].flatten(0, 1)))
    measured = {name: m.value for name, m in sparsity.compute().items()}
    assert measured["l0_tokens"] == pytest.approx(5 / 6)
    assert measured["l0_cls"] == 1.5  # 3 and 0
    assert measured["l0_image_sum"] == 2.5  # 4 and 1
    assert measured["l0_image_unique"] == 2.0  # {0, 1, 2} and {3}
    assert measured["alive"] == 1.0


def test_without_a_cls_token_there_is_no_cls_column():
    sparsity = Sparsity(d_sae=4, n_tokens=2, cls_token=None)
    sparsity.update(Codes.from_dense(torch.tensor([[0.0, 1, 0, 0], [0, 0, 0, 0]])))
    measured = sparsity.compute()
    assert "l0_cls" not in measured
    assert measured["alive"].value == 0.25


def test_nothing_fires():
    sparsity = Sparsity(d_sae=4, n_tokens=2, cls_token=0)
    sparsity.update(Codes.from_dense(torch.zeros(6, 4)))
    assert {m.value for m in sparsity.compute().values()} == {0.0}
