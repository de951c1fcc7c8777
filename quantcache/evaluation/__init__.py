"""What int8 costs in quality and gains in speed, measured on a model and compared with other caches."""
