"""Training: from scratch, healing a converted model, chats. In reading order:

preflight      checks of a recipe against the models that it names, and the sizes of what it trains
run            the output folder: begun once, resumed under the same recipe
pipeline       the road from a recipe to a model folder
heal           recovery distillation from the dense teacher
progressive    converting and healing in turn
dense_warmup   dense at first, then converted
ternary        ternary weights: at the start, and in each step
exits          exit gates, at the end of a training or alone
freeze_unused  primitives that take no part in a step keep their values
bank_diagnostics  entropy, use and dead shares of the banks at every evaluation
finish         the model folder with its report

The loop, optimisers, schedule and checkpoints are in `optimize`, text and batches in `data`.
"""
