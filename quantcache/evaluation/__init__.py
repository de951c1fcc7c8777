"""What int8 costs in quality, measured on a model, beside other caches."""
