"""Options of BitNet's training, none of which lowers perplexity here: SubLN, gradual rounding, a second stage."""
