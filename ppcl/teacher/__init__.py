"""The model that is compressed: families, loading, what its blocks are called with."""
