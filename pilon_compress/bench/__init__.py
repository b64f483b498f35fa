"""Time feed-forward blocks and complete models against dense and quantised variants."""
