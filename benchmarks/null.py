"""How often two cells without a difference are told apart at the 5 % level: by seeds, after selection, and by rows.

    python benchmarks/null.py                              # the table of docs/statistics.md, some minutes
    python benchmarks/null.py --replicates 1000

A made-up test split: 60 % of its rows are always right, the others with a probability of one half, moved for each run
so that the run's accuracy deviates by `run deviation` points. Both cells are drawn alike, so that each verdict but
"unresolved" is a mistake; 5 % are promised. `seeds`: the t test over paired seeds, one learning rate, last epoch.
`selected`: the same on the best of 10 epochs of each run, at the best mean of 3 learning rates, both by test score;
half of a run's variance is shared by its epochs. `flattery`: how many points such a best is above the truth. `rows`:
the interval over test rows, the scores averaged over the seeds on each row, as this project once gave it.
"""

import argparse
from itertools import product

import numpy as np
import pandas as pd
from scipy.stats import norm, ttest_1samp

HARD = 0.4  # of the rows
RATES, EPOCHS = 3, 10


def chance(random: np.random.Generator, deviation: float, shape: tuple[int, ...]) -> np.ndarray:
    """The probability that a run gets a hard row right; its accuracy then deviates by `deviation` points."""
    return (0.5 + random.normal(0, deviation / 100 / HARD, shape)).clip(0, 1)


def by_rows_and_seeds(
    random: np.random.Generator, deviation: float, rows: int, seeds: int, replicates: int
) -> tuple[np.ndarray, np.ndarray]:
    """Whether the interval over rows, and the t test over seeds, find a difference in each replicate."""
    hard, difference_of_seed, variance = round(HARD * rows), [], []
    for start in range(0, replicates, 100):
        p = chance(random, deviation, (min(100, replicates - start), seeds, 2, 1)).astype(np.float32)
        right = random.random((*p.shape[:3], hard), dtype=np.float32) < p
        difference = right[:, :, 1].astype(np.int8) - right[:, :, 0]
        difference_of_seed.append(difference.sum(-1) / rows)
        of_row = difference.mean(1)  # rows that are always right add nothing
        variance.append((of_row**2).sum(-1) / rows - (of_row.sum(-1) / rows) ** 2)
    of_seed = np.concatenate(difference_of_seed)
    by_rows = abs(of_seed.mean(1)) > norm.ppf(0.975) * np.sqrt(np.concatenate(variance) / rows)
    return by_rows, ttest_1samp(of_seed, 0, axis=1).pvalue < 0.05


def by_selection(
    random: np.random.Generator, deviation: float, rows: int, seeds: int, replicates: int
) -> tuple[np.ndarray, float]:
    """Whether the t test finds a difference of the selected scores, and how many points these are above the truth."""
    shape, hard = (replicates, 2, RATES, seeds, EPOCHS), round(HARD * rows)
    part = deviation / 2**0.5
    p = chance(random, part, shape[:-1])[..., None] + chance(random, part, shape) - 0.5
    best_epoch = random.binomial(hard, p.clip(0, 1)).max(-1) / rows
    best_rate = best_epoch.mean(-1).argmax(-1)
    score = np.take_along_axis(best_epoch, best_rate[:, :, None, None], 2)[:, :, 0]
    p_value = ttest_1samp(score[:, 1] - score[:, 0], 0, axis=1).pvalue
    return p_value < 0.05, 100 * (score.mean() - HARD / 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicates", type=int, default=10_000)
    replicates, table = parser.parse_args().replicates, []
    for number, (rows, deviation, seeds) in enumerate(product((500, 5000), (0.5, 1, 2), (3, 5, 10))):
        case = {"test rows": rows, "run deviation": deviation, "seeds": seeds}
        random = np.random.default_rng([0, number])
        by_rows, by_seeds = by_rows_and_seeds(random, deviation, rows, seeds, replicates)
        selected, flattery = by_selection(random, deviation, rows, seeds, replicates)
        shares = {"seeds (%)": by_seeds, "selected (%)": selected, "rows (%)": by_rows}
        shares = {name: f"{100 * found.mean():.1f}" for name, found in shares.items()}
        table.append(case | shares | {"flattery (points)": f"{flattery:.2f}"})
    print(pd.DataFrame(table).to_markdown(index=False, disable_numparse=True))


if __name__ == "__main__":
    main()
