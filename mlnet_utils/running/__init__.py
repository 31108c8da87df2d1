"""Headless execution: a notebook by papermill, and the notebooks as stages of a pipeline.

Nothing here knows about saliency: the computations stand in the notebooks.
"""
