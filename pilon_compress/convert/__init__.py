"""Dense to PILON, in reading order: plan, calibration, factorize, cluster, fit, pipeline."""
