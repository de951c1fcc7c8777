"""The bytes of one layer: pages and tail, growing and of fixed capacity, and what attention reads of them."""
