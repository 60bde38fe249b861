"""Figures for Prometheus: what a run, an exchange, a worker and their processes do."""
