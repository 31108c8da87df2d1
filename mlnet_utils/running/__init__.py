"""Headless execution: a notebook by papermill, and the notebooks as stages of a pipeline.

Nothing here knows about saliency: the computations stand in the notebooks. Without the extra
``notebooks`` importing this room is an ImportError that names it.
"""

from mlnet_utils.runtime import require

require("papermill", "notebooks")  # it requires all that this room imports
require("ipykernel", "notebooks")  # the kernel
