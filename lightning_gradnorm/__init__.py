"""Loss balancing for Lightning: GradNorm, and every other strategy, as a callback."""

__version__ = "0.1.0.dev0"
