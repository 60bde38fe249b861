"""The server side of a federation: the round loop and what guards it."""
