"""One-shot merging of adapters that were trained apart: which method when."""
