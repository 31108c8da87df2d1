"""Saliency metrics, the baseline models that put a score in context, and summaries of scores.

Every metric can be called from here: ``mlnet_utils.metrics.nss(prediction, fixations)``. The
metrics take tensors; nothing in this room reads a data set or a network.
"""

from mlnet_utils.metrics.functions import FORMULAS, PROTOCOLS
from mlnet_utils.metrics.protocols import (
    METRICS,
    auc,
    auc_borji,
    auc_judd,
    auc_shuffled,
    cc,
    emd,
    information_gain,
    keep_repeats,
    kl_divergence,
    nss,
    score_all,
    similarity,
)

__all__ = [
    "FORMULAS",
    "METRICS",
    "PROTOCOLS",
    "auc",
    "auc_borji",
    "auc_judd",
    "auc_shuffled",
    "cc",
    "emd",
    "information_gain",
    "keep_repeats",
    "kl_divergence",
    "nss",
    "score_all",
    "similarity",
]
