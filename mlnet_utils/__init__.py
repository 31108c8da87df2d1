"""ML-Net (Cornia, Baraldi, Serra, Cucchiara; ICPR 2016) in PyTorch.

``import mlnet_utils`` is light: torch is imported only by the modules that need it.
"""

__version__ = "1.0.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str):
    if name == "load":
        from mlnet_utils.predict.predictor import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
