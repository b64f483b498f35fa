"""Converts a dense model to PILON. In the order in which a conversion meets them:

prepare      what is known before weights are loaded: projections, uniform sizes; cost: seconds and memory
calibrate/   second moments of inputs and output gradients over the calibration text, and measured sensitivities
allocate/    which neurons and ranks each layer keeps under the budget
sharing/     banks that several layers share: grouping, joint fit, search
solve/       the weights of each layer: low-rank factors, pruned neurons, integers, targets behind converted layers
planning     calibrate and allocate, for a dry run and a conversion alike
build_model  the converted model
pipeline     the whole road, with its journal
"""
