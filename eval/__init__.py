"""Judging a compressed pipeline against its teacher: pictures, scores, fidelity, speed.

``generate`` draws the pictures, ``features`` describes them, ``fid`` and ``clip`` compare
distributions and captions, ``fidelity`` compares picture by picture, ``speed`` times the two
side by side, ``evaluate`` does all of it and writes ``metrics.json``, ``report`` shows it.
Import what you need from the modules; this package itself imports nothing heavy.
"""
