"""Figures for Prometheus: what runs and processes do."""
