"""Saliency metrics, the baseline models that put a score in context, and summaries of scores.

Every metric can be called from here: ``mlnet_utils.metrics.nss(prediction, fixations)``. The
metrics take tensors; nothing in this room reads a data set or a network.
"""

from mlnet_utils.metrics.protocols import (
    DEFINITIONS,
    METRICS,
    PROTOCOLS,
    auc,
    auc_borji,
    auc_judd,
    auc_shuffled,
    cc,
    emd,
    information_gain,
    kl_divergence,
    nss,
    score_all,
    similarity,
)

__all__ = [
    "DEFINITIONS",
    "METRICS",
    "PROTOCOLS",
    "auc",
    "auc_borji",
    "auc_judd",
    "auc_shuffled",
    "cc",
    "emd",
    "information_gain",
    "kl_divergence",
    "nss",
    "score_all",
    "similarity",
]
