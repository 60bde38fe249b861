"""Fast operations of training and aggregation: each a plain torch definition, some with a kernel."""
