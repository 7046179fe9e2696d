"""The plan, and putting a student together from it."""
