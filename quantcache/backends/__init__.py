"""One file a backend; each offers the functions that ``dispatch.Backend`` lists. They never import each other."""
