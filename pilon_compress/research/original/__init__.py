"""The schedules of the original PILON: staged rates, selections that explore, frozen unused primitives."""
