"""The run directory, its stages, and the glue between them."""
