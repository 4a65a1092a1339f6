"""The parts of scripts/benchmark.py: networks, models, ways to train them, single runs, and one module per measure."""
