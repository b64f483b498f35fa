"""One file, many sizes: neurons and components lie in falling order of worth, so that a smaller model is a prefix.

knapsack     one option per group within a budget; conversions allocate with it, too
worth        what a cut reads beside the weights: losses by size, and the moments that a refit needs
factors      those moments in few numbers: a diagonal and a low-rank part
cut          the smaller model, made of the larger one in place
"""
