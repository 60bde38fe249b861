"""Record-level privacy: per-sample gradients of adapters."""
