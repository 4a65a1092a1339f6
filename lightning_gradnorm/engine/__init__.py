"""Runs a balancing rule in a training loop. Pure torch: knows no Lightning."""

from lightning_gradnorm.engine.balancer import Balancer

__all__ = ["Balancer"]
