"""Measures the gradient norm of each term of a loss, with or without a balancing strategy."""

from lightning_gradnorm.monitor.callback import GradientNormMonitor

__all__ = ["GradientNormMonitor"]
