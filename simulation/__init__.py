"""Simulation: a whole federation on one machine."""
