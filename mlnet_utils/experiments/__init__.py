"""Evaluation of a run beside floors and ceilings, sweeps of configurations, the paper's study.

Metrics and their averages live in ``metrics``, notebooks and stages in ``running``.
"""
