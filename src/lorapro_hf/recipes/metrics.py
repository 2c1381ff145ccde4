"""How good are predictions? Metrics of the library `evaluate` that load without a network.

They compute what the metrics of the same names on the Hub do, by the same libraries (scikit-learn, scipy, rouge_score,
sacrebleu, jiwer: extra `scripts`).
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import datasets
import evaluate
import numpy as np

from lorapro_hf.options import UsageError
from lorapro_hf.utils.extras import install_command

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


class OfflineMetric(evaluate.Metric):
    """A metric that is defined here instead of in a module that `evaluate.load` would fetch."""

    name: str
    kind = "int64"  # of a prediction and a reference
    citation = ""

    def _info(self) -> evaluate.MetricInfo:
        features = {part: datasets.Value(self.kind) for part in ("predictions", "references")}
        return evaluate.MetricInfo(
            description=str(self.__doc__),
            citation=self.citation,
            inputs_description="",
            features=datasets.Features(features),
        )


class Accuracy(OfflineMetric):
    """Share of right labels."""

    name = "accuracy"

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


class AccuracyAndF1(OfflineMetric):
    """Share of right labels, F1 of label 1, and the mean of both."""

    name = "accuracy_and_f1"

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        from sklearn.metrics import f1_score

        right = float(np.mean(np.asarray(predictions) == np.asarray(references)))
        f1 = float(f1_score(references, predictions))
        return {"accuracy": right, "f1": f1, "combined_score": (right + f1) / 2}


class MatthewsCorrelation(OfflineMetric):
    """Matthews' correlation coefficient."""

    name = "matthews_correlation"

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        from sklearn.metrics import matthews_corrcoef

        return {"matthews_correlation": float(matthews_corrcoef(references, predictions))}


class PearsonAndSpearman(OfflineMetric):
    """Pearson's and Spearman's correlations."""

    name = "pearson_and_spearman"
    kind = "float64"

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        from scipy.stats import pearsonr, spearmanr

        found = {
            "pearson": float(pearsonr(predictions, references)[0]),
            "spearmanr": float(spearmanr(predictions, references)[0]),
        }
        return {**found, "combined_score": sum(found.values()) / 2}


class MeanSquaredError(OfflineMetric):
    """Mean squared error."""

    name = "mse"
    kind = "float64"

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        return {"mse": float(np.mean((np.asarray(predictions) - np.asarray(references)) ** 2))}


class ExactMatch(OfflineMetric):
    """Share of texts that are as the reference, to the letter."""

    name = "exact_match"
    kind = "string"

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        equal = [text == reference for text, reference in zip(predictions, references, strict=True)]
        return {"exact_match": float(np.mean(equal))}


class Rouge(OfflineMetric):
    """ROUGE-1, -2, -L and -Lsum F-measures with stemming, in percent."""

    name = "rouge"
    kind = "string"

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        from rouge_score.rouge_scorer import RougeScorer

        kinds = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
        scorer = RougeScorer(kinds, use_stemmer=True)
        scores = [scorer.score(reference, text) for reference, text in zip(references, predictions, strict=True)]
        return {kind: 100 * float(np.mean([score[kind].fmeasure for score in scores])) for kind in kinds}


class SacreBleu(OfflineMetric):
    """BLEU of the whole corpus with SacreBLEU's own tokenizer, in percent."""

    name = "sacrebleu"
    kind = "string"

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        from sacrebleu import corpus_bleu

        return {"bleu": float(corpus_bleu(predictions, [references]).score)}


class WordErrorRate(OfflineMetric):
    """Word errors (substituted, left out, put in) for each word of the references."""

    name = "wer"
    kind = "string"

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        import jiwer

        return {"wer": float(jiwer.wer(references, predictions))}


METRICS: dict[str, type[OfflineMetric]] = {
    metric.name: metric
    for metric in (
        *(Accuracy, AccuracyAndF1, MatthewsCorrelation, PearsonAndSpearman, MeanSquaredError),
        *(ExactMatch, Rouge, SacreBleu, WordErrorRate),
    )
}
_NEEDED = {
    "accuracy_and_f1": "sklearn",
    "matthews_correlation": "sklearn",
    "pearson_and_spearman": "scipy",
    "rouge": "rouge_score",
    "sacrebleu": "sacrebleu",
    "wer": "jiwer",
}


def load_metric(name: str) -> OfflineMetric:
    """The metric of that name, one of `METRICS`.

    Raises:
        UsageError: the library that computes it is missing.
    """
    library = _NEEDED.get(name)
    try:
        if library is not None:
            import_module(library)  # before a training, not after it
    except ImportError as error:
        raise UsageError(f"the metric {name} needs {library}: {install_command('scripts')}.") from error
    return METRICS[name](keep_in_memory=True)


def of_labels(name: str, is_regression: bool = False) -> Callable[[Any], dict[str, float]]:
    """`compute_metrics` for a `Trainer` whose model returns logits, or one number where `is_regression`."""
    metric = load_metric(name)

    def compute(prediction: Any) -> dict[str, float]:
        values = labels_in(prediction.predictions, is_regression)
        found: dict[str, float] = metric.compute(predictions=values, references=prediction.label_ids)
        return found

    return compute


def labels_in(predictions: Any, is_regression: bool = False) -> Any:
    """The labels, or the numbers where `is_regression`, in what a `Trainer` predicts.

    Args:
        predictions: logits, or a tuple that begins with them, as of models that return the states of an encoder too.
        is_regression: whether the model returns one number.
    """
    logits = predictions[0] if isinstance(predictions, tuple) else predictions
    return np.squeeze(logits, axis=-1) if is_regression else np.argmax(logits, axis=-1)
