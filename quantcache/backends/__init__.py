"""One file a backend; each offers the functions that ``ops.Backend`` lists. They never import each other."""
