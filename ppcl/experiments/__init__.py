"""Tables: several plans, methods, sizes or settings beside each other, trained and judged alike."""
