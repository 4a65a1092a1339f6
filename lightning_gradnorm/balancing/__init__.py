"""What a strategy does with T losses and T gradient norms. Pure torch: knows neither Lightning nor Hydra."""

from lightning_gradnorm.balancing.gradnorm import Balance, GradNormRule, Skipped, balance

__all__ = ["Balance", "GradNormRule", "Skipped", "balance"]
