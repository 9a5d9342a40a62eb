"""What a row's reasons cost, and how near they are to XGBoost's: `python -m deploy.bench.reasons`. Pinned to one core; about a minute.

Labels that hang on most features a little, so that the trees use them all and grow as large as they may: the worst case.
"""

from __future__ import annotations

import argparse
import os
import time

import numpy as np
import numpy.typing as npt
import xgboost

from gateway.contracts.features import FEATURES
from gateway.contracts.model_meta import EXPLANATION_FILE
from gateway.explanations.explain import Explainer, load_explainer
from model_export.export import export
from model_export.training import default_params

TRAINING_ROWS = 20_000
BATCHES = (1, 8, 64)
RUNS = 200
SEED = 7

Floats = npt.NDArray[np.float32]


def make_rows(rows: int, seed: int) -> Floats:
    """(rows, features) of lognormal numbers, a fifth of them unknown."""
    rng = np.random.default_rng(seed)
    x = rng.lognormal(1.0, 1.0, (rows, len(FEATURES))).astype(np.float32)
    x[rng.random(x.shape) < 0.2] = np.nan
    return x


def make_model(trees: int, depth: int) -> tuple[xgboost.Booster, Floats]:
    rows = make_rows(TRAINING_ROWS, SEED)
    raised = np.nan_to_num(rows).sum(axis=1)
    odds = (raised - np.median(raised)) / raised.std() * 2 - 2
    labels = np.random.default_rng(SEED).random(len(rows)) < 1 / (1 + np.exp(-odds))
    params = default_params(float(labels.mean()), 1) | {"max_depth": depth}
    return xgboost.train(params, xgboost.QuantileDMatrix(rows, labels, nthread=1), num_boost_round=trees), rows


def us_a_row(explainer: Explainer, rows: Floats, batch: int) -> npt.NDArray[np.float64]:
    """Microseconds a row of each of RUNS batches, contributions and codes."""
    found = np.empty(RUNS)
    for i in range(RUNS):
        at = i * batch % (len(rows) - batch)
        part = rows[at : at + batch].copy()
        begin = time.perf_counter()
        explainer.codes(part)
        found[i] = (time.perf_counter() - begin) / batch * 1e6
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m deploy.bench.reasons", description=__doc__)
    parser.add_argument("--trees", type=int, nargs="+", default=[100, 400])
    parser.add_argument("--depth", type=int, nargs="+", default=[5, 7])
    args = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    rows = make_rows(2000, SEED + 1)
    print(f"{'trees':>5} {'depth':>5} {'nodes':>6} {'load ms':>8}  {'us a row: least, median, 90th percentile, at a batch of'}")
    print(
        f"{'':>5} {'':>5} {'':>6} {'':>8}" + "".join(f"{f'{b}':>22}" for b in BATCHES) + f"{'from XGBoost':>15}{'from margin':>13}"
    )
    for trees in args.trees:
        for depth in args.depth:
            booster, sample = make_model(trees, depth)
            made = export(booster, sample)
            content, golden, probability = made.extras[EXPLANATION_FILE], made.golden_features, made.golden_probability
            load_explainer(content, golden, probability)
            begin = time.perf_counter()
            explainer = load_explainer(content, golden, probability)
            load_ms = (time.perf_counter() - begin) * 1000
            data = xgboost.DMatrix(rows)
            found = explainer.contributions(rows)
            apart = float(np.abs(found - booster.predict(data, pred_contribs=True)[:, :-1]).max())
            off = float(np.abs(found.sum(axis=1) + explainer.expected - booster.predict(data, output_margin=True)).max())
            times = [np.percentile(us_a_row(explainer, rows, batch), [0, 50, 90]) for batch in BATCHES]
            shown = "".join(f"{f'{least:.0f}, {median:.0f}, {p90:.0f}':>22}" for least, median, p90 in times)
            print(f"{trees:>5} {depth:>5} {explainer.nodes:>6} {load_ms:>8.0f}{shown}{apart:>15.1e}{off:>13.1e}")


if __name__ == "__main__":
    main()
