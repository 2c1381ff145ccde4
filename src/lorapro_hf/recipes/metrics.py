"""How good are predictions? Metrics of the library `evaluate` that need no network.

They compute the metrics of the same names on the Hub with the same libraries (extra `scripts`): scikit-learn, scipy,
rouge_score, sacrebleu and jiwer.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import evaluate
import numpy as np
from datasets import Features, Value

from lorapro_hf.options import UsageError
from lorapro_hf.utils.extras import install_command

Metric = Callable[[Any, Any], dict[str, float]]
"""A function of predictions and references."""

GLUE_METRICS = {
    "cola": "matthews_correlation",
    "mnli": "accuracy",
    "mrpc": "accuracy_and_f1",
    "qnli": "accuracy",
    "qqp": "accuracy_and_f1",
    "rte": "accuracy",
    "sst2": "accuracy",
    "stsb": "pearson_and_spearman",
    "wnli": "accuracy",
}


def accuracy(predictions: Any, references: Any) -> dict[str, float]:
    """Return the fraction of right labels."""
    return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


def accuracy_and_f1(predictions: Any, references: Any) -> dict[str, float]:
    """Return the fraction of right labels, F1 of label 1, and their mean."""
    from sklearn.metrics import f1_score

    right, f1 = accuracy(predictions, references)["accuracy"], float(f1_score(references, predictions))
    return {"accuracy": right, "f1": f1, "combined_score": (right + f1) / 2}


def matthews_correlation(predictions: Any, references: Any) -> dict[str, float]:
    """Return Matthews' correlation coefficient."""
    from sklearn.metrics import matthews_corrcoef

    return {"matthews_correlation": float(matthews_corrcoef(references, predictions))}


def pearson_and_spearman(predictions: Any, references: Any) -> dict[str, float]:
    """Return Pearson's and Spearman's correlations and their mean."""
    from scipy.stats import pearsonr, spearmanr

    values = np.asarray(predictions, dtype=np.float64), np.asarray(references, dtype=np.float64)
    pearson, spearman = float(pearsonr(*values)[0]), float(spearmanr(*values)[0])
    return {"pearson": pearson, "spearmanr": spearman, "combined_score": (pearson + spearman) / 2}


def mse(predictions: Any, references: Any) -> dict[str, float]:
    """Return the mean squared error."""
    errors = np.asarray(predictions, dtype=np.float64) - np.asarray(references, dtype=np.float64)
    return {"mse": float(np.mean(errors**2))}


def exact_match(predictions: list[str], references: list[str]) -> dict[str, float]:
    """Return the fraction of texts that equal their reference."""
    equal = [text == reference for text, reference in zip(predictions, references, strict=True)]
    return {"exact_match": float(np.mean(equal))}


def rouge(predictions: list[str], references: list[str]) -> dict[str, float]:
    """Return the F-measures of ROUGE-1, -2, -L and -Lsum with stemming, in percent."""
    from rouge_score.rouge_scorer import RougeScorer

    kinds = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    scorer = RougeScorer(kinds, use_stemmer=True)
    scores = [scorer.score(reference, text) for reference, text in zip(references, predictions, strict=True)]
    return {kind: 100 * float(np.mean([score[kind].fmeasure for score in scores])) for kind in kinds}


def sacrebleu(predictions: list[str], references: list[str]) -> dict[str, float]:
    """Return BLEU of the whole corpus with SacreBLEU's tokenizer, in percent."""
    from sacrebleu import corpus_bleu

    return {"bleu": float(corpus_bleu(predictions, [references]).score)}


def wer(predictions: list[str], references: list[str]) -> dict[str, float]:
    """Return the word errors (substitutions, deletions, insertions) for each word of the references."""
    import jiwer

    return {"wer": float(jiwer.wer(references, predictions))}


METRICS: dict[str, tuple[Metric, str | None]] = {
    "accuracy": (accuracy, None),
    "accuracy_and_f1": (accuracy_and_f1, "sklearn"),
    "matthews_correlation": (matthews_correlation, "sklearn"),
    "pearson_and_spearman": (pearson_and_spearman, "scipy"),
    "mse": (mse, None),
    "exact_match": (exact_match, None),
    "rouge": (rouge, "rouge_score"),
    "sacrebleu": (sacrebleu, "sacrebleu"),
    "wer": (wer, "jiwer"),
}
"""The metrics by name, each with the library that it needs."""

_KINDS = {
    **dict.fromkeys(("pearson_and_spearman", "mse"), "float64"),
    **dict.fromkeys(("exact_match", "rouge", "sacrebleu", "wer"), "string"),
}


class OfflineMetric(evaluate.Metric):
    """A metric that a function computes, instead of a module that `evaluate.load` would fetch."""

    def __init__(self, function: Metric, kind: str) -> None:
        self._function, self._kind = function, kind
        super().__init__(keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        features = Features({part: Value(self._kind) for part in ("predictions", "references")})
        return evaluate.MetricInfo(
            description=str(self._function.__doc__), citation="", inputs_description="", features=features
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return self._function(predictions, references)


def load_metric(name: str) -> Metric:
    """Return a metric of `METRICS`, as a function of predictions and references.

    Raises:
        UsageError: if its library is missing, so that a training does not fail at its end.
    """
    metric, library = METRICS[name]
    try:
        if library is not None:
            import_module(library)
    except ImportError as error:
        raise UsageError(f"the metric {name} needs {library}: {install_command('scripts')}.") from error
    module = OfflineMetric(metric, _KINDS.get(name, "int64"))

    def compute(predictions: Any, references: Any) -> dict[str, float]:
        found: dict[str, float] = module.compute(predictions=predictions, references=references)
        return found

    return compute


def of_labels(name: str, is_regression: bool = False) -> Callable[[Any], dict[str, float]]:
    """Return `compute_metrics` for a `Trainer` whose model returns logits, or one number if `is_regression`."""
    metric = load_metric(name)
    return lambda prediction: metric(labels_in(prediction.predictions, is_regression), prediction.label_ids)


def labels_in(predictions: Any, is_regression: bool = False) -> Any:
    """Return the labels, or the numbers if `is_regression`, of a `Trainer`'s logits, which may lead a tuple."""
    logits = predictions[0] if isinstance(predictions, tuple) else predictions
    return np.squeeze(logits, axis=-1) if is_regression else np.argmax(logits, axis=-1)
