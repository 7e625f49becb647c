"""Dead latents: how many never fire, on this evaluation set and at the end of training, with the rows looked at.

    dead_eval         latents that fire in none of the rows shown                             "never-on-these-rows"
    dead_eval_1e-7    latents that fire in fewer than one in 10^7 of them                     "frequency-below-1e-7"
    dead_eval_msae    latents that fire in fewer than 10^-5.5 of them                         "msae-code"
    dead_train        latents that had not fired for the trainer's window when it stopped     "trainer-window"

Range. A count in 0..d_sae. Unit: latents. `n` is the number of rows (tokens) that were looked at.

Moves with. The number of rows, more than with anything else: a latent seen in none of n rows may still have a
frequency of up to 3 / n (95 %). With fewer than 10^7 rows "below 10^-7" is the same as never. Token kinds: a latent of
patches is dead to a CLS-only pass.

Does not show. Whether the latents that do fire are of use; a latent that fires once is alive.

Source. MSAE section 4.1 and tables 1-5 ("NDN", on the evaluation set and, in parentheses, from the final checkpoint,
where its code counts frequencies below 10^-5.5); SPEC rows 45 and 56.

Tags. As above. `dead_train` comes from what training wrote beside the weights (`dead_at_end_of_training`): it looks
back over `dead_window_rows` rows, not over the whole training, while weights were still moving, and a latent that was
just revived counts as alive. For the count over a training set with the final weights, run this metric over its rows:
Dead(setting, rows="train") gives `dead_train_rows` and its like.
"""

from collections.abc import Mapping
from typing import Any

import torch

from vitrail.metrics.measured import Measured
from vitrail.metrics.passing import Metric, Seen, Setting

RARE = (("1e-7", 1e-7, "frequency-below-1e-7"), ("msae", 10**-5.5, "msae-code"))


class Dead(Metric):
    """One count a latent. `rows`: which these are, "eval" or "train"; it names the keys."""

    def __init__(self, setting: Setting, *, rows: str = "eval") -> None:
        if rows not in ("eval", "train"):
            raise ValueError(f"rows must be 'eval' or 'train', got {rows!r}.")
        self._key = "dead_eval" if rows == "eval" else "dead_train_rows"
        self._fired = torch.zeros(setting.d_sae, dtype=torch.long)
        self._rows = 0

    def update(self, seen: Seen) -> None:
        self._fired += seen.codes.fired().cpu()
        self._rows += seen.codes.n

    def compute(self, *, n_bootstrap: int = 1000, seed: int = 0) -> dict[str, Measured]:
        """Counts, without intervals: what is not seen does not vary from draw to draw."""
        if self._rows == 0:
            raise ValueError("no images were measured: there is nothing to report.")
        never = int((self._fired == 0).sum())
        out = {self._key: Measured(value=float(never), definition="never-on-these-rows", n=self._rows)}
        for name, below, tag in RARE:
            count = int((self._fired.double() / self._rows < below).sum())
            out[f"{self._key}_{name}"] = Measured(value=float(count), definition=tag, n=self._rows)
        return out


def dead_at_end_of_training(metadata: Mapping[str, Any]) -> Measured | None:
    """From `coder_metadata(path)`: the last line of the training log. `n`: the rows of the window it looked back over.

    None where the coder was not trained here, or for fewer rows than the window, so that nothing could be called dead.
    """
    training = metadata.get("training")
    if not isinstance(training, Mapping):
        return None
    window = training["request"]["config"]["dead_window_rows"]
    if training["rows"] < window or "dead" not in training["last"]:
        return None
    return Measured(value=float(training["last"]["dead"]), definition="trainer-window", n=int(window))
