"""Evaluation of a run, sweeps over configurations, and the study made from them."""
