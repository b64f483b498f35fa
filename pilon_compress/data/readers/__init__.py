"""Readers of text: one file for each scheme of sources (hub, stdlib, stdin, files) and for each format of files."""
