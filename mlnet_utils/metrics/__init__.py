"""Saliency metrics, the baseline models that put a score in context, and summaries of scores.

The metrics take tensors; nothing here reads a data set or a network.
"""

from mlnet_utils.metrics.protocols import *  # noqa: F403
