"""Text: sources, file formats, the split into a calibration and a held-out part, paragraphs for encoders."""
