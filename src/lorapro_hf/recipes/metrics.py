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
    **dict.fromkeys(("mnli", "qnli", "rte", "sst2", "wnli"), "accuracy"),
    **dict.fromkeys(("mrpc", "qqp"), "accuracy_and_f1"),
    "cola": "matthews_correlation",
    "stsb": "pearson_and_spearman",
}


def _accuracy(predictions: Any, references: Any) -> dict[str, float]:
    return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


def _accuracy_and_f1(predictions: Any, references: Any) -> dict[str, float]:
    from sklearn.metrics import f1_score

    right, f1 = _accuracy(predictions, references)["accuracy"], float(f1_score(references, predictions))
    return {"accuracy": right, "f1": f1, "combined_score": (right + f1) / 2}


def _matthews_correlation(predictions: Any, references: Any) -> dict[str, float]:
    from sklearn.metrics import matthews_corrcoef

    return {"matthews_correlation": float(matthews_corrcoef(references, predictions))}


def _pearson_and_spearman(predictions: Any, references: Any) -> dict[str, float]:
    from scipy.stats import pearsonr, spearmanr

    pearson, spearman = (float(correlation(predictions, references)[0]) for correlation in (pearsonr, spearmanr))
    return {"pearson": pearson, "spearmanr": spearman, "combined_score": (pearson + spearman) / 2}


def _mse(predictions: Any, references: Any) -> dict[str, float]:
    return {"mse": float(np.mean((np.asarray(predictions) - np.asarray(references)) ** 2))}


def _exact_match(predictions: list[str], references: list[str]) -> dict[str, float]:
    return {"exact_match": float(np.mean([text == right for text, right in zip(predictions, references, strict=True)]))}


def _rouge(predictions: list[str], references: list[str]) -> dict[str, float]:
    from rouge_score.rouge_scorer import RougeScorer

    kinds = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    scores = list(map(RougeScorer(kinds, use_stemmer=True).score, references, predictions))
    return {kind: 100 * float(np.mean([score[kind].fmeasure for score in scores])) for kind in kinds}


def _sacrebleu(predictions: list[str], references: list[str]) -> dict[str, float]:
    from sacrebleu import corpus_bleu

    return {"bleu": float(corpus_bleu(predictions, [references]).score)}


def _wer(predictions: list[str], references: list[str]) -> dict[str, float]:
    import jiwer

    return {"wer": float(jiwer.wer(references, predictions))}


# each with the library that it needs and the type of predictions and references
_METRICS: dict[str, tuple[Metric, str, str]] = {
    "accuracy": (_accuracy, "numpy", "int64"),
    "accuracy_and_f1": (_accuracy_and_f1, "sklearn", "int64"),
    "matthews_correlation": (_matthews_correlation, "sklearn", "int64"),
    "pearson_and_spearman": (_pearson_and_spearman, "scipy", "float64"),
    "mse": (_mse, "numpy", "float64"),
    "exact_match": (_exact_match, "numpy", "string"),
    "rouge": (_rouge, "rouge_score", "string"),  # F-measures with stemming, in percent
    "sacrebleu": (_sacrebleu, "sacrebleu", "string"),  # of the whole corpus, in percent
    "wer": (_wer, "jiwer", "string"),
}


class OfflineMetric(evaluate.Metric):
    """A metric that a function computes, instead of a module that `evaluate.load` would fetch."""

    def __init__(self, function: Metric, kind: str) -> None:
        self._function, self._kind = function, kind
        super().__init__(keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        features = Features(dict.fromkeys(("predictions", "references"), Value(self._kind)))
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return self._function(predictions, references)


def load_metric(name: str) -> Metric:
    """Return the metric of this name, as a function of predictions and references.

    Raises:
        UsageError: if its library is missing, so that a training does not fail at its end.
    """
    function, library, kind = _METRICS[name]
    try:
        import_module(library)
    except ImportError as error:
        raise UsageError(f"the metric {name} needs {library}: {install_command('scripts')}.") from error
    metric = OfflineMetric(function, kind)
    return lambda predictions, references: metric.compute(predictions=predictions, references=references) or {}


def of_labels(name: str, is_regression: bool = False) -> Callable[[Any], dict[str, float]]:
    """Return `compute_metrics` for a `Trainer` whose model returns logits, or one number if `is_regression`."""
    metric = load_metric(name)
    return lambda prediction: metric(labels_in(prediction.predictions, is_regression), prediction.label_ids)


def labels_in(predictions: Any, is_regression: bool = False) -> Any:
    """Return the labels, or the numbers if `is_regression`, of a `Trainer`'s logits, which may lead a tuple."""
    logits = predictions[0] if isinstance(predictions, tuple) else predictions
    return np.squeeze(logits, axis=-1) if is_regression else np.argmax(logits, axis=-1)
