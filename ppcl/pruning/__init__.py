"""What goes: options, criteria, allocations, the planner and searches."""
