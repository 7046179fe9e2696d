"""What a plan may choose from, with what each choice costs: fitted runs of blocks and smaller modules."""
