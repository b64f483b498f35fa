"""Banks of whole neurons that layers share, made of the dense neurons of a band: matching, sizes, joint fit."""
