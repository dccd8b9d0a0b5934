"""The ranker of ``ltr``: hashed n-grams of the prompt, one linear score, trained with ListMLE (arXiv 2408.15792, section 4).

ListMLE (Xia et al., ICML 2008) is the likelihood of the true order under a Plackett-Luce model; labels are lengths in buckets of ten tokens,
shorter = larger. The paper's scorer is OPT-125M; lexical features reach useful taus at microseconds a prompt, which is what a scheduler can
afford. ``loss``: "listmle", "mse" on the log length, or "buckets" (ten classes of length, the paper's baselines).

    python -m presage.schedule.ltr_train DATA.jsonl MODEL.npz     # lines of {"prompt": [ids], "length": tokens}
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from presage.core.errors import ConfigError
from presage.core.types import Floats, Ints
from presage.schedule.kendall import kendall_tau

WIDTH = 1 << 15
"""Hashed features."""
RARE = 8
"""Training prompts that must have a feature for it to get a weight: names and numbers that appear once say nothing about others."""
LOOK = 512
"""Tokens looked at: the first and the last half of these (instructions stand at either end)."""
BUCKET, CAP = 10, 8192
LIST = 32
BUCKETS = 10


def features(prompt: np.ndarray, width: int = WIDTH) -> Ints:
    """Hashed places [n] of the prompt's single tokens, pairs and its length class; duplicates count once."""
    ids = np.asarray(prompt, np.uint64)
    if len(ids) > LOOK:
        ids = np.concatenate([ids[: LOOK // 2], ids[-LOOK // 2 :]])
    with np.errstate(over="ignore"):
        pairs = ids[:-1] * np.uint64(1000003) + ids[1:] + np.uint64(0x9E3779B9)
        marks = np.array([0xABCD0000 + int(np.log2(max(1, len(prompt))))], np.uint64)
        keys = np.concatenate([ids, pairs, marks]) * np.uint64(0x9E3779B97F4A7C15)
    return np.unique((keys >> np.uint64(40)) % np.uint64(width)).astype(np.int32)


@dataclass
class LinearRanker:
    """Score = sum of the weights [WIDTH] of the prompt's features; higher = expected shorter. ``tau``: on held-out prompts.

    With weights [WIDTH, classes] of a classifier by length: - the expected class.
    """

    weights: Floats
    tau: float = 0.0

    def score(self, prompts: list[np.ndarray]) -> Floats:
        """Scores [n] of prompts."""
        sums = np.array([self.weights[features(p, len(self.weights))].sum(0) for p in prompts], np.float64)
        return sums if sums.ndim < 2 else -_softmax(sums) @ np.arange(sums.shape[1], dtype=np.float64)

    def save(self, path: Path | str) -> None:
        """Write an .npz file."""
        np.savez(path, weights=self.weights, tau=self.tau, format=1)

    @classmethod
    def load(cls, path: Path | str) -> LinearRanker:
        """Read what ``save`` wrote. Raises ConfigError for anything else."""
        try:
            with np.load(path) as data:
                return cls(data["weights"].astype(np.float64), float(data["tau"]))
        except (OSError, KeyError, ValueError) as error:
            raise ConfigError(f"{path} is not a ranker: {error}", param="model") from None


def _softmax(s: Floats) -> Floats:
    p = np.exp(s - s.max(1, keepdims=True))
    return np.asarray(p / p.sum(1, keepdims=True))


def list_mle(scores: Floats, labels: Floats) -> tuple[float, Floats]:
    """Loss and gradient [n] of one list: the negative log-likelihood of the order by falling label (ties as they stand)."""
    by = np.argsort(-labels, kind="stable")
    s = scores[by] - scores.max()
    tail = np.logaddexp.accumulate(s[::-1])[::-1]
    loss = float((tail - s).sum())
    # d/ds_k of sum_i logsumexp_{j >= i}: the softmax of every tail that holds k.
    inverse = np.logaddexp.accumulate(-tail)
    grad = np.empty_like(s)
    grad[by] = np.exp(s + inverse) - 1.0
    return loss, grad


def labels_of(lengths: np.ndarray) -> Floats:
    """Relevance: buckets of ten tokens, shorter = larger, capped at 8192."""
    return np.asarray(CAP // BUCKET - np.minimum(lengths, CAP) // BUCKET, np.float64)


def train(
    prompts: Sequence[np.ndarray], lengths: Sequence[int] | np.ndarray, loss: str = "listmle", epochs: int = 20, rate: float = 0.02,
    decay: float = 0.01, seed: int = 42, held_out: float = 0.1,
) -> LinearRanker:  # fmt: skip
    """A ranker from prompts and the lengths of the answers they got; ``tau`` is of the ``held_out`` share. Adam with weight decay.

    Raises ConfigError below 64 prompts or for an unknown loss.
    """
    if len(prompts) < 64 or loss not in ("listmle", "mse", "buckets"):
        raise ConfigError(f"training needs at least 64 prompts (got {len(prompts)}) and the loss listmle, mse or buckets (got {loss!r})")
    rng, n = np.random.default_rng(seed), np.asarray(lengths, np.int64)
    order = rng.permutation(len(prompts))
    cut = int(len(prompts) * (1 - held_out))
    places = [features(p) for p in prompts]
    common = np.bincount(np.concatenate([places[i] for i in order[:cut]]), minlength=WIDTH) >= RARE
    # Only these are trained, numbered from 0.
    number = (np.cumsum(common) - 1).astype(np.int32)
    places = [number[p[common[p]]] for p in places]
    width = BUCKETS if loss == "buckets" else 1
    step, target = _objective(loss, n, order[:cut])
    weights = np.zeros((WIDTH, width))
    weights[common] = _adam([places[i] for i in order[:cut]], target[order[:cut]], (int(common.sum()), width), step, epochs, rate, decay, rng)
    ranker = LinearRanker(weights if width > 1 else weights[:, 0] if loss == "listmle" else -weights[:, 0])
    test = order[cut:]
    ranker.tau = kendall_tau(-ranker.score([prompts[i] for i in test]), n[test].astype(np.float64))
    return ranker


Step = Callable[[Floats, Floats], Floats]
"""(scores [n, width], targets [n]) -> gradient [n, width]."""


def _objective(loss: str, lengths: np.ndarray, train_on: np.ndarray) -> tuple[Step, Floats]:
    if loss == "listmle":
        return (lambda s, y: list_mle(s[:, 0], y)[1][:, None]), labels_of(lengths)
    logs = np.log(np.maximum(1, lengths)).astype(np.float64)
    if loss == "mse":
        return (lambda s, y: s - y[:, None]), (logs - logs[train_on].mean()) / (logs[train_on].std() or 1.0)
    edges = np.quantile(logs[train_on], np.linspace(0, 1, BUCKETS + 1)[1:-1])

    def cross_entropy(s: Floats, y: Floats) -> Floats:
        p = _softmax(s)
        p[np.arange(len(y)), y.astype(np.int64)] -= 1.0
        return p

    return cross_entropy, np.searchsorted(edges, logs).astype(np.float64)


def _adam(
    places: list[Ints], target: Floats, shape: tuple[int, int], step: Step, epochs: int, rate: float, decay: float, rng: np.random.Generator
) -> Floats:  # fmt: skip
    """Weights of ``shape`` after ``epochs`` over shuffled lists of ``LIST`` prompts."""
    w = np.zeros(shape)
    m, v = np.zeros_like(w), np.zeros_like(w)
    t = 0
    for _ in range(epochs):
        shuffled = rng.permutation(len(places))
        for a in range(0, len(shuffled) - 1, LIST):
            part = shuffled[a : a + LIST]
            scores = np.stack([w[places[i]].sum(0) for i in part])
            grad = np.zeros_like(w)
            for i, g in zip(part, step(scores, target[part]) / len(part)):
                grad[places[i]] += g
            t += 1
            m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
            w -= rate * ((m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8) + decay * w)
    return w


def told_lengths(n: int, seed: int = 0, noise: float = 0.4) -> tuple[list[np.ndarray], np.ndarray]:
    """Prompts [n] whose instruction implies the length of the answer, and such lengths: a grammar for tests and for the paper's figure.

    Each prompt: a verb (sets the scale), a number ("list N items"), and filler words that mean nothing. Length is log-normal around them.
    """
    rng = np.random.default_rng(seed)
    verbs = np.log(np.array([4.0, 12.0, 30.0, 80.0, 200.0, 450.0]))
    prompts, lengths = [], np.empty(n, np.int64)
    for i in range(n):
        verb, number = int(rng.integers(len(verbs))), int(rng.integers(1, 9))
        filler = rng.integers(2000, 8000, int(rng.integers(5, 60)))
        prompts.append(np.concatenate([[100 + verb, 200 + number], filler, [100 + verb]]).astype(np.int32))
        lengths[i] = int(np.clip(np.exp(verbs[verb] + 0.5 * np.log(number) + noise * rng.standard_normal()), 1, CAP))
    return prompts, lengths


def main(argv: Sequence[str]) -> int:
    """Train on recorded answers and write the model; prints its tau."""
    if len(argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    rows = [json.loads(line) for line in Path(argv[0]).read_text().splitlines() if line.strip()]
    ranker = train([np.array(r["prompt"], np.int32) for r in rows], [int(r["length"]) for r in rows])
    ranker.save(argv[1])
    print(f"{len(rows)} prompts, Kendall's tau {ranker.tau:.2f} on a tenth of them held out")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
