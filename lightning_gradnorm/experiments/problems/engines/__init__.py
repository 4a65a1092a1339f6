"""Remaining life and health of turbofan engines: NASA's C-MAPSS, and a simulator."""
