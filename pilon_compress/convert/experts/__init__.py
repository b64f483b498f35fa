"""Experts without training: the neurons of each feed-forward block in slices, chosen by an analytic router (CMoE)."""
