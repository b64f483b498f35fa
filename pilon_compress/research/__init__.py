"""Experiments that work and do not pay (docs/log.md): the core imports none, a recipe or a saved model names one.

A module is a folder NAME of this one, with up to three files:

settings    class Settings, a ResearchSection: the fields of `research: {NAME: ...}` in a training recipe
training    class Extension, of `optimize.callbacks`: changes the layout and the model, adds callbacks to the loop
form        additions to banks and projections, registered by kind with `nn.additions`: saved models load by them
"""
