"""The number format: what a page is, and every operation in plain torch, which is the specification."""
