"""Pages, cards, tables and plots for people."""
