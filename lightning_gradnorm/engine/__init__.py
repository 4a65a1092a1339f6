"""Runs a balancing strategy in a training loop. Pure torch: knows no Lightning."""
