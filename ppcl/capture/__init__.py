"""The teacher's denoising states and where they come from."""
