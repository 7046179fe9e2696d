"""One training loop, and what it needs on several processes and on small devices."""
