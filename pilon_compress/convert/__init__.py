"""Dense to PILON. In the order in which a conversion meets them:

prepare, plan       what can be known before weights are loaded: sites, sizes, estimates; effort: what may be spent
calibration         text as batches; source, stream: the dense model's blocks and the states between them
moments, shelf      what projections see, and what their outputs are worth: the two-sided metric
neurons, blocks     what a layer may lose; sensitivity: what that really costs
knapsack, allocate  where the budget goes; share, align: whether bands gain by sharing banks;
                    bands: which layers those are
factorize, fit      best factors of one weight, and of a band's weights from one bank; band, lbfgs: that problem,
                    and what solves it; cluster: which components go together
anchor, layers      one layer after another, behind the converted ones
rounding            to whole numbers, if asked for, errors fed on to what is not rounded yet
build               the model of all that
refine, descent     regression to the dense model, if asked for
ternarise           factors become digits, for a training that goes on from there
pipeline, journal   the whole road, and how it survives being cut off
compare, ours, peers, candidate, cells    the same against published baselines
"""
