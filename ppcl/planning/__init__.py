"""From an analysis, candidates and a budget to a plan."""
