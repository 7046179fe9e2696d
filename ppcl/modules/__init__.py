"""What can stand in a block in the place of a larger module."""
