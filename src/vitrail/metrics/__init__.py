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


def _recovery(level: str, of: str) -> dict[str, Measure]:
    """What `Recovery.summary` measures at one level; docs/truth.md."""
    mean, share = "mean over measured concepts of", "share of measured concepts with"
    short = {"image": "img", "patch": "patch"}[level]
    measures = {
        f"{level}_f1": Measure(f"F1 {short}", "", "higher", 3, f"{mean} the chosen latent's F1 over {of}"),
        f"{level}_iou": Measure(f"IoU {short}", "", "higher", 3, f"{mean} the chosen latent's IoU over {of}"),
        f"{level}_auc": Measure(f"AUC {short}", "", "higher", 3, f"{mean} the best latent's ROC AUC over {of}"),
    }
    for at in ("0.5", "0.7", "0.9"):
        what = f"{share} F1 >= {at} over {of}"
        measures[f"{level}_recovered_f1_{at}"] = Measure(f"F1≥{at} {short}", "", "higher", 2, what)
        always = f"{share} F1 >= {at} over {of} for a latent that is always on"
        measures[f"{level}_constant_f1_{at}"] = Measure(f"always≥{at} {short}", "", "", 2, always)
    for at in ("0.9", "0.95"):
        what = f"{share} ROC AUC >= {at} over {of}"
        measures[f"{level}_recovered_auc_{at}"] = Measure(f"AUC≥{at} {short}", "", "higher", 2, what)
    many = f"mean number of latents within 0.9 of the best F1 over {of}, of concepts found"
    measures[f"{level}_redundancy"] = Measure(f"redund. {short}", "latents", "lower", 1, many)
    covered = f"share of concepts whose {of} latents that lie in them cover to 90 %"
    measures[f"{level}_covered"] = Measure(f"covered {short}", "", "higher", 2, covered)
    parts = f"mean number of latents that cover 90 % of a concept's {of}, where any do"
    measures[f"{level}_splitting"] = Measure(f"split {short}", "latents", "lower", 1, parts)
    return measures


def _moran(name: str, of: str) -> dict[str, Measure]:
    """What spatial coherence measures; metrics/moran.py."""
    return {
        name: Measure("Moran's I" if name == "moran" else "raw I", "", "higher", 3, f"mean Moran's I of {of}"),
        f"{name}_median": Measure("I median", "", "higher", 3, f"median over {of}"),
        f"{name}_iqr": Measure("I IQR", "", "", 3, f"interquartile range over {of}"),
        f"{name}_weighted": Measure("I weighted", "", "higher", 3, f"mean over {of}, weighted by activation"),
        f"{name}_latents": Measure("I latents", "latents", "", 0, "how many could be measured"),
        f"{name}_evaluable": Measure("I evaluable", "", "", 3, "share of all that could be measured"),
        f"{name}_null": Measure("I null", "", "", 4, "mean under permutations, -1 / (patches - 1)"),
        f"{name}_z": Measure("z of I", "", "", 1, "distance from the null in standard errors over latents"),
        f"{name}_null_sized": Measure("null-sized", "", "", 0, "1 where I is within .01 of the null, by two 5 % tests"),
    }


def _tasks() -> dict[str, Measure]:
    """Of raw features, reconstructions and codes; names of other image sets follow behind "@"."""
    tasks = {
        f"retrieval_r@{k}": (f"R@{k}", f"share of pictures with one of their class among the {k} nearest")
        for k in (1, 5, 10)
    }
    tasks["linear_accuracy"] = ("linear top-1", "accuracy of logistic regression on pooled features")
    tasks["segmentation_miou"] = ("mIoU", "mean IoU of a linear layer's classes of patches")
    tasks["segmentation_accuracy"] = ("patch acc.", "share of patches whose class a linear layer names")
    out = {}
    for name, (title, meaning) in tasks.items():
        out[f"{name}_raw"] = Measure(f"{title} raw", "", "", 3, f"{meaning}: raw features")
        out[f"{name}_recon"] = Measure(f"{title} recon", "", "higher", 3, f"{meaning}: reconstructions")
        out[f"{name}_codes"] = Measure(f"{title} codes", "", "higher", 3, f"{meaning}: codes")
        out[f"{name}_lift"] = Measure(f"{title} lift", "", "higher", 3, f"{meaning}: codes over raw features")
    return out


def measure_of(name: str) -> Measure | None:
    """Of a column's name; "fvu@drawings" is fvu of another image set."""
    return MEASURES.get(name) or MEASURES.get(name.rpartition("@")[0])


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
    # MSAE's, and Prisma's as published
    "sparsity": Measure("zeros", "", "higher", 3, "mean share of latents that are zero"),
    "cosine_normalized": Measure("CS", "", "higher", 3, "mean over rows of cosine(x, x_hat) in the coder's own space"),
    "fvu_msae_loss": Measure("FVU (loss)", "", "lower", 4, "MSAE's loss.py: per row, uncentred; mean over rows"),
    "fvu_msae_code": Measure("FVU (code)", "", "lower", 4, "MSAE's code: per row, variance over coordinates; mean"),
    "cosine_prisma": Measure("cos (Prisma)", "", "higher", 3, "Prisma's code: cosine over tokens, batch by batch"),
    "cosine_token_axis": Measure("cos (tokens)", "", "higher", 3, "cosine over all tokens, mean over dimensions"),
    "explained_variance_prisma": Measure("EV (Prisma)", "", "higher", 3, "Prisma's code: mean of ratios, batch mean"),
    "explained_variance_mean_of_ratios": Measure(
        "EV (ratios)", "", "higher", 3, "mean over rows of 1 - error / variance"
    ),
    "cknna": Measure("CKNNA", "", "higher", 3, "alignment of neighbourhoods of rows and of codes, k = 10"),
    "cknna_centred": Measure("CKNNA centred", "", "higher", 3, "the same with centred kernels"),
    "cknna_eq5": Measure("CKNNA Eq.5", "", "higher", 3, "as MSAE prints it: of identical rows it is not 1"),
    "do_mean_sq": Measure("DO", "", "lower", 5, "mean squared cosine of decoder pairs"),
    "do_msae_code": Measure("DO (code)", "", "lower", 5, "MSAE's code: squared cosines over all entries, diagonal 0"),
    "do_mean_signed": Measure("DO signed", "", "", 5, "mean cosine of decoder pairs, as MSAE's text has it"),
    "do_mean_abs": Measure("DO abs", "", "lower", 4, "mean absolute cosine of decoder pairs"),
    "do_welch": Measure("Welch", "", "", 5, "the least mean squared cosine that so many directions can have"),
    "dead_eval": Measure("dead", "latents", "lower", 0, "latents that never fire on the evaluation set"),
    "dead_eval_1e-7": Measure("rare 1e-7", "latents", "lower", 0, "latents that fire in fewer than 1 of 10^7 rows"),
    "dead_eval_msae": Measure("rare (code)", "latents", "lower", 0, "latents that fire in fewer than 10^-5.5 of rows"),
    "dead_train": Measure("dead in training", "latents", "lower", 0, "latents silent for the trainer's last window"),
    "dead_train_rows": Measure("dead (train)", "latents", "lower", 0, "latents that never fire on training rows"),
    "lp_kl": Measure("LP KL", "nats", "lower", 7, "KL of a linear probe's answer on x from that on x_hat"),
    "lp_agreement": Measure("LP same", "", "higher", 3, "share of rows whose probe answer stays"),
    "lp_accuracy": Measure("LP top-1", "", "", 3, "accuracy of the probe on x"),
    "recon_lp_accuracy": Measure("recon LP top-1", "", "higher", 3, "accuracy of the probe on x_hat"),
    "progressive_fvu": Measure("FVU area", "", "lower", 3, "mean over octaves of k of FVU with the k largest latents"),
    "progressive_cosine": Measure("cos area", "", "higher", 3, "the same of cosine"),
    "progressive_cosine_normalized": Measure("CS area", "", "higher", 3, "the same of CS"),
    "progressive_cknna": Measure("CKNNA area", "", "higher", 3, "the same of CKNNA, on a sample of rows"),
    # how often, how strongly, where
    "above_1": Measure("fires > 1 %", "", "", 3, "share of latents that fire in more than 1 % of rows"),
    "above_10": Measure("fires > 10 %", "", "", 3, "share of latents that fire in more than 10 % of rows"),
    "above_50": Measure("fires > 50 %", "", "", 3, "share of latents that fire in more than half of the rows"),
    "l0_above_1": Measure("L0 of > 1 %", "", "", 3, "share of what fires that is of latents above 1 %"),
    "l0_above_10": Measure("L0 of > 10 %", "", "", 3, "share of what fires that is of latents above 10 %"),
    "l0_above_50": Measure("L0 of > 50 %", "", "", 3, "share of what fires that is of latents above half"),
    "high_rows": Measure("high rows", "", "", 3, "share of rows with an activation above 15"),
    "high_pairs": Measure("high pairs", "pairs", "", 0, "(image, latent) pairs with an activation above 15"),
    "high_latents": Measure("high latents", "latents", "", 0, "latents with an activation above 15 somewhere"),
    "high_valid_pairs": Measure("valid pairs", "", "", 3, "share of those pairs whose latent is a valid concept"),
    "high_valid_latents": Measure("valid high", "", "", 3, "share of those latents that are valid concepts"),
    "high_of_valid": Measure("high of valid", "", "", 3, "share of valid concepts that are among those latents"),
    "l0_patches": Measure("L0 patches", "latents", "lower", 1, "mean number of active latents of patch tokens"),
    "l0_cls_share": Measure("CLS / patches", "", "", 2, "L0 of CLS over that of patches"),
    "l0_centre_border": Measure(
        "centre - border", "", "", 3, "L0 of the middle less that of the border, over their mean"
    ),
    "l0_centre_border_p": Measure("p", "", "", 4, "of that difference, by signs drawn at random"),
    "latents_effect": Measure("effect", "", "", 3, "score with all latents less score with none"),
    "latents_active": Measure("active", "latents", "", 1, "different latents active in an image"),
    "necessity": Measure("necessity", "", "higher", 3, "area of deletion by attribution less that at random"),
    "necessity_matched": Measure("necess. (matched)", "", "higher", 3, "the same against latents as active"),
    "sufficiency": Measure("sufficiency", "", "higher", 3, "area of insertion by attribution less that at random"),
    "sufficiency_matched": Measure("suffic. (matched)", "", "higher", 3, "the same against latents as active"),
    **{
        f"{curve}_area_{order}": Measure(
            f"{curve[:3]}. {order}", "", "", 3, f"area of {curve}, latents in the order: {order}"
        )
        for curve in ("deletion", "insertion")
        for order in ("attribution", "random", "matched")
    },
    # ViSAEBench's
    **_moran("moran", "latents' maps"),
    **_moran("raw_moran", "maps of the raw dimensions"),
    "moran_p": Measure("p of I", "", "", 4, "median p of sampled maps under permutations of their patches"),
    "moran_pairs_above": Measure("I > permuted", "", "higher", 3, "share of sampled maps with p below .05"),
    "moran_visaebench": Measure("I (package)", "", "higher", 3, "as visaebench 0.1 computes it"),
    "moran_visaebench_median": Measure("I med. (package)", "", "higher", 3, "its median"),
    "moran_visaebench_non_localized": Measure(
        "not local (package)", "", "", 3, "its share of latents that it leaves out"
    ),
    "moran_visaebench_latents": Measure("latents (package)", "latents", "", 0, "its number of latents"),
    "ovr_auc_1": Measure("AUC k=1", "", "higher", 3, "mean over classes of a one-vs-rest probe's AUC, best latent"),
    "ovr_auc_1_classes": Measure("AUC k=1 (classes)", "", "higher", 3, "the same, interval over classes"),
    "ovr_auc_128": Measure("AUC k=128", "", "higher", 3, "the same with the 128 best latents"),
    "ovr_auc_128_classes": Measure("AUC k=128 (classes)", "", "higher", 3, "the same, interval over classes"),
    "multi_acc_128": Measure("top-1 k=128", "", "higher", 3, "accuracy of one probe of all classes on 128 latents"),
    "multi_acc_128_classes": Measure("top-1 k=128 (classes)", "", "higher", 3, "the same, interval over classes"),
    "k_acc_area": Measure("k-acc area", "", "higher", 3, "area under accuracy over log k"),
    "k_acc_area_visaebench": Measure("k-acc area (package)", "", "higher", 3, "as visaebench 0.1 computes it"),
    "absorption": Measure("absorbed (M7)", "", "lower", 3, "share of classes with F1(1) < .8 and F1(4) > .5"),
    "absorption_train": Measure("absorbed (train)", "", "lower", 3, "the same, F1 of training images"),
    "absorption_groups": Measure("absorbed (groups)", "", "lower", 3, "M7, interval over groups of siblings"),
    "absorption_unread": Measure("unread", "", "lower", 3, "share of classes that four latents do not tell"),
    "absorption_visaebench": Measure("absorbed (package)", "", "lower", 3, "as visaebench 0.1 computes it"),
    "absorption_full": Measure(
        "absorbed (probe)", "", "lower", 3, "SAEBench's rule: another latent took the probe's place"
    ),
    "absorption_share": Measure("absorbed part", "", "lower", 3, "share of the probe's projection that others carry"),
    "feature_splits": Measure("splits", "latents", "lower", 2, "latents it takes to tell a class"),
    "child_absorbed": Measure("child absorbed", "", "lower", 3, "parent's latent off, the child's on, in its images"),
    "child_missed": Measure("child missed", "", "lower", 3, "parent's latent off in the child's images"),
    "child_elsewhere": Measure("elsewhere", "", "", 3, "parent's latent off in its other images"),
    "monosemanticity": Measure("M5", "", "higher", 3, "mean similarity of a latent's top images, weighted"),
    "monosemanticity_unweighted": Measure("M5 unweighted", "", "higher", 3, "the same, all pairs alike"),
    "monosemanticity_baseline": Measure("M5 baseline", "", "", 3, "the same of random groups of images, exactly"),
    "monosemanticity_pool_baseline": Measure("M5 pool", "", "", 3, "of random groups of top images"),
    "monosemanticity_normalized": Measure("M5 normalized", "", "higher", 3, "(M5 - baseline) / (1 - baseline)"),
    "monosemanticity_normalized_pool": Measure(
        "M5 norm. (pool)", "", "higher", 3, "the same about the pool's baseline"
    ),
    "monosemanticity_within": Measure("M5 within", "", "higher", 3, "of pairs of one class"),
    "monosemanticity_between": Measure("M5 between", "", "higher", 3, "of pairs of two classes"),
    "monosemanticity_within_share": Measure("pairs within", "", "", 3, "share of pairs that are of one class"),
    "monosemanticity_within_part": Measure("part within", "", "", 3, "what pairs of one class bring to M5"),
    "monosemanticity_between_part": Measure("part between", "", "", 3, "what pairs of two classes bring"),
    "monosemanticity_dead": Measure("M5 dead", "latents", "lower", 0, "latents that never fire"),
    "monosemanticity_too_few": Measure("M5 too few", "latents", "lower", 0, "latents with too few images"),
    "monosemanticity_common": Measure("M5 common", "", "higher", 3, "M5 in the eyes of the study's common evaluator"),
    "monosemanticity_common_baseline": Measure("M5 common base", "", "", 3, "its baseline"),
    "monosemanticity_common_normalized": Measure(
        "M5 common norm.", "", "higher", 3, "(M5 - baseline) / (1 - baseline)"
    ),
    # of another domain, named behind "@"
    "cross_domain_preservation": Measure(
        "M6 preserved", "", "higher", 3, "accuracy of a probe of x_hat over that of x"
    ),
    "cross_domain_raw_accuracy": Measure("M6 raw top-1", "", "", 3, "accuracy of a probe of raw rows, pooled"),
    "cross_domain_recon_accuracy": Measure("M6 recon top-1", "", "higher", 3, "accuracy of a probe of x_hat, pooled"),
    "cross_domain_codes_accuracy_128": Measure("M6 codes top-1", "", "higher", 3, "accuracy of a probe of 128 latents"),
    "cross_domain_fvu": Measure("M6 FVU", "", "lower", 3, "FVU there"),
    "cross_domain_alive_kept": Measure("M6 alive kept", "", "", 3, "share of latents alive at home that fire there"),
    "cross_domain_jaccard": Measure("M6 Jaccard", "", "", 3, "latents alive in both over those alive in either"),
    # what features are good for
    **_tasks(),
    "preservation": Measure("preserved", "", "higher", 3, "accuracy of a probe of raw features, on x_hat over on x"),
    "preservation_same": Measure("same answer", "", "higher", 3, "share of images whose probe answer stays"),
    "preservation_refit": Measure("preserved (refit)", "", "higher", 3, "the same, the probe of x_hat fitted on x_hat"),
    "preservation_visaebench": Measure("preserved (package)", "", "higher", 3, "as visaebench 0.1 computes it"),
    "probe_accuracy": Measure("probe top-1", "", "", 3, "accuracy of the probe on x, pooled"),
    "recon_probe_accuracy": Measure("recon probe top-1", "", "higher", 3, "accuracy of that probe on x_hat, pooled"),
    "recon_refit_accuracy": Measure("refit top-1", "", "higher", 3, "accuracy of a probe fitted on x_hat"),
    # of several seeds
    "stability_decoder": Measure(
        "stab. dec", "", "higher", 3, "mean cosine of matched decoder directions of two seeds"
    ),
    "stability_encoder": Measure("stab. enc", "", "higher", 3, "the same of encoder directions"),
    "stability_decoder_floor": Measure("floor dec", "", "", 3, "the same of random directions"),
    "stability_encoder_floor": Measure("floor enc", "", "", 3, "the same of random directions"),
    "stability_decoder_above_floor": Measure("stab. dec > floor", "", "higher", 3, "(stability - floor) / (1 - floor)"),
    "stability_encoder_above_floor": Measure("stab. enc > floor", "", "higher", 3, "(stability - floor) / (1 - floor)"),
    "stability_shared": Measure("shared", "", "higher", 3, "share of latents matched above .7 in both"),
    **_recovery("image", "pictures"),
    **_recovery("patch", "patches"),
    "absorbed": Measure(
        "absorbed", "", "lower", 3, "the child's latent is on instead of its parent's; mean over pairs"
    ),
    "absorption_missed": Measure("missed", "", "lower", 3, "the parent's latent is off in the child's pictures"),
    "absorption_elsewhere": Measure(
        "elsewhere", "", "", 3, "the parent's latent is off in the parent's other pictures"
    ),
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

# Standard deviations over rows, beside their means.
MEASURES |= {
    f"{name}_std": Measure(
        f"{MEASURES[name].title} sd", MEASURES[name].unit, "", MEASURES[name].digits, f"over rows: {name}"
    )
    for name in (
        *("fvu", "cosine", "sparsity", "fvu_msae_loss", "fvu_msae_code", "cosine_normalized", "lp_kl"),
        "lp_agreement",
    )
}

# The same of truth recovery.
RECOVERY_COLUMNS = (
    "l0_tokens",
    "image_f1",
    "image_recovered_f1_0.5",
    "image_recovered_f1_0.7",
    "image_recovered_f1_0.9",
    "image_auc",
    "image_recovered_auc_0.9",
    "patch_f1",
    "patch_iou",
    "patch_recovered_f1_0.5",
    "patch_auc",
    "patch_recovered_auc_0.9",
    "image_redundancy",
    "image_splitting",
    "absorbed",
)

__all__ = ["COLUMNS", "MEASURES", "RECOVERY_COLUMNS", "Measure", "Measured", "measure_of"]
