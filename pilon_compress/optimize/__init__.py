"""The optimisation loop of every training task and of `convert --refine`. In reading order:

training      the state of a run: its parts, its weights, its checkpoints
loop          steps, validation, checkpoints, restarts from the best weights
callbacks     changes besides the learning rate
optimizers, schedule
              which parameters move how fast, and when
checkpoints   read back by any number of processes
monitor, trackers
              figures while a run goes on
"""
