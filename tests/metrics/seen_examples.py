"""Small passes: a fitted coder, a grid, and what a metric is shown."""

import torch

from vitrail.backbones.grid import Grid
from vitrail.coders import TopK
from vitrail.coders.sparse import Codes
from vitrail.coders.transcoder import Transcoder
from vitrail.metrics.passing import Seen, Setting
from vitrail.statistics import ActivationStats


def grid_of(height: int, width: int, n_cls: int = 1) -> Grid:
    return Grid(height=height, width=width, patch_px=4, image_px=(4 * height, 4 * width), n_cls=n_cls, n_registers=0)


def setting_of(coder, *, n_tokens=1, grid=None, cls_token=None, patches=None, n_images=100, shift=None, tokens="all"):
    return Setting(
        coder=coder,
        n_tokens=n_tokens,
        tokens=tokens,
        grid=grid_of(3, 3) if grid is None else grid,
        cls_token=cls_token,
        patches=patches,
        n_images=n_images,
        shift=torch.zeros(coder.d_out) if shift is None else shift,
    )


@torch.no_grad()
def seen_by(coder, x, target=None, labels=None) -> Seen:
    """`x`: (b, t, d_in)."""
    flat = x.flatten(0, 1)
    codes = coder.encode_sparse(flat)
    x_hat = coder.decode_sparse(codes, like=flat) if isinstance(coder, Transcoder) else coder.decode_sparse(codes)
    target = x if target is None else target
    return Seen(x=x, target=target, codes=codes, x_hat=x_hat.reshape(target.shape), labels=labels)


def seen_codes(z, n_tokens: int = 1) -> Seen:
    """Dense codes of images; what they code is of no concern."""
    rows = torch.zeros(len(z) // n_tokens, n_tokens, 2)
    return Seen(x=rows, target=rows, codes=Codes.from_dense(z), x_hat=rows)


def coder_of(d_sae: int, d_in: int = 2, **arguments) -> TopK:
    coder = TopK(d_in=d_in, d_sae=d_sae, **{"k": min(2, d_sae), "normalization": "none", **arguments})
    if not coder.is_fitted:
        x = torch.randn(64, d_in, generator=torch.Generator().manual_seed(0)) * 2 + 3
        coder.fit(ActivationStats.of(x), x)
    return coder.eval()


def values(measured) -> dict[str, float]:
    return {name: each.value for name, each in measured.items()}


def same_in_two_batches(metric, whole: Seen, parts: list[Seen], n_bootstrap: int = 20) -> None:
    """`metric`: makes a new one."""
    once, twice = metric(), metric()
    once.update(whole)
    for part in parts:
        twice.update(part)
    a, b = once.compute(n_bootstrap=n_bootstrap), twice.compute(n_bootstrap=n_bootstrap)
    assert a.keys() == b.keys()
    for name in a:
        for field in ("value", "low", "high"):
            x, y = getattr(a[name], field), getattr(b[name], field)
            assert (x is None) == (y is None)
            torch.testing.assert_close(
                torch.tensor(float("nan") if x is None else x),
                torch.tensor(float("nan") if y is None else y),
                equal_nan=True,
                msg=lambda text, name=name: f"{name}: {text}",
            )
        assert a[name].n == b[name].n
    for name, curve in once.curves().items():
        other = twice.curves()[name]
        assert len(curve) == len(other)
        for row, same in zip(curve, other, strict=True):
            assert row.keys() == same.keys()
            for key in row:
                if isinstance(row[key], float):
                    torch.testing.assert_close(torch.tensor(row[key]), torch.tensor(same[key]), equal_nan=True)
                else:
                    assert row[key] == same[key]
