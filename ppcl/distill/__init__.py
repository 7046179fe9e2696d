"""What replacing a run costs (the fit stage), and training the substitutes against the teacher's own activations."""
