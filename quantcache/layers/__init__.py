"""transformers' layer contract over the store, which layer a model gets, and the routing of its attention functions."""
