"""The client side of a federation: one site's data, training and state."""
