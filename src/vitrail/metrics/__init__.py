"""What is measured of a coder. `MEASURES` says what each column of a table means."""

from dataclasses import dataclass

from vitrail.metrics.measured import Measured


@dataclass(frozen=True)
class Measure:
    title: str  # as printed over a column
    unit: str
    better: str  # "higher", "lower", or "" where neither is
    digits: int
    meaning: str


MEASURES: dict[str, Measure] = {
    "explained_variance": Measure("EV", "", "higher", 3, "1 - FVU; ratio of sums over all rows"),
    "fvu": Measure("FVU", "", "lower", 3, "fraction of variance unexplained; ratio of sums over all rows"),
    "cosine": Measure("cos", "", "higher", 3, "mean over rows of cosine(x, x_hat)"),
    "l0_tokens": Measure("L0", "latents", "lower", 1, "mean number of active latents per row"),
    "l0_cls": Measure("L0 CLS", "latents", "lower", 1, "mean number of active latents of CLS tokens"),
    "l0_image_sum": Measure("L0 img sum", "latents", "lower", 0, "active (token, latent) pairs per image"),
    "l0_image_unique": Measure("L0 img uniq", "latents", "lower", 1, "different latents active per image"),
    "recon_cosine": Measure("out cos", "", "higher", 3, "cosine(image embedding clean, substituted)"),
    "ce": Measure("CE", "nats", "", 3, "cross-entropy of the clean model"),
    "recon_ce": Measure("recon CE", "nats", "lower", 3, "cross-entropy with the reconstruction put in"),
    "zero_ce": Measure("zero CE", "nats", "", 3, "cross-entropy with the point set to zero"),
    "ce_recovered": Measure("% CE rec", "%", "higher", 1, "100 (CE_zero - CE_recon) / (CE_zero - CE)"),
    "ce_unscaled": Measure("CE @1", "nats", "", 4, "CE at logit scale 1"),
    "recon_ce_unscaled": Measure("recon CE @1", "nats", "lower", 4, "recon CE at logit scale 1"),
    "zero_ce_unscaled": Measure("zero CE @1", "nats", "", 4, "zero-ablation CE at logit scale 1"),
    "ce_recovered_unscaled": Measure("% CE rec @1", "%", "higher", 1, "% CE recovered at logit scale 1"),
    "accuracy": Measure("top-1", "", "", 3, "accuracy of the clean model"),
    "recon_accuracy": Measure("recon top-1", "", "higher", 3, "accuracy with the reconstruction put in"),
    "zero_accuracy": Measure("zero top-1", "", "", 3, "accuracy with the point set to zero"),
    "alive": Measure("alive", "", "higher", 3, "share of latents that fire at least once on the evaluation set"),
}

# What a table shows, in this order: FVU is 1 - EV and stays in the rows on disk.
COLUMNS = (
    "explained_variance",
    "cosine",
    "l0_tokens",
    "l0_cls",
    "l0_image_sum",
    "l0_image_unique",
    "recon_cosine",
    "ce",
    "recon_ce",
    "zero_ce",
    "ce_recovered",
    "recon_accuracy",
    "alive",
    "ce_unscaled",
    "recon_ce_unscaled",
    "zero_ce_unscaled",
    "ce_recovered_unscaled",
)

__all__ = ["COLUMNS", "MEASURES", "Measure", "Measured"]
