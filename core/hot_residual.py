"""The module from which the authors' code imports the residual layers, which are in core/training/hot_linear.py."""

from core.training.hot_linear import enable_hot_residual_for_model

__all__ = ["enable_hot_residual_for_model"]
