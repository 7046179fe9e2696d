"""From a bundle to a diffusers pipeline, with its model card, here or on the hub."""
