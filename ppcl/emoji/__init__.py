"""The embedded default: a text-to-emoji teacher, its data and its evaluator."""
