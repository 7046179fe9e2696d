"""Find out which runs of blocks a linear map can imitate: probes, CKA trend, intervals, linearity."""
