"""Train the substitutes against the teacher's own activations."""
