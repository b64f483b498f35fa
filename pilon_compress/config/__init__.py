"""Settings of every command, each a field with a docstring, checks and, where it is an option, its mark.

reading        recipes from files and options: checks, and messages with a place or an option
option         marks that make a field an option of the command line
fields, ratio  types that several configs share
conflicts      fields that another field switches off
conversion     a conversion; budget is its first section, effort has what its levels spend
training       a training; research has the sections of research modules
comparison, evaluation, benchmark, generation, inspection, export    the other commands
recipes        recipes of both kinds by name
strict_yaml    YAML 1.2 with line numbers, no tags and no duplicate keys
"""
