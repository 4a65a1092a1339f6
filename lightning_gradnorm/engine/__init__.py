"""Runs a balancing rule in a training loop. Pure torch, without Lightning."""

from lightning_gradnorm.engine.balancer import Balancer

__all__ = ["Balancer"]
