"""Fast operations: each a plain torch definition, some with a Triton kernel."""
