"""A guest's writes also go, asynchronously and in order, to an image on another host."""
