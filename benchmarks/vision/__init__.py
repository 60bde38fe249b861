"""A tiny vision transformer on transformed digits: strategies compared at equal local work."""
