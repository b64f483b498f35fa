"""Published baselines, written from their papers' mathematics: what PILON is compared with at equal size.

A baseline is one file here (or a plug-in, see `pilon_compress.plugins`) that registers itself: see `registry`. Size,
work and bias are counted and absorbed in `approximation`, alike for all of them.
"""
