"""Saliency metrics, the baseline models that put a score in context, and summaries of scores.

Every metric can be called from here: ``mlnet_utils.metrics.nss(prediction, fixations)``. The
metrics take tensors; nothing in this room reads a data set or a network.
"""

from mlnet_utils.metrics.batches import auc as auc
from mlnet_utils.metrics.batches import auc_borji as auc_borji
from mlnet_utils.metrics.batches import auc_judd as auc_judd
from mlnet_utils.metrics.batches import auc_shuffled as auc_shuffled
from mlnet_utils.metrics.batches import cc as cc
from mlnet_utils.metrics.batches import emd as emd
from mlnet_utils.metrics.batches import information_gain as information_gain
from mlnet_utils.metrics.batches import kl_divergence as kl_divergence
from mlnet_utils.metrics.batches import nss as nss
from mlnet_utils.metrics.batches import score_all as score_all
from mlnet_utils.metrics.batches import similarity as similarity
from mlnet_utils.metrics.protocols import DEFINITIONS as DEFINITIONS
from mlnet_utils.metrics.protocols import METRICS as METRICS
from mlnet_utils.metrics.protocols import PROTOCOLS as PROTOCOLS
