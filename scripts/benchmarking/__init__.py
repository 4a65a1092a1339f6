"""The parts of scripts/benchmark.py: networks, models, ways to train them, one run, and a module for each measure."""
