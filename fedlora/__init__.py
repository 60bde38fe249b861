"""fedlora: federated fine-tuning of transformers with low-rank adapters."""

__version__ = "0.1.0"

__all__ = ["__version__"]
