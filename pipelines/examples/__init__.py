"""Small programs that use a compressed pipeline; each is meant to be read and copied."""
