"""What a linear classifier makes of a reconstruction: KL of its probabilities, agreement, accuracy.

    p(x) = softmax(W u(x) + b),   u(x) = (x - mean) / ||x - mean||
    lp_kl             mean over images of sum_c p(x)_c log(p(x)_c / p(x_hat)_c), in nats
    lp_agreement      share of images where argmax p(x_hat) = argmax p(x)
    lp_accuracy       share of images where argmax p(x) is the label
    recon_lp_accuracy the same of p(x_hat)

and `lp_kl_std`, `lp_agreement_std`: standard deviations over images, as in MSAE's tables (which print KL times 10^6).

Range. lp_kl from 0 (the same probabilities) upwards, in nats; shares in 0..1.

Moves with. How sure the probe is of anything: with few training rows, few epochs or many classes its probabilities stay
near uniform, and KL is small for any reconstruction. Compare KL under one probe only, and read it beside
lp_accuracy. The mean: without centring, rows of one embedding cloud are nearly parallel.

Does not show. Accuracy, in what MSAE prints as "LP (Acc)": that is agreement with the probe itself, right or wrong.

Source. MSAE section 4.1 and its linear_eval.py; SPEC rows 52 and 53. As there: AdamW at 1e-3, batches of 256,
ReduceLROnPlateau (factor 0.5, patience 5) on macro F1, at most 100 epochs, patience 5, and centred rows (its data
set's normalisation) of length 1, so that one probe serves every coder that was fitted on the same rows. Otherwise:
epochs are judged on a tenth of the *training* rows, where the code takes the rows it then measures on; and the best
epoch's weights are kept, where the code keeps a reference, which is the last epoch's. The two patiences are equal, so
that training stops before the rate is ever lowered, there as here.

Tags. "centred-l2" (MSAE's code); "l2" with centre=False, which is how its text reads. The probe reads what the coder
writes, one row an image: an image embedding, CLS or pooled rows.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitrail.metrics.measured import Measured, over_images
from vitrail.metrics.passing import Metric, Seen, Setting


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """Fitted once, handed to the metric of every coder at the point."""

    weight: Float[Tensor, "n_classes d"]
    bias: Float[Tensor, " n_classes"]
    mean: Float[Tensor, " d"]  # zeros where rows are not centred
    centre: bool
    n_epochs: int
    validation_f1: float
    n_rows: int

    def log_probabilities(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n n_classes"]:
        if x.shape[1] != self.weight.shape[1]:
            raise ValueError(f"this probe was fitted on rows of {self.weight.shape[1]} dimensions, got {x.shape[1]}.")
        u = unit_rows(x.float(), self.mean.to(x.device))
        logits = u.double() @ self.weight.double().to(x.device).t() + self.bias.double().to(x.device)
        return logits.log_softmax(1)


def unit_rows(x: Float[Tensor, "n d"], mean: Float[Tensor, " d"]) -> Float[Tensor, "n d"]:
    return torch.nn.functional.normalize(x - mean, dim=1)


def fit_linear_probe(
    x: Float[Tensor, "n d"],
    labels: Int[Tensor, " n_labels"],
    *,
    n_classes: int | None = None,
    centre: bool = True,
    lr: float = 1e-3,
    batch_size: int = 256,
    max_epochs: int = 100,
    patience: int = 5,
    validation_share: float = 0.1,
    seed: int = 0,
) -> LinearProbe:
    """On training rows, one an image. The same seed gives the same probe.

    Raises ValueError if rows and labels do not match, or there are too few of them to put some aside.
    """
    if len(x) != len(labels):
        raise ValueError(f"{len(x)} rows and {len(labels)} labels: there must be one label a row.")
    n_validation = max(1, round(len(x) * validation_share))
    if not 0 < validation_share < 1 or len(x) - n_validation < 1:
        raise ValueError(
            f"a probe needs rows to learn from and rows to judge epochs by: got {len(x)} rows and "
            f"validation_share={validation_share}."
        )
    n_classes = int(labels.max()) + 1 if n_classes is None else n_classes
    if int(labels.min()) < 0 or int(labels.max()) >= n_classes:
        raise ValueError(f"labels must be in 0..{n_classes - 1}, got {int(labels.min())}..{int(labels.max())}.")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator).to(x.device)
    learn, judge = order[n_validation:], order[:n_validation]
    x = x.float()
    mean = x.mean(0) if centre else torch.zeros_like(x[0])
    u = unit_rows(x, mean)
    layer = _layer(x.shape[1], n_classes, generator).to(x.device)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=lr)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", factor=0.5, patience=5)
    best, best_f1, since, n_epochs = _copied(layer), -1.0, 0, 0
    with torch.enable_grad():
        while n_epochs < max_epochs and since < patience:
            shuffled = learn[torch.randperm(len(learn), generator=generator).to(x.device)]
            for rows in shuffled.split(batch_size):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(layer(u[rows]), labels[rows]).backward()
                optimizer.step()
            f1 = macro_f1(layer(u[judge]).argmax(1), labels[judge], n_classes)
            scheduler.step(f1)
            n_epochs, since = n_epochs + 1, since + 1
            if f1 > best_f1:
                best, best_f1, since = _copied(layer), f1, 0
    weight, bias = best
    return LinearProbe(weight, bias, mean, centre, n_epochs, best_f1, len(x))


def macro_f1(predicted: Int[Tensor, " n"], labels: Int[Tensor, " n"], n_classes: int) -> float:
    """Mean over the classes that were given or predicted of 2 tp / (given + predicted)."""
    right = torch.bincount(labels[predicted == labels], minlength=n_classes).double()
    both = (torch.bincount(labels, minlength=n_classes) + torch.bincount(predicted, minlength=n_classes)).double()
    return float((2 * right / both)[both > 0].mean())


def _layer(d: int, n_classes: int, generator: torch.Generator) -> torch.nn.Linear:
    """torch.nn.Linear as it starts (uniform within 1 / sqrt(d)), from a generator of its own."""
    layer = torch.nn.utils.skip_init(torch.nn.Linear, d, n_classes)
    assert isinstance(layer, torch.nn.Linear)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_((torch.rand(parameter.shape, generator=generator) * 2 - 1) * d**-0.5)
    return layer


def _copied(layer: torch.nn.Linear) -> tuple[Tensor, Tensor]:
    return layer.weight.detach().clone(), layer.bias.detach().clone()


class ProbeAgreement(Metric):
    """Four numbers an image. Accuracies are left out where the images have no labels."""

    def __init__(self, setting: Setting, *, probe: LinearProbe) -> None:
        if setting.n_tokens != 1:
            raise ValueError(
                f"a linear probe reads one row an image, got {setting.n_tokens} (tokens={setting.tokens!r}). Use a "
                f"coder of image embeddings, of CLS tokens or of pooled rows."
            )
        if probe.weight.shape[1] != len(setting.shift):
            raise ValueError(
                f"the probe was fitted on rows of {probe.weight.shape[1]} dimensions; this coder writes "
                f"{len(setting.shift)}."
            )
        self._probe = probe
        self._columns: dict[str, list[Tensor]] = {}

    @torch.no_grad()
    def update(self, seen: Seen) -> None:
        log_p, log_q = (self._probe.log_probabilities(rows[:, 0]) for rows in (seen.target, seen.x_hat))
        clean, recon = log_p.argmax(1), log_q.argmax(1)
        columns = {"kl": kl_divergence(log_p, log_q), "same": (clean == recon).double()}
        if seen.labels is not None:
            labels = seen.labels.to(clean.device)
            columns |= {"right": (clean == labels).double(), "recon_right": (recon == labels).double()}
        for name, values in columns.items():
            self._columns.setdefault(name, []).append(values.cpu())

    def compute(self, *, n_bootstrap: int = 1000, seed: int = 0) -> dict[str, Measured]:
        if not self._columns:
            raise ValueError("no images were measured: there is nothing to report.")
        columns = {name: torch.cat(parts).numpy() for name, parts in self._columns.items()}
        given = {"n_bootstrap": n_bootstrap, "seed": seed, "definition": "centred-l2" if self._probe.centre else "l2"}
        out: dict[str, Measured] = {}
        for name, key in (
            ("kl", "lp_kl"),
            ("same", "lp_agreement"),
            ("right", "lp_accuracy"),
            ("recon_right", "recon_lp_accuracy"),
        ):
            if name not in columns:
                continue
            values = columns[name]
            sums = {"sum": values, "square": values**2, "n": values**0}
            out[key] = over_images(sums, lambda c: c["sum"] / c["n"], **given)
            if name in ("kl", "same"):
                out[f"{key}_std"] = over_images(
                    sums,
                    lambda c: ((c["square"] / c["n"] - (c["sum"] / c["n"]) ** 2).clip(min=0)) ** 0.5,
                    **given,
                )
        return out


def kl_divergence(log_p: Float[Tensor, "n n_classes"], log_q: Float[Tensor, "n n_classes"]) -> Float[Tensor, " n"]:
    """KL(p || q) of each row, in nats."""
    return (log_p.exp() * (log_p - log_q)).sum(1)
